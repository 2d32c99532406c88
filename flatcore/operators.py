"""Symmetric P x P matrices of an objective, known by their products with blocks of vectors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flatcore import checks
from flatcore._C import engine
from flatcore.autograd import Mode
from flatcore.backend import backend_for, native_backend
from flatcore.environment import exclusive, full_float32, full_precision
from flatcore.example_sweeps import OperatorSweeps, sweeps_for
from flatcore.linear import check_count, check_seed
from flatcore.memory import free_bytes
from flatcore.native import NativeBackend
from flatcore.objective import Objective, Snapshot
from flatcore.output_rows import OutputRows
from flatcore.plan import Plan
from flatcore.precision import Precision, measured, usable
from flatcore.results import MeasuredError
from flatcore.vectors import Directions, is_single, to_rows

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# Columns of the identity that go through at once in to_dense.
_DENSE_BLOCK = 64


class Operator:
    """What Hessian, GGN and GradientCovariance have in common.

    `A @ V` takes V of shape (P,) or (P, K), or a dict from parameter name to (*shape,) or (*shape, K), of the
    parameters' dtype and on their device, and returns the same form. A (P, K) result is a view with strides
    (1, P); a V with these strides is not copied. The same V gives the same bits every time. Cost: K
    products.

    precision: "full", or "bf16" for the matrix products of linear layers and `matmul` with operands rounded to bfloat16
    (8 bits), faster on processors that have instructions for it (docs/performance.md); on a GPU also "tf32" (10 bits),
    which "bf16" takes there for the products too small to gain from it. Sums and everything else, the loss and its
    gradient among them, stay float32. Such products are symmetric up to their error
    only; `precision_error` measures both, `plan` says what share of a product is rounded; `solve`, `block_spectra` and
    the functionals refuse them. Raises ValueError for float64, and for "tf32" on the CPU; where the device cannot, or
    the model has no program, a FlatcoreWarning says that products are in full precision.
    """

    mode: ClassVar[Mode]

    def __init__(self, objective: Objective, *, precision: Precision = "full") -> None:
        if not isinstance(objective, Objective):
            raise TypeError(
                f"objective: expected a flatcore.Objective, got {type(objective).__name__}; make one with "
                "Objective(model, loss, data)"
            )
        self.objective = objective
        self.precision: Precision = usable(precision, objective.layout)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.objective.layout.size, self.objective.layout.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.objective.layout.dtype

    @property
    def device(self) -> torch.device:
        return self.objective.layout.device

    @property
    def parameter_slices(self) -> dict[str, slice]:
        """Where each parameter stands among the P rows."""
        return self.objective.parameter_slices

    def __matmul__(self, V: Directions) -> Any:
        def product(at: Snapshot) -> Any:
            rows, restore = to_rows(V, self.objective.layout, self.objective.budget.directions)
            return restore(self._product(rows, at))

        return self.objective.at_present(product)

    def _product(self, V: Tensor, at: Snapshot) -> Tensor:
        Y = engine.fresh_rows(len(V), V.shape[1], V, self.objective.budget.directions)
        if V.shape[0]:
            with full_precision():
                backend_for(self.objective, self.mode).product(self.mode, V, Y, at, self.precision)
        return Y

    def quadratic_form(self, V: Directions) -> Tensor:
        """<v, A v> for the directions V, in the forms that `A @ V` takes: a float64 number, or (K,) for K directions.
        On the CPU.

        Cost: for a native program half a product or less (a linear layer takes three matrix products instead of six,
        for a GGN two instead of four), and no memory of the parameters' size: nothing is swept backward, as the second
        derivative of the loss along v is the sum over the program's ops of <adjoint of the output, second derivative of
        the op along the tangents of its inputs>. Through autograd it costs the products. Squares are formed in the
        parameters' dtype: in float32, vectors whose entries lie far from one (1e-20, 1e20) lose the answer.
        """
        snapshot = self.objective.snapshot()
        rows, _ = to_rows(V, self.objective.layout, self.objective.budget.directions)
        q = self._quadratic_form(rows, snapshot)
        return q[0] if is_single(V, self.objective.layout) else q

    def _quadratic_form(self, V: Tensor, at: Snapshot) -> Tensor:
        if not V.shape[0]:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        with full_precision(), torch.inference_mode(False):
            return backend_for(self.objective, self.mode).quadratic_form(self.mode, V, at, self.precision)

    def example_sweeps(self, diagonal: bool = False) -> OperatorSweeps | str:
        """What `trace` and `diagonal` use where the loss is a sum over examples; a sentence that says why it is not
        available."""
        if self.precision != "full":
            return f'precision="{self.precision}" is for products'
        at = self.objective.snapshot()
        native = native_backend(self.objective)
        if self.mode == "ggn" and not isinstance(native, str) and (refusal := native.refusal("ggn")):
            backend_for(self.objective, self.mode)  # raises where there is no such matrix
            return refusal
        found = sweeps_for(self.objective, at)
        if isinstance(found, str):
            return found
        return OperatorSweeps(found, self.mode, at, diagonal)

    def to_scipy(self) -> LinearOperator:
        """As a `scipy.sparse.linalg.LinearOperator` over numpy arrays; each product goes through torch on "
        "`device`."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(V: Any) -> Any:
            if np.iscomplexobj(V):
                raise TypeError(f"V: expected real numbers, got {V.dtype}; take V.real and V.imag apart")
            rows = torch.as_tensor(V, dtype=self.dtype, device=self.device)
            return (self @ rows).cpu().numpy()

        kind = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator(
            shape=self.shape,
            dtype=kind,
            matvec=lambda v: matmat(v.reshape(-1)),
            rmatvec=lambda v: matmat(v.reshape(-1)),
            matmat=matmat,
            rmatmat=matmat,
        )

    def to_dense(self) -> Tensor:
        """The matrix itself, (P, P). Cost: P products.

        Raises ValueError where it would not fit into the free memory.
        """
        size = self.shape[0]
        needed = size * size * self.dtype.itemsize
        if needed > free_bytes(self.device):
            raise ValueError(
                f"to_dense: expected a matrix that fits into memory, got P = {size:,}, which takes "
                f"{needed / 2**30:.1f} GiB; select fewer parameters with params="
            )
        dense = torch.empty((size, size), dtype=self.dtype, device=self.device)
        for start in range(0, size, _DENSE_BLOCK):
            stop = min(start + _DENSE_BLOCK, size)
            block = torch.zeros((stop - start, size), dtype=self.dtype, device=self.device)
            block[:, start:stop].fill_diagonal_(1)
            dense[start:stop] = self._product(block, self.objective.snapshot())
        return dense.T

    def plan(self) -> Plan:
        """Which ops a product runs, natively or through autograd, with bytes and flops; print to read it."""
        self.objective.snapshot()
        return backend_for(self.objective, self.mode).plan(self.mode, self.precision)

    def precision_error(self, vectors: int = 4, *, seed: int = 0) -> MeasuredError:
        """Measures how far the products are from those in full precision, on random signs. Cost: 2 * vectors products.

        Random signs weigh all of the spectrum alike. A vector whose product is small beside |A|, one from the null
        space say, has a larger relative error.
        """
        count, seed = check_count("vectors", vectors, 1), check_seed(seed)
        snapshot = self.objective.snapshot()
        full = copy.copy(self)
        full.precision = "full"
        like = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        return measured(
            lambda V: self._product(V, snapshot),
            lambda V: full._product(V, snapshot),
            like,
            self.precision,
            count,
            seed,
        )

    def __repr__(self) -> str:
        rounded = "" if self.precision == "full" else f", {self.precision}"
        return f"{type(self).__name__}(P = {self.shape[0]}, {self.dtype}{rounded}, {self.device})"


class Hessian(Operator):
    """H = d2L / dparameters2 of the objective's mean loss. Symmetric, in general indefinite."""

    mode = "hessian"


class GGN(Operator):
    """Generalized Gauss-Newton matrix: mean over examples of J^T (d2 loss / d z2) J, J = dz / d parameters.

    Positive semidefinite for losses that are convex in the model's output; for cross-entropy and for mean
    squared error (up to its factor) it is the Fisher matrix (Martens 2020, "New insights and perspectives
    on the natural gradient method", section 9). The output z is what the model hands to the loss: for
    `loss(output, target)` the output, for `ModelLoss` the first argument of the one loss function. A log-softmax that
    nll_loss alone reads counts to the loss: the two are a cross-entropy, whose z are the logits. (Through autograd,
    where the model has no program, it counts to the model, and the matrix is zero.)

    Raises ValueError on use where the loss depends on the parameters in another way than through that output.
    """

    mode = "ggn"

    def output_rows(self) -> OutputRows:
        """The factor R of G = Rᵀ diag(s) R, a row for every example and output, as the functionals take it."""
        snapshot = self.objective.snapshot()
        native = isinstance(backend_for(self.objective, self.mode), NativeBackend)
        return OutputRows(self.objective, snapshot, logits_for_nll=native)


class GradientCovariance(Operator):
    """C = (1/N) sum_n g_n g_n^T, g_n the gradient of example n's loss; centered: minus the mean's.

    The objective is L = (1/N) sum_n l_n over N examples, so l_n is N times what example n contributes to L:
    with class weights or ignored targets these are not the plain losses. Examples are the leading axis of
    the batch; they must not interact, and they stand in order along axis 0 of the model's output, each with
    equally many rows. Of a loss that couples them, a deviation over the batch, say, g_n is N times the gradient
    through the outputs of example n, which is not the gradient of a loss of its own.

    Raises ValueError where normalisation over the batch makes examples interact, or the output has no such
    axis.
    """

    mode = "covariance"

    def __init__(self, objective: Objective, centered: bool = True, *, precision: Precision = "full") -> None:
        super().__init__(objective, precision=precision)
        self._check_examples()
        self.centered = centered
        self._mean: tuple[object, Tensor] | None = None

    @exclusive
    def _check_examples(self) -> None:
        checks.check_batch_statistics(self.objective.model)

    def _product(self, V: Tensor, at: Snapshot) -> Tensor:
        self._check_examples()  # the model's mode may be another one than at first
        Y = super()._product(V, at)
        if self.centered:
            g = self._mean_gradient(at)
            with full_precision(), full_float32(self.device):
                Y.addr_(V @ g, g, alpha=-1)
        return Y

    def _quadratic_form(self, V: Tensor, at: Snapshot) -> Tensor:
        self._check_examples()
        q = super()._quadratic_form(V, at)
        if self.centered:
            g = self._mean_gradient(at)
            with full_precision(), full_float32(self.device):
                q -= (V @ g).double().cpu().square()
        return q

    def example_sweeps(self, diagonal: bool = False) -> OperatorSweeps | str:
        self._check_examples()
        found = super().example_sweeps(diagonal)
        if isinstance(found, str):
            return found
        if not found.outputs:
            return "the gradient of each example is not got in one sweep from the model's output"
        if self.centered:
            found.mean_gradient = lambda: self._mean_gradient(self.objective.snapshot())
        return found

    def _mean_gradient(self, at: Snapshot) -> Tensor:
        if self._mean is None or self._mean[0] is not at:
            with full_precision():
                self._mean = (at, backend_for(self.objective, self.mode).gradient(at))
        return self._mean[1]

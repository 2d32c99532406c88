"""Numbers made of all eigenvalues: log det, soft rank, norms, participation ratio, sums of any function."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flatcore import _C
from flatcore.adaptive import Block, Exact, Options, dense, eigenvalues, finite, run
from flatcore.errors import warn
from flatcore.gram import GramMatrix, gram_of
from flatcore.linear import LinearView, as_full_operator, check_count, check_positive
from flatcore.means import Smooth, power, quotient, total
from flatcore.memory import free_bytes
from flatcore.progress import Bar
from flatcore.quadrature import Jacobi
from flatcore.results import Estimate
from flatcore.spectral import Function, rounding

__all__ = [
    "effective_dimension",
    "frobenius",
    "functional",
    "logdet",
    "participation_ratio",
    "schatten",
    "soft_rank",
]

_STEPS = 128
_DENSE_AT_MOST = 2048  # rows whose dense eigenvalues "auto" may take: seconds on one core
_COLUMNS_AT_MOST = 4096  # columns that "auto" may go through
# After these steps the quadratures are looked at, whether they will do.
_LOOKS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_FEWEST_STEPS = 12  # where no bound is known, two rules may agree by chance
_PROBES = ("auto", "exact", "lanczos", "gram")
_ONE_PRODUCT = ("auto", "exact", "hutchinson", "gram")


def functional(
    A: Any,
    f: Callable[[np.ndarray], np.ndarray],
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """tr f(A) = sum_i f(lambda_i) of the symmetric operator A, (P, P); ``f`` maps an array elementwise.

    ``method`` "lanczos": probes of random signs, each with a Gauss quadrature from at most ``steps`` (128) steps of
    Lanczos (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075-1099), until stderr <= rtol |value|.
    "exact": all eigenvalues, from P products or, where it is cheaper, through "gram": those of a ``GGN`` from the
    Gram matrix of its outputs on all data, an (N C, N C) matrix for N examples with C outputs, N C < P, which is
    computed by plain torch and checked by one product; the result's ``method`` says which. "auto": exact where that
    costs no more than 64 products, else lanczos, changing over to exact where the probes seen show that it is the
    cheaper way to rtol (P products only for P <= 2048).

    ``stderr`` holds two things, added in squares: the standard error over the probes, moderated by a bound on their
    variance so that it holds with few of them (``flatcore/means.py``), and the error of the quadrature, estimated
    from the rules of a half and a quarter of the steps. A function with steep places between the quadrature's nodes
    needs more steps than that shows. ``max_matvecs``: products with one vector, by default 2000. rtol not reached by
    then: ``status`` says so, and a FlatcoreWarning. Memory: min(8, probes) * steps vectors. Raises ValueError or
    TypeError for bad arguments, for products that are not finite, and where f is not finite at an eigenvalue.
    """
    options = Options.checked("functional", method, _PROBES, rtol, max_matvecs, seed, progress)
    return _sum(A, Function(f, "f"), total(), options, steps)


def logdet(
    A: Any,
    damping: float,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """log det(A + damping I) = sum_i log(lambda_i + damping), damping >= 0, arguments as in ``functional``.

    Raises ValueError where A + damping I is not positive definite beyond A's rounding; eigenvalues are never
    changed. For A >= 0 the quadrature's error is no estimate but lies between the Gauss rule, an upper bound, and
    the Gauss-Radau rule with a node at zero, a lower one (Golub and Meurant, "Matrices, Moments and Quadrature with
    Applications" (2010), section 6.3).
    """
    options = Options.checked("logdet", method, _PROBES, rtol, max_matvecs, seed, progress)
    shift = check_positive("damping", damping, 1e-3) if damping != 0 else 0.0
    function = Function(lambda x: np.log(x + shift), "log", pole=-shift, bernstein=True)
    return _sum(A, function, total(), options, steps)


def soft_rank(
    A: Any,
    damping: float,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """tr A (A + damping I)^-1 = sum_i lambda_i / (lambda_i + damping), damping > 0, arguments as in ``functional``.

    Between 0 and rank(A) for A >= 0; for the mean loss with the penalty damping |theta|² / 2 (``weight_decay`` of
    torch's SGD) it is the soft rank of Shoham, Mor-Yosef and Avron, arXiv 2506.17809. A negative eigenvalue
    above -damping counts with its negative term, and that is warned of: the measure is meant for ``GGN``. One at or
    below -damping raises ValueError. Quadrature bounds as in ``logdet``.
    """
    options = Options.checked("soft_rank", method, _PROBES, rtol, max_matvecs, seed, progress)
    return _soft_rank(A, check_positive("damping", damping, 1e-3), options, steps, "damping")


def effective_dimension(
    A: Any,
    z: float,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """N_eff = sum_i lambda_i / (lambda_i + z), z > 0: the number of well determined parameters (MacKay, Neural
    Computation 4 (1992) 415-447, gamma; Maddox, Benton and Wilson, arXiv 2003.02139, equation 3).

    There the lambda_i belong to the loss summed over the N examples and z is the prior's precision. Operators here
    belong to the mean loss: for these z is the prior's precision / N. The same sum as ``soft_rank`` with damping = z.
    """
    options = Options.checked("effective_dimension", method, _PROBES, rtol, max_matvecs, seed, progress)
    return _soft_rank(A, check_positive("z", z, 1e-3), options, steps, "z")


def schatten(
    A: Any,
    p: float,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """The Schatten norm (sum_i |lambda_i|^p)^(1/p), p >= 1, arguments as in ``functional``.

    p = 1 is the nuclear norm, p = 2 the Frobenius norm, for which ``frobenius`` is cheaper; p = inf is the largest
    |eigenvalue|, for which see ``eigsh``. The root of the estimated sum is corrected for its bias to second order.
    """
    options = Options.checked("schatten", method, _PROBES, rtol, max_matvecs, seed, progress)
    order = check_positive("p", p, 1)
    if order < 1:
        raise ValueError(f"p: expected a number of at least 1, got {order:g}; give e.g. 1")
    return _sum(A, Function(lambda x: np.abs(x) ** order, "|x|^p"), power(1 / order), options, steps)


def frobenius(
    A: Any,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """|A|_F = sqrt(sum_i lambda_i²) of the symmetric operator A, (P, P).

    "hutchinson": the mean of |A v|² over probes of random signs has no bias, whatever the spectrum. Of its root the
    bias is -stderr² / (2 |A|_F) to second order (delta method) and taken off: what is left is smaller than stderr by
    a factor of the relative error. "exact": the squares of all P columns, or "gram" as in ``functional``. "auto" and
    the rest as in ``trace``.
    """
    options = Options.checked("frobenius", method, _ONE_PRODUCT, rtol, max_matvecs, seed, progress)
    return _from_products(A, _SquareSource, power(0.5), lambda t, q: float(np.sqrt(q)), options)


def participation_ratio(
    A: Any,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """(tr A)² / tr A², for A >= 0 between 1 and the rank: how many eigenvalues carry the trace.

    From one product per probe: <v, A v> and |A v|² are samples of tr A and tr A², and the ratio's bias and standard
    error come from their covariance by the delta method to second order. For an indefinite A the same number is
    defined, and small where the trace cancels. Zero for A = 0. Arguments as in ``frobenius``.
    """
    options = Options.checked("participation_ratio", method, _ONE_PRODUCT, rtol, max_matvecs, seed, progress)
    return _from_products(A, _TraceAndSquareSource, quotient(), lambda t, q: t**2 / q if q else 0.0, options)


def _soft_rank(A: Any, shift: float, options: Options, steps: int | None, argument: str) -> Estimate:
    text = f"x / (x + {argument})"
    function = Function(
        lambda x: x / (x + shift), text, pole=-shift, bernstein=True, nonnegative=True, argument=argument
    )
    return _sum(A, function, total(), options, steps)


def _sum(A: Any, function: Function, smooth: Smooth, options: Options, steps: int | None) -> Estimate:
    began = time.perf_counter()
    operator = as_full_operator(A)
    steps = min(_STEPS if steps is None else check_count("steps", steps, 1), operator.P)

    def sum_over(values: np.ndarray) -> float:
        function.check(values, rounding(operator.dtype, float(np.abs(values).max())))
        return smooth.at(np.array([function(values).sum()]))[0]

    source = _QuadratureSource(operator, function, steps, options.rtol, options.seed)
    ways = _exact_ways(
        A,
        operator,
        options,
        _DENSE_AT_MOST,
        lambda bar: sum_over(eigenvalues(operator, bar)),
        lambda gram: sum_over(gram.eigenvalues()),
        gram_needs_eigenvalues=True,
    )
    result = run(source, smooth, ways, options, began)
    if function.lowest_negative < 0:
        warn(
            f"{options.what}: A has negative eigenvalues, down to {function.lowest_negative:.3g}, each of which counts "
            "with a negative term; for a measure that is meant for A >= 0 take fc.GGN"
        )
    return result


def _from_products(
    A: Any,
    kind: type[_SquareSource],
    smooth: Smooth,
    combine: Callable[[float, float], float],
    options: Options,
) -> Estimate:
    began = time.perf_counter()
    operator = as_full_operator(A)

    def compute(bar: Bar) -> float:
        sums = np.zeros(2)

        def take(first: int, rows: torch.Tensor) -> None:
            sums[0] += float(rows[:, first : first + len(rows)].diagonal().sum(dtype=torch.float64))
            sums[1] += float(rows.double().square().sum())

        dense(operator, bar, take)
        return combine(*sums)

    ways = _exact_ways(
        A,
        operator,
        options,
        _COLUMNS_AT_MOST,
        compute,
        lambda gram: combine(*gram.power_sums()),
        gram_needs_eigenvalues=False,
    )
    return run(kind(operator, options.seed), smooth, ways, options, began)


def _exact_ways(
    A: Any,
    operator: LinearView,
    options: Options,
    columns_at_most: int,
    from_columns: Callable[[Bar], float],
    from_gram: Callable[[GramMatrix], float],
    *,
    gram_needs_eigenvalues: bool,
) -> list[Exact]:
    """Through all columns of A, and through the Gram matrix of an example's outputs where A has one."""
    P, method = operator.P, options.method
    ways = [Exact("exact", P, P, columns_at_most >= P, from_columns)]
    gram = gram_of(A, operator, method == "gram") if method in ("auto", "exact", "gram") else None
    if gram is not None:
        cost = gram.products_worth(gram_needs_eigenvalues)
        ways.append(Exact("gram", 1, cost, True, lambda bar: from_gram(gram)))
    return ways[1:] if method == "gram" else ways


class _QuadratureSource:
    """<v, f(A) v> by Gauss quadrature, with as many steps of Lanczos as it takes."""

    method, q, least_probes = "stochastic Lanczos quadrature", 1, 16

    def __init__(self, operator: LinearView, function: Function, steps: int, rtol: float, seed: int) -> None:
        self.operator, self.function, self.steps, self.seed = operator, function, steps, seed
        self.tolerance = rtol / 4  # of the quadrature, so that it does not decide
        self.like = torch.empty(0, dtype=operator.dtype, device=operator.device)

    def draw(self, first: int, count: int, most_products: int) -> Block:
        operator = self.operator
        steps = max(1, min(self.steps, most_products // count))
        width = operator.P * operator.dtype.itemsize
        if count * steps * width > free_bytes(operator.device) // 2:
            steps = max(2, free_bytes(operator.device) // 2 // (count * width))
        start = _C.krylov.rademacher(self.seed, first, count, operator.P, self.like)
        before = [np.inf]

        def enough(alpha: torch.Tensor, beta: torch.Tensor, lengths: list[int], products: int) -> bool:
            jacobi = Jacobi.of(alpha, beta, lengths, products // count)
            values, bias, bounded = self._quadrature(jacobi)
            relative = bias / max(abs(float(values.mean())), np.finfo(float).tiny)
            previous, before[0] = before[0], relative
            sure = bounded or (jacobi.steps >= _FEWEST_STEPS and previous <= self.tolerance)
            return bool(relative <= self.tolerance and sure)

        alpha, beta, lengths, products = _C.krylov.tridiagonalise(
            operator.apply, start, steps, enough, _LOOKS
        )
        jacobi = Jacobi.of(alpha, beta, lengths, min(products // count, steps))
        values, bias, _ = self._quadrature(jacobi)
        nodes, weights = jacobi.gauss()
        squares = operator.P * float((weights * self.function(nodes) ** 2).sum(axis=1).mean())
        bound = 2 * max(squares - float(values.mean()) ** 2 / operator.P, 0.0)
        return Block(values[:, None], np.array([[bound]]), np.array([bias]), products)

    def _quadrature(self, jacobi: Jacobi) -> tuple[np.ndarray, float, bool]:
        """tr f(A) as each probe sees it, the mean size of the quadrature's error, and whether that is a bound."""
        P, f = self.operator.P, self.function
        nodes, weights = jacobi.gauss()
        zero = rounding(self.operator.dtype, float(np.abs(nodes).max()))
        f.check(nodes, zero)
        gauss = P * (weights * f(nodes)).sum(axis=1)
        # A Krylov space that is exhausted, or the whole space, gives the spectrum the probe sees.
        going = jacobi.going & (jacobi.steps < P)
        if f.bernstein and nodes.min() >= -zero and f.pole < -zero:
            nodes, weights = jacobi.radau(-zero)
            radau = P * (weights * f(nodes)).sum(axis=1)
            middle = np.where(going, (gauss + radau) / 2, gauss)
            return middle, float(np.where(going, np.abs(gauss - radau) / 2, 0.0).mean()), True
        if not going.any():
            return gauss, 0.0, True

        def sums(nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
            f.check(nodes, zero)
            return np.asarray(P * (weights * f(nodes)).sum(axis=1))

        return gauss, float(jacobi.gauss_error(sums).mean()), False


def _inner_products(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """X Yᵀ of rows, in float64; on a GPU, whose memory is dear, without the rows in float64."""
    return _C.krylov.products_of_rows(X, Y) if X.is_cuda else X.double() @ Y.double().T


class _SquareSource:
    """|A v|², a sample of tr A²."""

    method, q, least_probes = "hutchinson", 1, 32  # they are cheap, and their squares skewed

    def __init__(self, operator: LinearView, seed: int) -> None:
        self.operator, self.seed = operator, seed
        self.like = torch.empty(0, dtype=operator.dtype, device=operator.device)

    def draw(self, first: int, count: int, most_products: int) -> Block:
        V = _C.krylov.rademacher(self.seed, first, count, self.operator.P, self.like)
        Y = finite(self.operator.apply(V))
        # Of each B whose trace is wanted: <v_i, B v_j>, whose diagonal is sampled.
        VV, VY, YY = torch.stack([_inner_products(*pair) for pair in ((V, V), (V, Y), (Y, Y))]).cpu().numpy()
        forms = self.forms(VV, VY, YY)
        values = forms.diagonal(axis1=1, axis2=2).T
        return Block(values, self._bound(forms, VV), np.zeros(self.q), count)

    def forms(self, VV: np.ndarray, VY: np.ndarray, YY: np.ndarray) -> np.ndarray:
        return YY[None]

    def _bound(self, forms: np.ndarray, VV: np.ndarray) -> np.ndarray:
        """2 tr of products of the B less their mean diagonal, from pairs: E <v, B w> <v, C w> = tr B C for independent
        v and w."""
        count = forms.shape[1]
        if count < 2:
            return np.zeros((len(forms), len(forms)))
        means = forms.diagonal(axis1=1, axis2=2).mean(axis=1) / self.operator.P
        pairs = (forms - means[:, None, None] * VV)[:, ~np.eye(count, dtype=bool)]
        return np.asarray(2 * pairs @ pairs.T / pairs.shape[1])


class _TraceAndSquareSource(_SquareSource):
    """<v, A v> and |A v|² of the same probe."""

    q = 2

    def forms(self, VV: np.ndarray, VY: np.ndarray, YY: np.ndarray) -> np.ndarray:
        return np.stack([(VY + VY.T) / 2, YY])

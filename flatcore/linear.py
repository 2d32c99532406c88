"""One view of "anything with .shape and @": blocks of rows (K, P) in, blocks of rows out."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["LinearView", "as_full_operator", "as_operator", "check_count", "check_positive", "check_seed"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class LinearView:
    """A symmetric operator of P rows: ``apply`` maps rows (K, P) to their products (K, P), contiguous."""

    def __init__(
        self,
        P: int,
        dtype: torch.dtype,
        device: torch.device,
        product: Callable[[torch.Tensor], torch.Tensor],
        parameter_slices: dict[str, slice] | None,
        name: str = "A",
        check_range: bool = False,
    ) -> None:
        self.P, self.dtype, self.device, self.name = P, dtype, device, name
        self.parameter_slices = parameter_slices
        self._product, self._check_range = product, check_range

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Row k of the result is A @ rows[k]."""
        result = self._product(rows)
        if not isinstance(result, torch.Tensor) or result.shape != rows.shape:
            got = tuple(reversed(result.shape)) if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(
                f"{self.name}: expected {self.name} @ V of shape {tuple(reversed(rows.shape))} for V of that shape, "
                f"got {got}; "
                "the operator must map (P, K) to (P, K)"
            )
        products = result.detach().to(dtype=self.dtype, device=self.device).contiguous()
        if self._check_range:  # of the first tells
            self._check_range = False
            _refuse_lost_squares(self.name, rows, products)
        return products


def _refuse_lost_squares(name: str, rows: torch.Tensor, products: torch.Tensor) -> None:
    """Norms and inner products square entries: below the root of the smallest number they are lost, silently."""
    if not len(rows):
        return
    # Without a copy of either, in one transfer.
    norms = [torch.linalg.vector_norm(x, math.inf) for x in (products, rows)]
    long, longest = torch.stack(norms).tolist()
    least = math.sqrt(torch.finfo(products.dtype).tiny)
    most = 1 / least
    if 0 < long < least * longest or most * longest < long < math.inf:
        raise ValueError(
            f"{name}: expected products of {least:.0e} to {most:.0e} times their vectors, got {long / longest:.2g} "
            f"times, whose squares are lost in {str(products.dtype)[6:]}; multiply the loss by a constant"
        )


def as_operator(A: Any, name: str = "A") -> LinearView:
    """Adapts a flatcore operator, a dense tensor or array, a scipy LinearOperator or anything with .shape and
    @. ``name``: of the argument, for what is said of it.

    Raises TypeError where A has no .shape and @ or is not float32 or float64, ValueError where it is not
    square or empty.
    """
    shape = getattr(A, "shape", None)
    if shape is None or not hasattr(A, "__matmul__"):
        raise TypeError(
            f"{name}: expected an operator with .shape and @, got {type(A).__name__}; "
            "give e.g. fc.Hessian(objective), a square tensor or a scipy LinearOperator"
        )
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            f"{name}: expected a square operator of shape (P, P), got {tuple(shape)}; give a symmetric one"
        )
    P = int(shape[0])
    if P == 0:
        raise ValueError(f"{name}: expected at least one row, got shape (0, 0); give a non-empty operator")
    slices = getattr(A, "parameter_slices", None)
    if isinstance(A, torch.Tensor):
        dense = A.detach()
        return LinearView(
            P, _torch_dtype(A.dtype, name), A.device, lambda rows: rows @ dense.T, slices, name, True
        )
    dtype, is_torch = _arithmetic(A, P, name)
    device = torch.device(getattr(A, "device", "cpu")) if is_torch else torch.device("cpu")
    product = (lambda rows: (A @ rows.T).T) if is_torch else _numpy_product(A, name)
    return LinearView(P, dtype, device, product, slices, name, check_range=True)


def as_full_operator(A: Any) -> LinearView:
    """`as_operator` for what takes products to be as exact, and as symmetric, as their dtype.

    Raises ValueError for an operator of lower precision.
    """
    precision = getattr(A, "precision", "full")
    if precision != "full":
        raise ValueError(
            f'A: expected products in full precision, got an operator with precision="{precision}", whose rounding '
            "would pass for curvature; make one without precision"
        )
    return as_operator(A)


def _torch_dtype(dtype: Any, name: str) -> torch.dtype:
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise TypeError(
            f"{name}: expected dtype float32 or float64, got {dtype}; convert it, e.g. {name}.to(torch.float64)"
        )
    return found


def _arithmetic(A: Any, P: int, name: str) -> tuple[torch.dtype, bool]:
    """A's precision, and whether it takes torch tensors; where it does not say, one product tells."""
    dtype = getattr(A, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return _torch_dtype(dtype, name), True
    if isinstance(A, np.ndarray) or type(A).__module__.partition(".")[0] == "scipy":
        return (torch.float64 if dtype is None else _torch_dtype(np.dtype(dtype), name)), False
    try:
        answer = A @ torch.zeros(P, 1, device="cpu")
    except (TypeError, AttributeError):
        return (torch.float64 if dtype is None else _torch_dtype(np.dtype(dtype), name)), False
    if isinstance(answer, torch.Tensor):
        return _torch_dtype(answer.dtype, name), True
    return (torch.float64 if dtype is None else _torch_dtype(np.dtype(dtype), name)), False


def _numpy_product(A: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def product(rows: torch.Tensor) -> torch.Tensor:
        result = np.asarray(A @ rows.numpy().T)
        if not np.issubdtype(result.dtype, np.floating):
            raise TypeError(
                f"{name}: expected real products in floating point, got dtype {result.dtype}; give a real operator"
            )
        return torch.from_numpy(np.ascontiguousarray(result.T))

    return product


def check_count(name: str, value: Any, least: int) -> int:
    """``value`` as an int, refused with a sentence if it is not a whole number >= least."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, got {value!r}; give an int")
    whole = operator.index(value)
    if whole < least:
        raise ValueError(f"{name}: expected at least {least}, got {whole}; give a larger number")
    return whole


def check_positive(name: str, value: Any, example: float) -> float:
    """``value`` as a float, refused with a sentence if it is not a positive finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a positive number, got {value!r}; give e.g. {example:g}") from None
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name}: expected a positive number, got {number}; give e.g. {example:g}")
    return number


def check_seed(seed: Any) -> int:
    """A seed the counter-based generator takes: a whole number in [0, 2**64)."""
    whole = check_count("seed", seed, 0)
    if whole >= 2**64:
        raise ValueError(f"seed: expected less than 2**64, got {whole}; give a smaller number")
    return whole

"""The least and the greatest eigenvalue, also of operators too small for a Lanczos recurrence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flatcore.eigsh import eigsh
from flatcore.errors import FlatcoreWarning
from flatcore.results import Eigenpairs

__all__ = ["MAX_MATVECS", "Extremes", "Least", "extremes", "least"]

MAX_MATVECS = 2000  # of a search for the least eigenvalue
_DENSE_AT_ONCE = 64  # parameters up to which a search takes as many products as there are
_DENSE_AT_MOST = 1000
_LEAST_PRODUCTS = 8  # that a search can go on with
_ROUNDING = 8.0  # units in the last place of |A| by which a product is off, about


@dataclass(frozen=True)
class Extremes:
    """``values``, ``residuals``: increasing, one of each end asked for. ``scale``: the largest |eigenvalue| seen."""

    values: list[float]
    residuals: list[float]
    matvecs: int
    status: str
    scale: float


def extremes(A: Any, tol: float, seed: int, which: Literal["LA", "SA"]) -> Extremes:
    """The greatest or the least eigenvalue of A, to a residual of tol times the largest |eigenvalue|."""
    P = A.shape[0]
    if P <= 2:
        values = _spectrum(A)[0].tolist()
        return Extremes([values[-1 if which == "LA" else 0]], [0.0], P, "converged", max(map(abs, values)))
    pairs = eigsh(A, k=1, which=which, tol=tol, seed=seed, return_eigenvectors=False)
    return Extremes(pairs.values.tolist(), pairs.residuals.tolist(), pairs.matvecs, pairs.status, pairs.scale)


@dataclass(frozen=True)
class Least:
    """The least eigenvalue lies in [``value`` - ``error``, ``value``], up to ``rounding`` on either side.

    ``value`` is the quadratic form of a unit vector, so an upper bound. The lower end is that of the eigenvalue which
    the search closed in on; that no other is less rests on the search's random start. ``greatest``: the greatest
    eigenvalue where the whole spectrum was taken, else None. ``reached``: the error is as small as wanted.
    """

    value: float
    error: float
    rounding: float
    matvecs: int
    reached: bool
    greatest: float | None = None

    @property
    def lower(self) -> float:
        return self.value - self.error

    @property
    def zero(self) -> bool:
        """Is it zero to rounding?"""
        return abs(self.value) + self.error <= self.rounding


def least(A: Any, wanted: Callable[[float], float], seed: int, most: int = MAX_MATVECS) -> Least:
    """The least eigenvalue with an error of at most wanted(value), or what ``most`` products and rounding allow.

    Tolerances of a search are relative to the largest |eigenvalue|, far above the least one: so it begins with one of
    1e-4 and goes on from its pair with what turns out to be wanted. Where 1e-4 does not do, the whole spectrum of few
    parameters is the cheaper way.
    """
    P = A.shape[0]
    if min(_DENSE_AT_ONCE, most) >= P:
        return _from_spectrum(A, 0)
    best, used, tol = None, 0, 1e-4
    while True:
        found = _search(A, tol, seed, most - used, best)
        used += found.matvecs
        best = found if best is None or found.residuals[0] < best.residuals[0] else best
        value, error, unit = float(best.values[0]), float(best.residuals[0]), _eps(A) * best.scale
        reached = error <= max(wanted(value), unit)
        spent = most - used < _LEAST_PRODUCTS or found.status.startswith("interrupted")
        # Where products are left, their rounding is why a residual stays above its tolerance.
        rounded = not spent and not bool(found.converged[0])
        if reached or rounded or spent:
            rounding = max(_ROUNDING * unit, 2 * error if rounded and not reached else 0.0)
            return Least(value, error, rounding, used, reached)
        if min(_DENSE_AT_MOST, most - used) >= P:
            return _from_spectrum(A, used)
        tol = max(min(wanted(value) / 2, error / 10) / best.scale, _eps(A))


def _search(A: Any, tol: float, seed: int, most: int, start: Eigenpairs | None) -> Eigenpairs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)  # the measure says what became of it
        return eigsh(A, k=1, which="SA", tol=tol, seed=seed, max_matvecs=most, v0=start)


def _from_spectrum(A: Any, used: int) -> Least:
    values, norm = _spectrum(A)
    # Each column is off by the rounding of a product with |A| at most, so the matrix by that of its Frobenius norm.
    rounding = _ROUNDING * _eps(A) * norm
    return Least(float(values[0]), 0.0, rounding, used + len(values), True, float(values[-1]))


def _spectrum(A: Any) -> tuple[Tensor, float]:
    """All eigenvalues, increasing, and the Frobenius norm."""
    dense = A @ torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    values = torch.linalg.eigvalsh((dense + dense.T).double() / 2).cpu()
    return values, float(values.norm())


def _eps(A: Any) -> float:
    return float(torch.finfo(A.dtype).eps)

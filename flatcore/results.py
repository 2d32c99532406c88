"""Results: numbers together with how they were got."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BlockSpectra", "Eigenpairs", "Estimate", "MeasuredError", "Solution"]


@dataclass(frozen=True)
class Eigenpairs:
    """A few eigenpairs of a symmetric (P, P) operator A.

    ``values`` (k,) float64 on the CPU: LM by decreasing absolute value, LA decreasing, SA and BE increasing.
    ``vectors`` (P, k), unit columns in A's dtype on its device, or None if they were not asked for.
    ``residuals`` (k,) = |A v - value v|, from products of their own, not from a bound.
    ``converged`` (k,): residual <= tol * scale, with ``scale`` the largest absolute eigenvalue estimate seen.
    ``matvecs``: products of A with one vector, all included; ``draft_matvecs``: those of the draft. ``storage``,
    ``basis_rows``: where the Krylov basis was kept, and how many vectors. ``status``: "converged", or one sentence that
    says why not. "interrupted ...": residuals are the recurrence's estimates, and there may be fewer than k pairs.
    """

    values: torch.Tensor
    vectors: torch.Tensor | None
    residuals: torch.Tensor
    converged: torch.Tensor
    matvecs: int
    seconds: float
    seed: int
    status: str
    which: str
    tol: float
    scale: float
    block_size: int
    restarts: int
    storage: str = "full"
    basis_rows: int = 0
    draft_matvecs: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number, or a (P,) tensor for a diagonal, with its standard error.

    ``stderr`` is 0 where the value is exact up to rounding, and nan where a single probe gives no spread. Of
    few probes it is enlarged (Student), so that 2 stderr are an interval of 95 %.
    ``matvecs``: products with one vector. ``status``: "converged" or one sentence that says what was not
    reached.
    """

    value: Any
    stderr: Any
    matvecs: int
    by_parameter: Mapping[str, Estimate] | None
    method: str
    seed: int
    seconds: float
    status: str


@dataclass(frozen=True)
class BlockSpectra:
    """Eigenpairs of the diagonal block of every parameter.

    ``by_parameter``: name -> Eigenpairs of that block, whose ``vectors`` (n, k) have the parameter's n
    entries. ``matvecs``: products of A with one vector, in all. ``status``: "converged", or one sentence that
    says which blocks have not.
    """

    by_parameter: Mapping[str, Eigenpairs]
    matvecs: int
    seconds: float
    seed: int
    status: str

    def __getitem__(self, name: str) -> Eigenpairs:
        return self.by_parameter[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_parameter)

    def __len__(self) -> int:
        return len(self.by_parameter)


@dataclass(frozen=True)
class Solution:
    """x with (A + damping I) x = b.

    ``value``: (P,) or (P, K) like b, in A's dtype on its device. ``residuals``: |b - (A + damping I) x| / |b|,
    from products of their own, a float for (P,) and (K,) float64 on the CPU else; 0 where b is 0.
    ``converged``: residual <= tol, a bool or (K,). ``matvecs``: products of A with one vector, all included.
    ``curvature``: the least <v, (A + damping I) v> / <v, v> met, above the least eigenvalue. ``status``:
    "converged", or one sentence that says why not.
    """

    value: torch.Tensor
    residuals: Any
    converged: Any
    matvecs: int
    iterations: int
    seconds: float
    damping: float
    tol: float
    curvature: float
    status: str


@dataclass(frozen=True)
class MeasuredError:
    """How far products with rounded operands, those of B, are from the same operator's in full precision, A.

    ``errors`` (vectors,) float64: |B v - A v| / |A v| for random signs v. ``asymmetry``: an estimate of |B - B^T| / |B|
    in the Frobenius norm from the same products, nan for one vector; in full precision a little is left too.
    ``precision``: what B's operands are rounded to; "full" where B is A. ``matvecs``: products with one vector, half of
    them by A.
    """

    errors: torch.Tensor
    asymmetry: float
    precision: str
    matvecs: int
    seed: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean of the errors over the vectors."""
        return float(self.errors.mean())

    @property
    def max(self) -> float:
        """Largest of the errors."""
        return float(self.errors.max())

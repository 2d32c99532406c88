"""Results: numbers together with how they were got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Eigenpairs", "Estimate"]


@dataclass(frozen=True)
class Eigenpairs:
    """A few eigenpairs of a symmetric (P, P) operator A.

    ``values`` (k,) float64 on the CPU: LM by decreasing absolute value, LA decreasing, SA and BE increasing.
    ``vectors`` (P, k), unit columns in A's dtype on its device, or None if they were not asked for.
    ``residuals`` (k,) = |A v - value v|, from products of their own, not from a bound.
    ``converged`` (k,): residual <= tol * scale, with ``scale`` the largest absolute eigenvalue estimate seen.
    ``matvecs``: products of A with one vector, all included. ``status``: "converged", or one sentence that
    says why not.
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


@dataclass(frozen=True)
class Estimate:
    """A number, or a (P,) tensor for a diagonal, with its standard error.

    ``stderr`` is 0 where the value is exact up to rounding, and nan where a single probe gives no spread.
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

"""The least and the greatest eigenvalue, also of operators too small for a Lanczos recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flatcore.eigsh import eigsh

__all__ = ["Extremes", "extremes"]


@dataclass(frozen=True)
class Extremes:
    """``values``, ``residuals``: increasing; one of each where only the greatest was asked for."""

    values: list[float]
    residuals: list[float]
    matvecs: int
    status: str


def extremes(A: Any, tol: float, seed: int, *, both: bool) -> Extremes:
    """The greatest eigenvalue of A, or both ends, to residuals of tol times the largest |eigenvalue|."""
    P = A.shape[0]
    if P <= 2:
        dense = A @ torch.eye(P, dtype=A.dtype, device=A.device)
        values = torch.linalg.eigvalsh((dense + dense.T).double() / 2).tolist()
        found = [values[0], values[-1]] if both else [values[-1]]
        return Extremes(found, [0.0] * len(found), P, "converged")
    k, which = (2, "BE") if both else (1, "LA")
    pairs = eigsh(A, k=k, which=which, tol=tol, seed=seed, return_eigenvectors=False)
    return Extremes(pairs.values.tolist(), pairs.residuals.tolist(), pairs.matvecs, pairs.status)

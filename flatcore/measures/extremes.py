"""The least and the greatest eigenvalue, also of operators too small for a Lanczos recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from flatcore.eigsh import eigsh

__all__ = ["Extremes", "extremes"]


@dataclass(frozen=True)
class Extremes:
    """``values``, ``residuals``: increasing, one of each end asked for. ``scale``: the largest |eigenvalue| seen."""

    values: list[float]
    residuals: list[float]
    matvecs: int
    status: str
    scale: float


def extremes(A: Any, tol: float, seed: int, which: Literal["LA", "SA", "BE"]) -> Extremes:
    """The greatest eigenvalue of A, the least, or both, to residuals of tol times the largest |eigenvalue|."""
    P = A.shape[0]
    if P <= 2:
        dense = A @ torch.eye(P, dtype=A.dtype, device=A.device)
        values = torch.linalg.eigvalsh((dense + dense.T).double() / 2).tolist()
        found = {"LA": values[-1:], "SA": values[:1], "BE": [values[0], values[-1]]}[which]
        return Extremes(found, [0.0] * len(found), P, "converged", max(map(abs, values)))
    k = 2 if which == "BE" else 1
    pairs = eigsh(A, k=k, which=which, tol=tol, seed=seed, return_eigenvectors=False)
    values, residuals = pairs.values.tolist(), pairs.residuals.tolist()
    return Extremes(values, residuals, pairs.matvecs, pairs.status, pairs.scale)

"""Means of random quadratic forms until they are as certain as asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcore.sampling import BLOCK, LEAST_PROBES, caution, student

__all__ = ["Mean", "mean_of"]


@dataclass(frozen=True)
class Mean:
    """``value``, ``stderr``: (q,) float64. ``samples``: how many. ``reached``: stderr of the sum <= rtol * |sum|.
    ``cheaper``: another way, of ``instead`` samples, was seen to be cheaper."""

    value: Tensor
    stderr: Tensor
    samples: int
    reached: bool
    cheaper: bool = False

    @property
    def total(self) -> float:
        return float(self.value.sum())

    def told(self, what: str, total_error: float, rtol: float) -> str:
        return (
            f"the standard error of the {what} is {total_error:.3g} at {self.total:.3g} after {self.samples} probes, "
            f"above rtol = {rtol:g}; raise max_matvecs or rtol"
        )


def mean_of(
    draw: Callable[[int], Tensor], rtol: float, budget: int, instead: int | None = None
) -> tuple[Mean, float]:
    """The mean of samples (q,) and the standard error of their sum. ``draw(count)`` gives (count, q), float64, CPU.

    Ends where the sum is within rtol, with the margin for few and skewed samples that traces take, where the budget of
    samples is used up, or where ``instead`` samples would be fewer than what is still needed, and within the budget.
    """
    samples = torch.empty(0)
    while True:
        more = draw(min(BLOCK, budget - len(samples)))
        samples = torch.cat([samples, more]) if len(samples) else more
        n, sums = len(samples), samples.sum(1)
        error = _stderr(sums[:, None])[0]
        allowed = rtol * abs(float(sums.mean()))
        reached = n >= LEAST_PROBES and float(error) * caution(n, _skewness(sums)) <= allowed
        needed = n * (float(error) / allowed) ** 2 if allowed else math.inf
        worth = instead is not None and needed - n > instead <= budget - n
        cheaper = worth and not reached and n >= LEAST_PROBES
        if reached or cheaper or n >= budget:
            return Mean(samples.mean(0), _stderr(samples), n, reached, cheaper), float(error)


def _stderr(samples: Tensor) -> Tensor:
    n = len(samples)
    if n < 2:
        return torch.full((samples.shape[1],), math.nan, dtype=samples.dtype)
    return student(n) * samples.std(0) / math.sqrt(n)


def _skewness(sums: Tensor) -> float:
    away = sums - sums.mean()
    squares = float(away.square().mean())
    return float((away**3).mean()) / squares**1.5 if squares > 0 else 0.0

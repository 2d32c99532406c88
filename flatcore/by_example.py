"""Trace and diagonal from sweeps over the examples: probes of each example's own, exact sums over the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from flatcore.linear import LinearView
from flatcore.progress import Bar
from flatcore.sampling import student

__all__ = ["Sampled", "Sweeps", "automatic_sweeps", "rest_of", "sampled", "sweeps_of"]

_PILOT = 2  # probes of the first round, the fewest whose spread is seen
_MOST_PROBES = 64  # of a round
# Predicted work, in products, from which what is known of the whole matrix's products may serve better.
_DEAR = 64


class Sweeps(Protocol):
    """What an operator whose loss is a sum over examples offers (flatcore.example_sweeps)."""

    probed: tuple[str, ...]
    left: tuple[str, ...]


@dataclass
class Sampled:
    """Sums over examples of independent probes: values and variances, in all (entry 0) and for each parameter.

    known: what was got without probes. K: probes so far, each of every example.
    """

    parameters: int
    P: int | None = None  # of a diagonal
    K: int = 0
    known: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    variance: Tensor = field(init=False)
    fourth: Tensor = field(init=False)
    diagonal: Tensor | None = None
    diagonal_variance: Tensor | None = None
    known_diagonal: Tensor | None = None

    def __post_init__(self) -> None:
        zeros = torch.zeros(1 + self.parameters, dtype=torch.float64, device="cpu")
        self.known, self.mean, self.variance, self.fourth = (zeros.clone() for _ in range(4))
        if self.P is not None:
            zeros = torch.zeros(self.P, dtype=torch.float64, device="cpu")
            self.diagonal, self.diagonal_variance, self.known_diagonal = (zeros.clone() for _ in range(3))

    def add(self, samples: Any) -> None:
        """Another round of probes: what was there and what comes count by their numbers."""
        old, new = self.K / (self.K + samples.K), samples.K / (self.K + samples.K)
        self.mean = old * self.mean + new * samples.mean
        self.variance = old**2 * self.variance + new**2 * samples.variance
        self.fourth = old**4 * self.fourth + new**4 * samples.fourth
        if self.diagonal is not None and self.diagonal_variance is not None:
            self.diagonal = old * self.diagonal + new * samples.diagonal
            self.diagonal_variance = (
                old**2 * self.diagonal_variance + new**2 * samples.diagonal_variance
            )
        self.K += samples.K

    @property
    def value(self) -> Tensor:
        return self.known + self.mean

    def stderr(self) -> Tensor:
        """Of each sum: its variance adds up as many as there are examples, of a few probes each (Satterthwaite)."""
        factors = [
            student(1 + _degrees(float(v), float(f))) for v, f in zip(self.variance, self.fourth, strict=True)
        ]
        return self.variance.sqrt() * torch.tensor(factors, dtype=torch.float64, device="cpu")

    def error_and_size(self) -> tuple[float, float]:
        """What is compared: stderr <= rtol * size."""
        if self.diagonal is not None:
            assert self.diagonal_variance is not None and self.known_diagonal is not None
            value = self.diagonal + self.known_diagonal
            return float(self.diagonal_variance.sum().sqrt()), float(value.norm())
        return float(self.stderr()[0]), abs(float(self.value[0]))

    def needed(self, rtol: float) -> float:
        """How many probes in all would reach rtol."""
        error, size = self.error_and_size()
        if error == 0:
            return float(self.K)
        return self.K * (error / (rtol * size)) ** 2 if size else math.inf


def _degrees(variance: float, fourth: float) -> float:
    """Of freedom of a sum of variances, each estimated with one degree, whose squares are on average three times too
    large."""
    return max(1.0, 3 * variance**2 / fourth - 2) if fourth > 0 else math.inf

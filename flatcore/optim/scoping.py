"""Scoping: couplings that grow during training: first a wide neighbourhood is explored, then a narrow one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flatcore.linear import check_count, check_positive

__all__ = ["Scoping", "factor_at"]

Kind = Literal["exponential", "linear", "cosine", "rate"]


@dataclass(frozen=True)
class Scoping:
    """What a coupling is multiplied by after t updates. It is 1 at t = 0, and between there and ``steps``

        "exponential"  factor^(t / steps)            the authors' choice for Replicated-SGD, with factor 1e4
        "linear"       1 + (factor - 1) t / steps
        "cosine"       1 + (factor - 1) (1 - cos(pi t / steps)) / 2
        "rate"         factor^t, for ever            (1 + gamma_1)^t of Chaudhari et al.; ``steps`` is not used

    and factor from then on (but for "rate"). With ``every`` > 1, t is rounded down to a multiple of it: the number of
    batches gives a coupling that changes once an epoch.
    """

    kind: Kind
    factor: float
    steps: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(f"kind: expected one of {known}, got {self.kind!r}")
        check_positive("factor", self.factor, 1e4)
        check_count("steps", self.steps, 1)
        check_count("every", self.every, 1)

    def __call__(self, step: int) -> float:
        t = step - step % self.every
        if self.kind == "rate":
            return float(self.factor**t)
        share = min(t / self.steps, 1.0)
        if self.kind == "exponential":
            return float(self.factor**share)
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return 1 + (self.factor - 1) * share


def factor_at(stored: dict[str, Any] | None, step: int) -> float:
    """Of a Scoping as the fields that a state_dict holds; None is constant."""
    return 1.0 if stored is None else Scoping(**stored)(step)

"""The result that every measure gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Measure"]


@dataclass(frozen=True)
class Measure:
    """A published measure of a minimum, with how it was got.

    ``value``: a float; a float64 tensor where the measure is a curve. ``stderr``: its standard error, 0 where it is
    exact up to rounding, nan where nothing tells. ``by_layer``: module path -> Measure of that layer, or None.
    ``definition``: the formula, in one line. ``matvecs``: products with one vector, all included. ``passes``: further
    passes over the data, forward or forward and backward. ``method``: how the number was got. ``details``: what else
    belongs to this measure, as its docstring says. ``status``: "converged", or one sentence that says what was not
    reached.
    """

    value: Any
    stderr: Any
    by_layer: Mapping[str, Measure] | None
    definition: str
    matvecs: int
    name: str = ""
    passes: int = 0
    method: str = "exact"
    seed: int | None = None
    seconds: float = 0.0
    status: str = "converged"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return float(self.value)

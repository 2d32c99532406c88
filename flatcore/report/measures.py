"""The published measures in a report: each with its cost, and those that do not apply with the reason."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flatcore.errors import CaptureError
from flatcore.measures.catalogue import CATALOGUE
from flatcore.measures.result import Measure
from flatcore.objective import Objective


@dataclass(frozen=True)
class Measured:
    """``measure``: None where it does not apply, for the ``reason``; of value nan where only its layers are known."""

    name: str
    measure: Measure | None
    reason: str
    seconds: float

    @property
    def label(self) -> str:
        return CATALOGUE[self.name].label

    @property
    def meaning(self) -> str:
        return CATALOGUE[self.name].meaning

    @property
    def has_value(self) -> bool:
        return self.measure is not None and not math.isnan(self.measure.value)


def measured(
    objective: Objective, names: Sequence[str], seed: int, say: Callable[[str], None]
) -> tuple[Measured, ...]:
    return tuple(_one(objective, name, seed, say) for name in names)


def _one(objective: Objective, name: str, seed: int, say: Callable[[str], None]) -> Measured:
    say(CATALOGUE[name].label)
    began = time.perf_counter()
    found, reason = None, ""
    try:
        found = CATALOGUE[name].call(objective, seed)
    except (ValueError, TypeError, RuntimeError, CaptureError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    else:
        if math.isnan(found.value):
            reason = found.status if found.status != "converged" else "its value is not a number"
    return Measured(name, found, reason, time.perf_counter() - began)


def document(measured: Measured) -> dict[str, Any]:
    """As plain numbers."""
    result: dict[str, Any] = {"label": measured.label, "meaning": measured.meaning, "reason": measured.reason}
    result["seconds"] = measured.seconds
    if measured.measure is None:
        return result | {"value": None, "stderr": None}
    return result | _numbers(measured.measure)


def _numbers(measure: Measure) -> dict[str, Any]:
    names = ("value", "stderr", "definition", "matvecs", "passes", "method", "seed", "status")
    result = {name: getattr(measure, name) for name in names}
    result["by_layer"] = {
        path: {"value": float(m.value), "stderr": float(m.stderr)}
        for path, m in (measure.by_layer or {}).items()
    }
    if "curve" in measure.details:
        keys = {"sigma": "sigma", "value": "curve", "stderr": "curve_stderr"}
        result["curve"] = {name: measure.details[key].tolist() for name, key in keys.items()}
    return result

"""The measures of several reports side by side, as rows for table and page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flatcore.measures.result import Measure
from flatcore.report.compute import Report
from flatcore.report.measures import Measured
from flatcore.report.numbers import count, seconds, with_error
from flatcore.results import Estimate

BarCell = tuple[str, float, float]
"""Text, and the lengths of the bar and of one standard error in percent of the longest."""


@dataclass(frozen=True)
class MeasureRow:
    """``cells``, ``costs``: of each report. ``notes``: why it has none, or what was not reached, one sentence each."""

    label: str
    meaning: str
    cells: tuple[str, ...]
    costs: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LayerRows:
    """(layer, a cell for each report) of one measure."""

    label: str
    rows: tuple[tuple[str, tuple[BarCell, ...]], ...]


def longest_bar(parts: Iterable[Measure | Estimate]) -> float:
    """The greatest value with its error bar, which is to be 100 percent."""
    return max((float(part.value) + _error(part) for part in parts), default=0.0)


def bar_cell(part: Measure | Estimate | None, longest: float) -> BarCell:
    """No bar for what is negative."""
    if part is None:
        return "–", 0.0, 0.0
    value, percent = float(part.value), 100 / longest if longest > 0 else 0.0
    length = max(percent * value, 0.0)
    return with_error(value, float(part.stderr)), length, min(percent * _error(part), length)


def _error(part: Measure | Estimate) -> float:
    return 0.0 if math.isnan(part.stderr) else float(part.stderr)


def measure_rows(reports: tuple[Report, ...]) -> list[MeasureRow]:
    """A row for each measure that any report asked for, in the order of the first that did."""
    return [
        MeasureRow(
            first.label,
            first.meaning,
            tuple(_cell(m) for m in found),
            tuple(_cost(m) for m in found),
            _notes(reports, found),
        )
        for first, found in _by_name(reports)
    ]


def layer_rows(reports: tuple[Report, ...]) -> list[LayerRows]:
    """For each measure that has a value for every layer; of the width these are the layers' gains."""
    result = []
    for first, found in _by_name(reports):
        parts = [dict(m.measure.by_layer or {}) if m and m.measure else {} for m in found]
        paths = list(dict.fromkeys(path for part in parts for path in part))
        longest = longest_bar(m for part in parts for m in part.values())
        rows = tuple((path, tuple(bar_cell(part.get(path), longest) for part in parts)) for path in paths)
        if rows:
            label = "gain, the largest singular value" if first.name == "width" else first.label
            result.append(LayerRows(label.removesuffix(", last layer"), rows))
    return result


def _by_name(reports: tuple[Report, ...]) -> Iterator[tuple[Measured, list[Measured | None]]]:
    found = [{m.name: m for m in report.measures} for report in reports]
    for name in dict.fromkeys(name for part in found for name in part):
        each = [part.get(name) for part in found]
        yield next(m for m in each if m is not None), each


def _cell(measured: Measured | None) -> str:
    if measured is None or measured.measure is None or not measured.has_value:
        return "–"
    return with_error(float(measured.measure.value), float(measured.measure.stderr))


def _cost(measured: Measured | None) -> str:
    """ "12 products, 2 passes, 40 ms", or nothing where nothing was computed."""
    if measured is None or measured.measure is None:
        return ""
    numbers = ((measured.measure.matvecs, "product"), (measured.measure.passes, "pass"))
    parts = [
        f"{count(n)} {what}{'' if n == 1 else 'es' if what == 'pass' else 's'}" for n, what in numbers if n
    ]
    return ", ".join([*parts, seconds(measured.seconds)])


def _notes(reports: tuple[Report, ...], found: list[Measured | None]) -> tuple[str, ...]:
    """Said once where it is the same of all reports."""
    notes: dict[str, list[str]] = {}
    for report, measured in zip(reports, found, strict=True):
        if measured is None:
            continue
        status = measured.measure.status if measured.measure is not None else "converged"
        if measured.reason:
            notes.setdefault(f"does not apply: {measured.reason}", []).append(report.name)
        elif status != "converged":
            notes.setdefault(status, []).append(report.name)
    return tuple(
        text if len(names) == len(reports) else f"{', '.join(names)}: {text}" for text, names in notes.items()
    )

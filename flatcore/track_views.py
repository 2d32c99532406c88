"""What was followed during training, as a table and as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flatcore.report.numbers import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["plot", "table"]

_COSTS = ("products", "seconds", "status")


def table(columns: dict[str, list[Any]]) -> Table:
    """One row for each measurement; errors stand below their values. Thresholds and times are in the history."""
    from rich.table import Table

    result = Table(title="Curvature during training", title_justify="left", box=None, padding=(0, 1))
    shown = [name for name in _shown(columns) if name != "threshold"]
    for name in ("step", *shown, "products"):
        result.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for index, step in enumerate(columns.get("step", ())):
        cells = [_cell(columns[name][index], columns.get(f"{name}_error"), index) for name in shown]
        result.add_row(str(step), *cells, str(columns["products"][index]))
    return result


def plot(columns: dict[str, list[Any]]) -> Figure:
    """A panel for each number; bars of one standard error; a dashed line where the edge is reached."""
    from matplotlib.figure import Figure

    names = [name for name in _shown(columns) if name != "threshold"]
    if not names:
        raise ValueError("history: expected at least one measurement to draw, got none; call step() first")
    figure = Figure(figsize=(3.6 * min(3, len(names)), 2.7 * math.ceil(len(names) / 3)), layout="constrained")
    axes = figure.subplots(math.ceil(len(names) / 3), min(3, len(names)), squeeze=False)
    steps = columns["step"]
    panels = list(axes.flat)
    for ax, name in zip(panels, names, strict=False):
        errors = columns.get(f"{name}_error")
        bars = None if errors is None else [0.0 if math.isnan(e) else e for e in errors]
        ax.errorbar(steps, columns[name], bars, marker=".", markersize=4, linewidth=1.2)
        if name == "edge":
            ax.axhline(1.0, color="0.5", linestyle="--", linewidth=1)
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel("step")
    for ax in panels[len(names) :]:
        ax.set_visible(False)
    return figure


def _shown(columns: dict[str, list[Any]]) -> list[str]:
    return [n for n in columns if n not in ("step", *_COSTS) and not n.endswith("_error")]


def _cell(value: float, errors: list[float] | None, index: int) -> str:
    if math.isnan(value):
        return "–"
    error = math.nan if errors is None else errors[index]
    return f"{plain(value)}\n±{plain(error, 2)}" if error > 0 else plain(value)

"""A benchmark's results as a table, a figure and JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from flatcore.bench.candidates import FLATCORE
from flatcore.bench.ceilings import Ceilings
from flatcore.bench.compare import Comparison
from flatcore.bench.setting import Setting
from flatcore.machine import describe

_NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton"}
SCHEMA = "flatcore-bench/1"
_COLOURS = {FLATCORE: "#c0392b", "torch": "#4c72b0", "jax": "#dd8452", "peer": "#999999"}
_KINDS = {"torch": "bare torch", "jax": "jax", "peer": "other packages"}
_OPPONENTS = {
    "torch": "the best bare-torch way",
    "jax": "the best jax way",
    "peer": "the best other package",
}


def table(result: Comparison, ceilings: Ceilings) -> Group:
    """One row per way, fastest first.

    ms/vector: the median; spread: half the range over the median; grads: in gradients by autograd; GEMM: share of the
    measured matrix-product rate; MB: peak memory, - if not known; error: relative, against float64; ratio: to
    flatcore's time.
    """
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("way", no_wrap=True)
    for column in ("ms/vector", "spread", "grads", "GEMM", "MB", "error", "ratio"):
        shown.add_column(column, justify="right", no_wrap=True)
    ours = result.timing(FLATCORE).median
    for timing in result.timings:
        name = timing.way
        shown.add_row(
            f"[bold]{name}[/bold]" if timing.kind == FLATCORE else name,
            _ms(timing.median),
            f"{50 * (max(timing.seconds) - min(timing.seconds)) / timing.median:.0f} %",
            f"{timing.median / result.gradient:.2f}",
            f"{100 * result.flops / timing.median / ceilings.gemm:.0f} %",
            "-" if timing.peak_bytes is None else _three(timing.peak_bytes / 1e6),
            f"{timing.error:.0e}",
            "" if timing.kind == FLATCORE else f"{timing.median / ours:.2f}",
        )
    return Group(
        f"\n{_title(result)}, P = {result.parameters:,}",
        shown,
        f"one gradient {_ms(result.gradient)} ms; floor {_ms(result.floor)} ms per vector",
    )


def summary(results: Iterable[Comparison]) -> list[str]:
    """Geometric means of flatcore's advantage over the workloads, one line per K and opponent."""
    lines = []
    listed = list(results)
    for K in sorted({r.K for r in listed}):
        of_K = [r for r in listed if r.K == K]
        for kind, title in _OPPONENTS.items():
            ratios = [
                best.median / r.timing(FLATCORE).median for r in of_K if (best := r.best(kind)) is not None
            ]
            if ratios:
                lines.append(
                    f"K = {K}: against {title} {statistics.geometric_mean(ratios):.2f}x "
                    f"(geometric mean of {len(ratios)}; least {min(ratios):.2f}x)"
                )
        floors = [r.timing(FLATCORE).median / r.floor for r in of_K]
        lines.append(f"K = {K}: {statistics.geometric_mean(floors):.2f}x the floor")
    return lines


def document(results: Iterable[Comparison], setting: Setting, ceilings: Ceilings) -> dict[str, Any]:
    """{"schema", "machine", "setting", "ceilings", "comparisons": [...]}, seconds and bytes."""
    return {
        "schema": SCHEMA,
        "machine": dataclasses.asdict(describe()),
        "setting": dataclasses.asdict(setting),
        "ceilings": dataclasses.asdict(ceilings),
        "comparisons": [dataclasses.asdict(r) for r in results],
    }


def figure(results: Iterable[Comparison], path: Path) -> None:
    """Seconds per vector of every way, one panel per workload and K, on a logarithmic axis; the floor as a line."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    listed = list(results)
    columns = min(len(listed), 3)
    rows = math.ceil(len(listed) / columns)
    drawing = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    panels = drawing.subplots(rows, columns, squeeze=False).flat
    for panel, result in zip(panels, listed, strict=False):
        ordered = result.timings[::-1]
        panel.barh(
            [t.way for t in ordered],
            [t.median * 1e3 for t in ordered],
            color=[_COLOURS[t.kind] for t in ordered],
        )
        panel.axvline(result.floor * 1e3, color="black", linewidth=1, linestyle="--")
        panel.set_xscale("log")
        panel.set_title(_title(result), fontsize=9)
        panel.set_xlabel("ms per vector; dashed: floor", fontsize=8)
        panel.tick_params(labelsize=8)
        shown = {t.kind: _KINDS[t.kind] for t in result.timings if t.kind != FLATCORE}
        keys = [Patch(color=_COLOURS[kind], label=label) for kind, label in shown.items()]
        panel.legend(handles=keys, fontsize=7, loc="upper right")
    for panel in list(panels)[len(listed) :]:
        panel.set_visible(False)
    drawing.savefig(path)


def _title(result: Comparison) -> str:
    precision = result.setting.precision
    rounded = "" if precision == "full" else f", flatcore in {precision}"
    return f"{_NAMES[result.setting.operator]} of {result.title}: K = {result.K}{rounded}"


def _ms(seconds: float) -> str:
    return _three(seconds * 1e3)


def _three(number: float) -> str:
    """Three digits or more, never a power of ten."""
    return f"{number:#.3g}".rstrip(".") if number < 999.5 else f"{number:.0f}"

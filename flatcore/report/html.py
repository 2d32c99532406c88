"""A report as one page that stands by itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import torch

from flatcore.report.compute import Report
from flatcore.report.energy_chart import energy_chart
from flatcore.report.figures import Curve, density_chart
from flatcore.report.measure_rows import BarCell, bar_cell, layer_rows, longest_bar, measure_rows
from flatcore.report.numbers import count, percent, plain, seconds, with_error
from flatcore.report.rows import disagreement, eigenvalue, rows
from flatcore.report.trace_methods import called, explained
from flatcore.results import Eigenpairs, Estimate

_COLOURS = 6  # series of the style sheet


def page(reports: tuple[Report, ...]) -> str:
    """The page's text, UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"seconds": seconds, "count": count, "minus": _minus, "percent": percent}
    return environment.get_template("page.html").render(
        reports=reports,
        first=reports[0],
        names=[report.name for report in reports],
        summary=_summary(reports),
        groups=[(name, list(members)) for name, members in groupby(rows(reports), key=lambda row: row.group)],
        overlaid=_chart([_curve(r, i) for i, r in enumerate(reports)]) if len(reports) > 1 else "",
        charts=[_chart([_curve(r, i, marked=True)]) for i, r in enumerate(reports)],
        eigenvalues=_eigenvalue_rows(reports),
        parameters=_parameter_rows(reports),
        measures=measure_rows(reports),
        layers=layer_rows(reports),
        energies=_energies(reports),
        stages=[_stage_rows(r) for r in reports],
        disagreements=[disagreement(r) for r in reports],
        trace_methods=explained(reports),
        loop_methods=_other_methods(reports),
        warnings=[(r.name, what, status) for r in reports for what, status in _statuses(r)],
        density_width="1/200 of the range shown",
        colours=_COLOURS,
    )


def _chart(curves: Sequence[Curve]) -> Any:
    from markupsafe import Markup

    return Markup(density_chart(curves))


def _energies(reports: tuple[Report, ...]) -> Any:
    """The local energies of all reports that have one, or nothing."""
    from markupsafe import Markup

    curves = [
        (report.name, m.measure, index % _COLOURS)
        for index, report in enumerate(reports)
        for m in report.measures
        if m.name == "local_energy" and m.measure is not None and m.has_value
    ]
    return Markup(energy_chart(curves)) if curves else ""


def _curve(report: Report, index: int, marked: bool = False) -> Curve:
    marks = (*report.top.values.tolist(), *report.bottom.values.tolist()) if marked else ()
    return Curve(report.name, report.density, index % _COLOURS, marks)


def _summary(reports: tuple[Report, ...]) -> str:
    """One sentence that says the result."""
    if len(reports) == 1:
        only = reports[0]
        return (
            f"The trace of the Hessian is {with_error(only.trace.value, only.trace.stderr)}, its largest eigenvalue "
            f"{plain(float(only.top.values[0]))}, its smallest {plain(float(only.bottom.values[0]))}."
        )
    flattest, sharpest = (choose(reports, key=lambda r: r.trace.value) for choose in (min, max))
    if flattest.trace.value <= 0:
        return f"{flattest.name} has the smallest trace, {sharpest.name} the largest."
    traces = sharpest.trace.value / flattest.trace.value
    tops = float(sharpest.top.values[0] / flattest.top.values[0])
    return (
        f"The Hessian at {sharpest.name} has {plain(traces, 2)} times the trace of the one at {flattest.name}, and "
        f"{plain(tops, 2)} times its largest eigenvalue."
    )


def _eigenvalue_rows(reports: tuple[Report, ...]) -> list[tuple[str, list[tuple[str, float]]]]:
    """(label, per report: text and length in percent), the largest of all being 100."""
    longest = max(float(report.top.values.abs().max()) for report in reports) or 1.0
    result = []
    for index in range(max(len(report.top.values) for report in reports)):
        cells = [
            (eigenvalue(r, index), max(100 * float(r.top.values[index]) / longest, 0.0))
            if index < len(r.top.values)
            else ("–", 0.0)
            for r in reports
        ]
        result.append((str(index + 1), cells))
    return result


def _parameter_rows(reports: tuple[Report, ...]) -> list[tuple[str, list[BarCell]]]:
    """The same for the trace's share in every parameter, in the model's order."""
    parts = [dict(report.trace.by_parameter or {}) for report in reports]
    names = list(dict.fromkeys(name for part in parts for name in part))
    longest = longest_bar(e for part in parts for e in part.values())
    return [(name, [bar_cell(part.get(name), longest) for part in parts]) for name in names]


def _stage_rows(report: Report) -> list[tuple[str, int, float, float | None]]:
    """(stage, products, seconds, seconds through the autograd loop)."""
    other = report.autograd.stages if report.autograd else [(None, None, None)] * len(report.curvature.stages)
    return [
        (name, n, s, theirs[2]) for (name, n, s), theirs in zip(report.curvature.stages, other, strict=True)
    ]


def _other_methods(reports: tuple[Report, ...]) -> list[str]:
    """What the autograd loops' traces were got by, where flatcore's were got in another way."""
    pairs = [(r.autograd.trace.method, r.trace.method) for r in reports if r.autograd is not None]
    return [called(method) for method in dict.fromkeys(loop for loop, own in pairs if loop != own)]


def _statuses(report: Report) -> list[tuple[str, str]]:
    """What did not come out as asked."""
    parts: dict[str, Estimate | Eigenpairs] = {
        "trace": report.trace,
        "largest eigenvalues": report.top,
        "smallest eigenvalue": report.bottom,
    }
    found = [(what, part.status) for what, part in parts.items() if part.status != "converged"]
    if report.density.status != "converged":
        found.append(("spectral density", report.density.status))
    if not torch.isfinite(report.top.values).all():
        found.append(("largest eigenvalues", "not finite"))
    return found


def _minus(text: str) -> str:
    return text.replace("-", "−")

"""A report's rows, shared by table and page: what is compared, how it is defined, and each report's cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from flatcore.memory import readable
from flatcore.report.compute import Report
from flatcore.report.numbers import count, percent, plain, seconds, with_error


@dataclass(frozen=True)
class Row:
    group: str
    label: str
    meaning: str
    cells: tuple[str, ...]


def rows(reports: tuple[Report, ...]) -> Iterator[Row]:
    """Rows that no report has anything for are left out."""
    for group, label, meaning, cell in _ROWS:
        cells = tuple(cell(report) for report in reports)
        if any(cells):
            yield Row(group, label, meaning, tuple(text or "–" for text in cells))


def eigenvalue(report: Report, index: int, end: str = "top") -> str:
    """value ± residual, marked where it has not converged."""
    pairs = report.top if end == "top" else report.bottom
    mark = "" if pairs.converged[index] else " not converged"
    return with_error(float(pairs.values[index]), float(pairs.residuals[index])) + mark


def disagreement(report: Report) -> tuple[float, float] | None:
    """Differences from the autograd loop: of the traces / |trace|, of the eigenvalues / the largest of them."""
    if report.autograd is None:
        return None
    mine, other = report.curvature, report.autograd
    values = torch.cat([mine.top.values, mine.bottom.values])
    others = torch.cat([other.top.values, other.bottom.values])
    return _relative(mine.trace.value - other.trace.value, mine.trace.value), _relative(
        float((values - others).abs().max()), float(values.abs().max())
    )


def _relative(difference: float, scale: float) -> float:
    return abs(difference) / abs(scale) if scale else abs(difference)


def _trace(report: Report) -> str:
    text = with_error(report.trace.value, report.trace.stderr)
    return text if report.trace.status == "converged" else f"{text}, rtol not reached"


def _accuracy(share: float | None) -> str:
    return "" if share is None else percent(share)


def _agreement(report: Report) -> str:
    found = disagreement(report)
    return "" if found is None else ", ".join(f"{x:.0e}" if x else "none" for x in found)


_ROWS: tuple[tuple[str, str, str, Callable[[Report], str]], ...] = (
    ("fit", "training loss", "mean over the training examples", lambda r: plain(r.training.loss)),
    (
        "fit",
        "training accuracy",
        "share of examples classified right",
        lambda r: _accuracy(r.training.accuracy),
    ),
    (
        "fit",
        "test loss",
        "mean over examples kept out of training",
        lambda r: plain(r.test.loss) if r.test else "",
    ),
    ("fit", "test accuracy", "of the same examples", lambda r: _accuracy(r.test.accuracy) if r.test else ""),
    ("curvature", "trace of H", "sum of all eigenvalues, ± one standard error", _trace),
    (
        "curvature",
        "largest eigenvalue",
        "steepest curvature of the loss, ± residual",
        lambda r: eigenvalue(r, 0),
    ),
    (
        "curvature",
        "smallest eigenvalue",
        "below zero: not a minimum along some direction, ± residual",
        lambda r: eigenvalue(r, 0, "bottom"),
    ),
    ("size", "parameters", "rows of H", lambda r: count(r.parameters)),
    ("size", "training examples", "that H is the mean over", lambda r: count(r.examples)),
    (
        "cost",
        "products",
        "of H with one vector, for trace, eigenvalues and density",
        lambda r: count(r.products),
    ),
    ("cost", "time", "for the same, capturing the model included", lambda r: seconds(r.seconds)),
    (
        "cost",
        "time, measures",
        "for the published measures",
        lambda r: seconds(sum(m.seconds for m in r.measures)) if r.measures else "",
    ),
    (
        "cost",
        "products, autograd loop",
        "the same numbers and seed over it",
        lambda r: count(r.autograd.products) if r.autograd else "",
    ),
    (
        "cost",
        "time, autograd loop",
        "one vector at a time, graph of the gradient kept",
        lambda r: seconds(r.autograd.seconds) if r.autograd else "",
    ),
    ("cost", "relative difference", "of the two traces, of the two sets of eigenvalues", _agreement),
    ("cost", "native share", "of the arithmetic, in flatcore's engine", lambda r: percent(r.native_fraction)),
    ("cost", "memory", "planned for the buffers of the widest product", lambda r: readable(r.peak_bytes)),
)

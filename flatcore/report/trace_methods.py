"""How a trace was got, in words: the page says what was done, not what might have been."""

from __future__ import annotations

from flatcore.report.compute import Report
from flatcore.report.numbers import percent

__all__ = ["called", "explained"]

_HOW = {
    "exact": "Exact up to rounding, without random vectors.",
    "example": "The mean of Σₙ vₙᵀHₙvₙ, with Hₙ the share of training example n in H and random signs vₙ of each "
    "example’s own",
    "ggn+example": "The Gauss-Newton part G of H exactly, and of the rest H − G = Σₙ Rₙ over the training examples the "
    "mean of Σₙ vₙᵀRₙvₙ, with random signs vₙ of each example’s own",
    "hutchinson": "The mean of vᵀH v over vectors v of random signs (Hutchinson)",
    "hutch++": "Exact on a sketch of H’s range, and of the rest the mean of vᵀH v over vectors v of random signs "
    "(Hutch++)",
    "xtrace": "From one set of random vectors and their products, each estimated with the others as a sketch of H’s "
    "range (XTrace)",
}
_NAMES = {
    "exact": "exact sums",
    "example": "probes of each example’s own",
    "ggn+example": "the exact Gauss-Newton part and probes of each example’s own",
    "hutchinson": "Hutchinson’s estimator",
    "hutch++": "Hutch++",
    "xtrace": "XTrace",
}


def called(method: str) -> str:
    return _NAMES.get(method, method)


def explained(reports: tuple[Report, ...]) -> list[tuple[str, str]]:
    """(names of reports, one sentence): each method once; no names where one is that of all."""
    by_method: dict[str, list[str]] = {}
    for report in reports:
        by_method.setdefault(_sentence(report), []).append(report.name)
    return [("" if len(by_method) == 1 else ", ".join(names), text) for text, names in by_method.items()]


def _sentence(report: Report) -> str:
    method = report.trace.method
    if method == "exact":
        return _HOW[method]
    return (
        f"{_HOW.get(method, f'By {method}')}; the standard error asked for was {percent(report.rtol)} of it."
    )

"""A report as a table for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flatcore.report.compute import Report
from flatcore.report.measure_rows import measure_rows
from flatcore.report.rows import eigenvalue, rows


def tables(reports: tuple[Report, ...]) -> Group:
    """The Hessian's numbers, and below them the measures."""
    parts = [table(reports)]
    if any(report.measures for report in reports):
        parts.append(measures_table(reports))
    return Group(*parts)


def measures_table(reports: tuple[Report, ...]) -> Table:
    """One row for each measure: of each report value, error and cost, then what it means and why it is missing."""
    result = Table(title="Measures of flatness", title_justify="left")
    result.add_column("")
    for report in reports:
        result.add_column(escape(report.name), justify="right")
    result.add_column("meaning", style="dim")
    for row in measure_rows(reports):
        cells = [f"{cell}\n[dim]{cost}[/]" for cell, cost in zip(row.cells, row.costs, strict=True)]
        result.add_row(row.label, *cells, escape("\n".join((row.meaning, *row.notes))))
    return result


def table(reports: tuple[Report, ...]) -> Table:
    """One column per report, the rows grouped, the further eigenvalues below the first."""
    result = Table(
        title="Hessian H of the mean training loss",
        title_justify="left",
        caption="± one standard error for the trace, the residual |H v - λ v| for an eigenvalue λ",
        caption_justify="left",
    )
    result.add_column("")
    for report in reports:
        result.add_column(escape(report.name), justify="right")
    group = ""
    for row in rows(reports):
        if group and row.group != group:
            result.add_section()
        group = row.group
        result.add_row(row.label, *row.cells)
        if row.label == "largest eigenvalue":
            for index in range(1, max(len(report.top.values) for report in reports)):
                cells = [eigenvalue(r, index) if index < len(r.top.values) else "–" for r in reports]
                result.add_row(f"  number {index + 1}", *cells)
    return result

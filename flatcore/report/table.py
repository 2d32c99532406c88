"""A report as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from flatcore.report.compute import Report
from flatcore.report.rows import eigenvalue, rows


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
        result.add_column(report.name, justify="right")
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

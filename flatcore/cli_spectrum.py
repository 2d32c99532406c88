"""What `flatcore spectrum` shows: a table of eigenvalues, a picture of the density."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from flatcore.density import Density
from flatcore.report.numbers import with_error
from flatcore.results import Eigenpairs

__all__ = ["draw", "eigenvalue_table", "of_subject"]


def eigenvalue_table(pairs: Eigenpairs) -> Table:
    table = Table("eigenvalue ± residual", "converged")
    for column in table.columns:
        column.justify = "right"
    for value, residual, converged in zip(pairs.values, pairs.residuals, pairs.converged, strict=True):
        table.add_row(with_error(float(value), float(residual)), "yes" if converged else "no")
    return table


def of_subject(picture: Path, name: str) -> Path:
    """A file of its own beside ``picture``, whatever characters the name has."""
    plain = name.replace("%", "%25").replace("/", "%2F")
    return picture.with_stem(f"{picture.stem}-{plain}")


def draw(density: Density, title: str, path: Path) -> None:
    """Into a folder that is made where it is missing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    density.plot(figure.subplots()).set_title(title, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

"""The picture of a spectral density: logarithmic upwards, single eigenvalues ticked, the zeros said in words.

As in Ghorbani, Krishnan and Xiao, "An investigation into neural net optimization via Hessian eigenvalue density"
(2019), with the atom at zero taken out, which would otherwise hide what is close to it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flatcore.density import Density

__all__ = ["plot"]

_POINTS = 1001


def plot(density: Density, ax: Axes | None, log: bool) -> Axes:
    """Draws into ``ax`` or new axes and returns them. ``log``: against log10 |eigenvalue|, one curve for each sign."""
    if ax is None:
        from matplotlib import pyplot

        _, ax = pyplot.subplots()
    (_decades if log else _linear)(density, ax)
    atom = density.atom
    if atom.share > 0:
        open_ = (
            ""
            if atom.resolved
            else f", quadrature leaves {100 * atom.low:.3g} to {100 * atom.high:.3g} % open"
        )
        ax.plot(
            [],
            [],
            " ",
            label=f"{100 * atom.share:.3g} ± {100 * atom.stderr:.2g} % at zero (|λ| ≤ {atom.radius:.1g}{open_})",
        )
    ax.legend(fontsize="small", frameon=False)
    return ax


def _linear(density: Density, ax: Axes) -> None:
    low, high = density.range
    width = (high - low) / 200 or 1e-3 * (abs(high) or 1.0)
    grid = np.linspace(low - 5 * width, high + 5 * width, _POINTS)
    one = 1 / (density.dimension * width * math.sqrt(2 * math.pi))
    _curve(density, ax, grid, width, False, one / 10, "eigenvalues other than zero")
    ax.axhline(one, color="0.6", linewidth=0.8, linestyle="--", label="height of a single eigenvalue")
    if density.atom.share > 0:
        ax.axvline(0, color="0.3", linewidth=1.2, linestyle=":")
    marks = density.isolated(width)
    if len(marks):
        # On the axis itself, in its own coordinates upwards.
        ax.plot(
            marks,
            np.full(len(marks), 0.02),
            "|",
            color="C3",
            markersize=10,
            transform=ax.get_xaxis_transform(),
            label=f"{len(marks)} isolated",
        )
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")


def _decades(density: Density, ax: Axes) -> None:
    width = 0.1
    one = 1 / (density.dimension * width * math.sqrt(2 * math.pi))
    for sign, name in ((1, "positive"), (-1, "negative")):
        sizes = (sign * density.nodes)[density.weights > 0]
        sizes = sizes[sizes > density.zero]
        if not len(sizes):
            continue
        ends = np.log10(sizes.min()) - 5 * width, np.log10(sizes.max()) + 5 * width
        grid = sign * np.logspace(*ends, _POINTS)
        _curve(density, ax, grid, width, True, one / 10, f"{name} eigenvalues")
    ax.axhline(one, color="0.6", linewidth=0.8, linestyle="--", label="height of a single eigenvalue")
    ax.set_xscale("log")
    ax.set_xlabel("|eigenvalue|")
    ax.set_ylabel("density per decade")


def _curve(
    density: Density, ax: Axes, grid: np.ndarray, width: float, log: bool, floor: float, name: str
) -> None:
    """The curve and its 95 % band, cut off at ``floor``, below which there is less than an eigenvalue."""
    value, _ = density.pdf(grid, width, atom=False, log=log)
    lower, upper = density.pdf_band(grid, width, atom=False, log=log)
    (line,) = ax.semilogy(np.abs(grid) if log else grid, np.maximum(value, floor), label=name)
    # A band that is open above ends where the picture does.
    top = 10 * float(value.max()) if value.max() > 0 else 10 * floor
    ax.fill_between(
        np.abs(grid) if log else grid,
        np.clip(lower, floor, top),
        np.clip(upper, floor, top),
        alpha=0.3,
        color=line.get_color(),
        linewidth=0,
    )
    ax.set_ylim(bottom=floor)

"""The picture of `width`: gains of the layers, and the angles between singular vectors of consecutive ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatcore.measures.result import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_width"]


def plot_width(measure: Measure) -> Figure:
    """A new figure: left each layer's singular values, right for each pair |<u_i, v_j>| of the one's leading left and
    the next one's leading right singular vectors, where a bright corner is what Mulayoff and Michaeli call
    coupling."""
    if measure.name != "width":
        raise ValueError(
            f"measure: expected the result of width, got that of {measure.name or 'something else'!r}"
        )
    from matplotlib.figure import Figure

    pairs = [c for c in measure.details["couplings"] if c.cosines is not None]
    figure = Figure(figsize=(4.5 + 2.6 * len(pairs), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(pairs), squeeze=False, width_ratios=[1.6] + [1] * len(pairs))[0]
    for gain in measure.details["layers"]:
        values = gain.singular_values
        axes[0].semilogy(
            range(1, len(values) + 1), values.clamp_min(1e-12 * gain.spectral), ".-", label=gain.path
        )
    axes[0].set_xlabel("number")
    axes[0].set_ylabel("singular value")
    axes[0].legend(fontsize="small", frameon=False)
    for ax, pair in zip(axes[1:], pairs, strict=True):
        rows, columns = pair.cosines.shape
        image = ax.imshow(
            pair.cosines, vmin=0, vmax=1, cmap="viridis", extent=(0.5, columns + 0.5, rows + 0.5, 0.5)
        )
        ax.locator_params(integer=True)
        ax.set_title(f"{pair.first} → {pair.second}\nchance {pair.chance:.2f}", fontsize="small")
        ax.set_xlabel("right singular vector")
    if pairs:
        axes[1].set_ylabel("left singular vector")
        figure.colorbar(image, ax=list(axes[1:]), label="|cosine|", shrink=0.8)
    return figure

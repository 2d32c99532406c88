"""The figure of `measures_study.py`, from its JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

NETS, COPIES, CHANCE = "tab:blue", "tab:orange", "0.9"


def draw(report: dict[str, Any], path: Path) -> None:
    rows = sorted(report["measures"].values(), key=lambda row: row["loss"]["tau"])
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(rows)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2.2))
    taus(left, rows, "loss")
    taus(middle, rows, "error")
    factors(right, rows)
    left.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize="small")
    for label, row in zip(left.get_yticklabels(), rows, strict=True):
        label.set_style("italic" if row["invariant"] is None else "normal")
        label.set_weight("bold" if row["invariant"] else "normal")
    left.set_ylim(-0.7, len(rows) - 0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(
        "bold: invariant to the scale of neurons; italic: no measure of flatness, to compare with",
        fontsize="small",
    )
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def taus(ax: Axes, rows: list[dict[str, Any]], gap: str) -> None:
    for y, row in enumerate(rows):
        chance = row[gap]["chance"]
        ax.barh(
            y, 2 * chance, left=-chance, height=0.8, color=CHANCE, label="" if y else "95 % of random orders"
        )
        for which, colour, shift, name in (
            (gap, NETS, 0.15, "nets, with 95 % interval"),
            (f"copied_{gap}", COPIES, -0.2, "rescaled copies of them"),
        ):
            found = row[which]
            ax.plot([found["low"], found["high"]], [y + shift] * 2, color=colour, linewidth=1.2)
            ax.plot(found["tau"], y + shift, "o", color=colour, markersize=4, label="" if y else name)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_xlim(-1, 1)
    ax.set_xticks([-0.5, 0, 0.5])
    ax.set_xlabel(f"Kendall's tau with the {gap} gap")


def factors(ax: Axes, rows: list[dict[str, Any]]) -> None:
    ax.set_xscale("log")
    for y, row in enumerate(rows):
        ax.plot(
            row["spread"] or math.nan,
            y + 0.15,
            "|",
            color=NETS,
            markersize=8,
            label="" if y else "between nets",
        )
        ax.plot(
            row["factor"] or math.nan,
            y - 0.2,
            "o",
            color=COPIES,
            markersize=4,
            label="" if y else "net and its copy",
        )
    ax.axvline(1, color="0.5", linewidth=0.8)
    ax.set_xlabel("largest factor")
    ax.legend(fontsize="small", loc="upper right")

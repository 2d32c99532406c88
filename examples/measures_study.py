"""Which measures of flatness rank the generalisation gaps of nets, and which still do when the nets are rescaled?

    python examples/measures_study.py [--out FOLDER] [--repeats 4]

Trains ReLU nets on 100 handwritten digits, one for each batch size, learning rate and weight decay, to one training
loss, and tests them on the other 1 697. Then every measure is asked which nets have the larger gap, test minus
training, of the loss and of the error: Kendall's tau, with its interval. At last every net gives way to a copy that
computes the same function with other weights: what goes into each hidden neuron is multiplied by a random number, what
leaves it divided. A measure that such copies change can say anything of a net. Three minutes of one core; what came out
stands in docs/measures_study.md.

One training loss matters: the curvature of a cross-entropy shrinks with the loss. It does not make all alike: weight
decay keeps the logits small, and with them the curvature; nets trained with it need more steps to the same loss.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from study_figure import draw
from study_measures import Predictor, Reading, objective, predictors, read
from study_nets import Net, distance, grid, rescaled, split, train
from study_ranking import Numbers, Ranking, rank

from flatcore.machine import describe
from flatcore.progress import progress_bar


@dataclass(frozen=True)
class Row:
    """A predictor's readings, (repeats, settings), and what they are worth.

    ``spread``: the largest over the smallest reading; ``factor``: the most by which a copy's differs from its net's;
    ``noise``: the largest relative standard error of a reading, nan where there is none to tell.
    """

    predictor: Predictor
    original: list[list[Reading]]
    copied: list[list[Reading]]
    loss: Ranking
    error: Ranking
    copied_loss: Ranking
    copied_error: Ranking
    spread: float
    factor: float
    noise: float


def values(readings: list[list[Reading]]) -> Numbers:
    return np.array([[reading.value for reading in repeat] for repeat in readings])


def ratio(one: Numbers, other: Numbers) -> float:
    """The largest ratio of entries, whichever is larger; of different signs there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(one == other, 1.0, one / other)
        return float(np.where(quotient > 0, np.maximum(quotient, 1 / quotient), math.inf).max())


def judge(
    predictor: Predictor,
    original: list[list[Reading]],
    copied: list[list[Reading]],
    gaps: tuple[Numbers, Numbers],
    resamples: int,
) -> Row:
    before, after = values(original), values(copied)
    rankings = [rank(predictor.sign * found, gap, resamples) for found in (before, after) for gap in gaps]
    errors = [abs(r.stderr / r.value) if r.stderr and r.value else 0.0 for r in chain(*original, *copied)]
    return Row(
        predictor,
        original,
        copied,
        *rankings,
        spread=ratio(before.max(keepdims=True), before.min(keepdims=True)),
        factor=ratio(after, before),
        noise=float(np.max(errors)),  # nan where one is not known
    )


def measured(
    nets: list[list[Net]],
    copies: list[list[torch.nn.Sequential]],
    chosen: dict[str, Predictor],
    training: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, tuple[list[list[Reading]], list[list[Reading]]]]:
    """name -> readings of the nets and of their copies."""
    found: dict[str, tuple[list[list[Reading]], list[list[Reading]]]] = {
        name: ([[] for _ in nets], [[] for _ in nets]) for name in chosen
    }
    done, total = 0, 2 * sum(map(len, nets))
    with progress_bar("measuring", total) as bar:
        for repeat, (ours, theirs) in enumerate(zip(nets, copies, strict=True)):
            for net, copied in zip(ours, theirs, strict=True):
                for which, model in enumerate((net.model, copied)):
                    subject = objective(model, training)
                    for name, predictor in chosen.items():
                        found[name][which][repeat].append(read(predictor, subject, net.setting))
                    done += 1
                    bar.update(done, f"{done} of {total} nets and copies")
    return found


def trained(
    settings: list[Any],
    repeats: int,
    data: tuple[Any, Any],
    target_loss: float,
    max_steps: int,
) -> list[list[Net]]:
    """A row for each repeat, every net from weights of its own."""
    nets: list[list[Net]] = []
    with progress_bar("training", repeats * len(settings)) as bar:
        for repeat in range(repeats):
            nets.append([])
            for place, setting in enumerate(settings):
                seed = repeat * len(settings) + place
                nets[-1].append(train(setting, seed, *data, target_loss, max_steps))
                bar.update(seed + 1, f"{seed + 1} of {repeats * len(settings)} nets")
    return nets


def without_unfinished(nets: list[list[Net]], console: Console, target_loss: float) -> list[list[Net]]:
    """The settings whose nets have all reached the training loss: others would differ in what is held equal."""
    late = [net for repeat in nets for net in repeat if not net.reached]
    for net in late:
        console.print(
            f"not at a training loss of {target_loss:g} after {net.steps} steps, so its setting is left out: "
            f"{net.setting}, training loss {net.training_loss:.3g}"
        )
    left_out = {net.setting for net in late}
    return [[net for net in repeat if net.setting not in left_out] for repeat in nets]


def nets_table(nets: list[Net]) -> Table:
    table = Table(title="Nets of the first repeat", title_justify="left")
    for head in (
        "batch",
        "learning rate",
        "weight decay",
        "steps",
        "training loss",
        "loss gap",
        "error gap %",
    ):
        table.add_column(head, justify="right")
    for net in sorted(nets, key=lambda net: net.loss_gap):
        s = net.setting
        table.add_row(
            str(s.batch_size),
            f"{s.learning_rate:g}",
            f"{s.weight_decay:g}",
            str(net.steps),
            f"{net.training_loss:.4f}",
            f"{net.loss_gap:.3f}",
            f"{100 * net.error_gap:.1f}",
        )
    return table


def rows_table(rows: dict[str, Row], settings: int, repeats: int) -> Table:
    table = Table(
        title=f"Kendall's tau-b with the gap, {settings * repeats} nets. * beyond 95 % of random orders",
        title_justify="left",
    )
    table.add_column("measure")
    table.add_column("invariant")
    heads = ("loss gap", "error gap", "loss gap, copies", "error gap, copies")
    for head in (*heads, "nets differ by", "copies differ by", "noise %"):
        table.add_column(head, justify="right")
    for row in rows.values():
        said = {True: "yes", False: "no", None: ""}[row.predictor.invariant]
        table.add_row(
            row.predictor.heading,
            said,
            *map(cell, (row.loss, row.error, row.copied_loss, row.copied_error)),
            f"{row.spread:.3g}",
            factor(row.factor),
            "" if math.isnan(row.noise) else f"{100 * row.noise:.1g}",
        )
    return table


def cell(found: Ranking) -> str:
    star = "*" if abs(found.tau) > found.chance else " "
    return f"{found.tau:+.2f}{star} [{found.low:+.2f}, {found.high:+.2f}]"


def factor(value: float) -> str:
    """1 + rounding as such."""
    return f"1 + {value - 1:.0e}" if value < 1.001 else f"{value:.3g}"


def as_json(
    nets: list[list[Net]], rows: dict[str, Row], moved: float, settings: dict[str, Any], seconds: float
) -> dict[str, Any]:
    def plain(net: Net) -> dict[str, Any]:
        fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(net) if f.name != "model"}
        return {**fields, "setting": dataclasses.asdict(net.setting)}

    def of(row: Row) -> dict[str, Any]:
        fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "predictor"}
        return {
            "label": row.predictor.heading,
            "invariant": row.predictor.invariant,
            "sign": row.predictor.sign,
            **json.loads(json.dumps(fields, default=dataclasses.asdict), parse_constant=lambda _: None),
        }

    return {
        "machine": dataclasses.asdict(describe()),
        "seconds": seconds,
        "settings": settings,
        "largest_relative_difference_of_logits": moved,
        "nets": [[plain(net) for net in repeat] for repeat in nets],
        "measures": {name: of(row) for name, row in rows.items()},
    }


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--batch-size", multiple=True, type=click.IntRange(1), default=(5, 20, 100), show_default=True)
@click.option(
    "--learning-rate",
    multiple=True,
    type=click.FloatRange(0, min_open=True),
    default=(0.03, 0.06, 0.15, 0.3),
    show_default=True,
)
@click.option(
    "--weight-decay", multiple=True, type=click.FloatRange(0), default=(0.0, 0.002), show_default=True
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Nets for each setting, with seeds of their own.",
)
@click.option(
    "--images", type=click.IntRange(1, 1796), default=100, show_default=True, help="To train on, of 1 797."
)
@click.option(
    "--target-loss",
    type=click.FloatRange(0, min_open=True),
    default=0.02,
    show_default=True,
    help="Training stops at this training loss.",
)
@click.option(
    "--max-steps",
    type=click.IntRange(1),
    default=20_000,
    show_default=True,
    help="Nets that take more are left out.",
)
@click.option(
    "--most",
    type=click.FloatRange(1),
    default=10.0,
    show_default=True,
    help="Copies scale neurons by 1/most to most.",
)
@click.option(
    "--measure",
    "names",
    multiple=True,
    type=click.Choice(list(predictors())),
    metavar="NAME",
    help="Of these alone.",
)
@click.option(
    "--resamples",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Of bootstrap and random orders.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for measures_study.json and measures_study.png."
)
def main(
    batch_size: Sequence[int],
    learning_rate: Sequence[float],
    weight_decay: Sequence[float],
    repeats: int,
    images: int,
    target_loss: float,
    max_steps: int,
    most: float,
    names: Sequence[str],
    resamples: int,
    out: Path | None,
) -> None:
    settings = {k: v for k, v in locals().items() if k != "out"}
    began = time.perf_counter()
    torch.set_num_threads(1)  # a second one costs more than it saves on nets of this size
    console = Console(width=None if Console().is_terminal else 200)
    data = split(images)
    nets = trained(grid(batch_size, learning_rate, weight_decay), repeats, data, target_loss, max_steps)
    nets = without_unfinished(nets, console, target_loss)
    if len(nets[0]) < 3:
        raise click.ClickException(f"expected three settings or more to rank, got {len(nets[0])}; add some")
    console.print(nets_table(nets[0]))
    copies = [[rescaled(net.model, most, net.seed) for net in repeat] for repeat in nets]
    x = torch.cat([part[0] for part in data]).double()
    moved = max(
        distance(net.model, copied, x)
        for ours, theirs in zip(nets, copies, strict=True)
        for net, copied in zip(ours, theirs, strict=True)
    )
    chosen = {name: p for name, p in predictors().items() if not names or name in names}
    gaps = tuple(
        np.array([[getattr(net, gap) for net in repeat] for repeat in nets])
        for gap in ("loss_gap", "error_gap")
    )
    found = measured(nets, copies, chosen, data[0])
    rows = {name: judge(p, *found[name], gaps, resamples) for name, p in chosen.items()}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1].loss.tau))
    console.print(rows_table(rows, len(nets[0]), repeats))
    console.print(f"copies compute the same: logits differ by {moved:.0e} of the largest at most")
    for name, row in rows.items():
        troubles = [r.status for r in chain(*row.original, *row.copied) if r.status != "converged"]
        if troubles:
            console.print(
                f"{name}: {len(troubles)} of {2 * len(nets) * len(nets[0])} with a reservation: {troubles[0]}"
            )
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} s")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report = as_json(nets, rows, moved, settings, seconds)
        (out / "measures_study.json").write_text(json.dumps(report, indent=1))
        draw(report, out / "measures_study.png")


if __name__ == "__main__":
    main()

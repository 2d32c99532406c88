"""Seconds per Hessian-vector product: flatcore beside every bare-torch way, interleaved in one run.

    python -m benchmarks.compare_autograd [--vectors 8] [--rounds 9] [--threads 2]

Each workload is checked before it is timed: all ways must agree with flatcore. Reported: the median over the rounds
and the range, per vector; the ratio to the best bare-torch way; the least time the products' matrix products and
convolutions would take at this machine's measured GEMM rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from rich.console import Console
from rich.table import Table

import flatcore as fc
from benchmarks.bare_torch import loss_of_parameters, split, ways
from benchmarks.workloads import WORKLOADS


def gemm_rate() -> float:
    """Flops per second of a large float32 matrix product on this machine, now."""
    n = 1536
    a, b = torch.randn(n, n), torch.randn(n, n)
    out = torch.empty(n, n)
    return 2 * n**3 / min(timed(lambda: torch.mm(a, b, out=out)) for _ in range(8))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(build: Callable, vectors: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per vector of each way, one entry per round; ways that torch cannot run are left out."""
    torch.manual_seed(0)
    model, loss, batch = build()
    evaluate, parameters = loss_of_parameters(model, loss, batch)
    H = fc.Hessian(fc.Objective(model, loss, batch))
    V = torch.randn(vectors, H.shape[0])
    expected = (H @ V.T).T
    runs: dict[str, Callable[[], object]] = {"flatcore": lambda: H @ V.T}
    directions = split(V, parameters)
    for name, prepare in ways(evaluate, parameters).items():
        try:
            way = prepare()
            product = torch.cat([y.reshape(vectors, -1) for y in way(directions)], dim=1)
        except RuntimeError as error:
            print(f"  {name} does not run here: {str(error).splitlines()[0]}")
            continue
        error = ((product - expected).norm() / expected.norm()).item()
        if error > 1e-4:
            raise AssertionError(f"{name} and flatcore differ by {error:.1e}")
        runs[name] = lambda way=way: way(directions)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run) / vectors)
    seconds["floor"] = [H.plan().flops(1) / gemm_rate()]
    return seconds


@click.command()
@click.option("--vectors", default=8, show_default=True, help="Directions per product, K.")
@click.option("--rounds", default=9, show_default=True, help="Timings of each way, interleaved.")
@click.option("--threads", default=2, show_default=True, help="torch.set_num_threads.")
@click.option("--workload", "names", multiple=True, type=click.Choice(list(WORKLOADS)), help="Only these.")
def main(vectors: int, rounds: int, threads: int, names: tuple[str, ...]) -> None:
    torch.set_num_threads(threads)
    console = Console()
    for name in names or WORKLOADS:
        seconds = compare(WORKLOADS[name], vectors, rounds)
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        best = min(value for way, value in medians.items() if way not in ("flatcore", "floor"))
        table = Table(title=f"{name}, K = {vectors}, {threads} threads, float32")
        for column in ("way", "ms per vector", "range", "times the best bare torch"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for way, times in sorted(seconds.items(), key=lambda item: medians[item[0]]):
            spread = f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}" if len(times) > 1 else ""
            table.add_row(way, f"{medians[way] * 1e3:.2f}", spread, f"{medians[way] / best:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()

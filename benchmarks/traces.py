"""Traces by flatcore and by what other packages offer: error against time; traces of whole nets in gradients.

    python -m benchmarks.traces digits [--rounds 5] [--threads 2] [--figure traces.png]
    python -m benchmarks.traces nets [NAME ...] [--threads 2]

digits: a tanh net 64-256-256-10 (85,002 parameters) on the 1,437 training digits, trained, float32, one batch. Every
  way of estimating tr H is run with several seeds; its error is the root mean square of the relative errors against the
  same net's trace in float64 (sums over the outputs and probes of the remainder to a standard error of 1e-4), its time
  the median. Ways take turns.
nets: the trace of H by parameter from two probes of each example's own, and what a pass costs beside a gradient and a
  product with one vector. resnet10k: relative flatness of all layers and the diagonal of a ResNet over 10,000 images.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import flatcore as fc
from benchmarks.spectra import PeakMemory, timed, trained_net
from flatcore.bench import peers
from flatcore.bench.workloads import MLP, WORKLOADS, resnet
from flatcore.machine import describe


def reference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    wide = MLP(64, 256, 256, 10).double().eval()
    wide.load_state_dict(model.state_dict())
    H = fc.Hessian(fc.Objective(wide, nn.CrossEntropyLoss(), (batch[0].double(), batch[1])))
    return float(fc.trace(H, rtol=1e-4, seed=2**40, max_matvecs=20_000).value)


@click.group()
def main() -> None:
    """Traces by flatcore and by other packages."""


@main.command("digits")
@click.option("--rounds", default=5, show_default=True, help="Seeds of each way, interleaved.")
@click.option("--threads", default=2, show_default=True, help="torch.set_num_threads.")
@click.option("--figure", type=click.Path(path_type=Path), help="Error against time, as a picture.")
def digits_net(rounds: int, threads: int, figure: Path | None) -> None:
    """Error against time on a net for digits."""
    from curvlinops import hutchinson_trace, xtrace

    torch.set_num_threads(threads)
    model, batch = trained_net()
    loss = nn.CrossEntropyLoss()
    size = sum(p.numel() for p in model.parameters())
    print(describe())
    truth = reference(model, batch)
    print(
        f"P = {size:,}, loss {loss(model(batch[0]), batch[1]).item():.4f}, tr H = {truth:.4f}, {threads} threads"
    )
    H = fc.Hessian(fc.Objective(model, loss, batch))
    H.plan()
    theirs = peers.curvlinops_operator("HessianLinearOperator", model, loss, batch)

    def ours(method: str, **options: Any) -> Callable[[int], float]:
        return lambda seed: float(fc.trace(H, method=method, seed=seed, **options).value)

    def peer(estimate: Callable[[Any, int], Any], products: int) -> Callable[[int], float]:
        def run(seed: int) -> float:
            torch.manual_seed(seed)
            return float(estimate(theirs, products))

        return run

    ways: dict[str, Callable[[int], float]] = {
        "flatcore auto": ours("auto"),
        "flatcore auto, rtol 0.003": ours("auto", rtol=0.003),
        "flatcore example": ours("example"),
        "flatcore xtrace": ours("xtrace"),
        "curvlinops xtrace, 40": peer(xtrace, 40),
        "curvlinops xtrace, 64": peer(xtrace, 64),
        "curvlinops hutchinson, 40": peer(hutchinson_trace, 40),
        "curvlinops hutchinson, 160": peer(hutchinson_trace, 160),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run(10_000)  # captures, first calls
    for seed in range(rounds):
        for name, run in ways.items():
            seconds, value = timed(lambda run=run, seed=seed: run(seed))  # type: ignore[misc]
            times[name].append(seconds)
            errors[name].append(value / truth - 1)
    table = {
        name: (statistics.median(times[name]), math.sqrt(statistics.fmean(e**2 for e in errors[name])))
        for name in ways
    }
    for name, (seconds, error) in table.items():
        print(f"{name:28} {1000 * seconds:9.1f} ms  error {100 * error:6.2f} %")
    if figure is not None:
        draw(table, figure)


def draw(table: dict[str, tuple[float, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (seconds, error) in table.items():
        axes.loglog(1000 * seconds, 100 * error, "o" if name.startswith("flatcore") else "s")
        axes.annotate(
            name, (1000 * seconds, 100 * error), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="time, ms", ylabel="root mean square error of tr H, %")
    axes.margins(0.25)
    axes.grid(alpha=0.3, which="both")
    plt.savefig(path, dpi=120)


def gradient_seconds(model: nn.Module, loss: Any, batch: Any) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient() -> None:
        value = (
            loss.fn(model, batch) if isinstance(loss, fc.ModelLoss) else loss(model(*batch[:-1]), batch[-1])
        )
        torch.autograd.grad(value, parameters, allow_unused=True)

    gradient()
    return statistics.median(timed(gradient)[0] for _ in range(3))


@main.command()
@click.argument("names", nargs=-1)
@click.option("--threads", default=2, show_default=True, help="torch.set_num_threads.")
@click.option("--images", default=10_000, show_default=True, help="Of resnet10k, in batches of 200.")
def nets(names: tuple[str, ...], threads: int, images: int) -> None:
    """Traces by parameter, in gradients."""
    torch.set_num_threads(threads)
    print(describe())
    for name in names or ("mlp-mid", "resnet", "decoder", "vit", "minilm", "gpt2", "resnet10k"):
        if name == "resnet10k":
            residual_net(images)
            continue
        if name == "minilm":
            from examples import minilm

            one_net(name, minilm.encoder(), fc.ModelLoss(minilm.loss), minilm.pairs())
        else:
            torch.manual_seed(0)
            one_net(name, *WORKLOADS[name].build())


def one_net(name: str, model: nn.Module, loss: Any, batch: Any) -> None:
    with PeakMemory() as before:
        time.sleep(0.05)
    with PeakMemory() as training:
        gradient = gradient_seconds(model, loss, batch)
    H = fc.Hessian(fc.Objective(model, loss, batch))
    v = torch.randn(H.shape[0], 1)
    H @ v
    product = statistics.median(timed(lambda: H @ v)[0] for _ in range(3))
    fc.trace(H, method="example", max_matvecs=2, rtol=1.0)
    with PeakMemory() as peak:
        runs = [timed(lambda: fc.trace(H, method="example", max_matvecs=2, rtol=1.0)) for _ in range(3)]
    seconds, found = sorted(runs, key=lambda run: run[0])[1]
    assert found.by_parameter is not None
    print(
        f"{name}: P = {H.shape[0]:,}, tr H = {found.value:.4g} ± {found.stderr:.2g} by {found.method} in "
        f"{seconds:.2f} s = {seconds / gradient:.1f} gradients; a product {product / gradient:.1f}; "
        f"{(peak.anonymous - before.anonymous) / 1e9:.2f} GB more than model and data, a gradient "
        f"{(training.anonymous - before.anonymous) / 1e9:.2f} GB"
    )
    parts = sorted(found.by_parameter.items(), key=lambda item: -abs(item[1].value))
    for part, estimate in parts[:3]:
        print(f"    {part}: {estimate.value:.4g} ± {estimate.stderr:.2g}")


def residual_net(images: int) -> None:
    """Inputs of relative flatness and normalized sharpness of all layers, in batches of 200."""
    torch.manual_seed(0)
    model, loss, _ = resnet(1)
    batches = [(torch.randn(200, 3, 32, 32), torch.randint(0, 10, (200,))) for _ in range(images // 200)]
    gradient = len(batches) * gradient_seconds(model, loss, batches[0])
    objective = fc.Objective(model, loss, batches)
    G = fc.GGN(objective)
    G.plan()
    seconds, entries = timed(lambda: fc.diagonal(G, method="example", max_matvecs=2, rtol=1.0))
    print(
        f"diagonal, {images:,} images: {seconds:.1f} s = {seconds / gradient:.1f} gradients, relative error "
        f"{float(entries.stderr.norm() / entries.value.norm()):.3f}"
    )
    seconds, flatness = timed(
        lambda: fc.measures.relative_flatness(objective, layer="all", standardize=False, rtol=0.1)
    )
    print(
        f"relative flatness of all layers: {seconds:.1f} s = {seconds / gradient:.1f} gradients, "
        f"{flatness.value:.4g} ± {flatness.stderr:.2g}"
    )


if __name__ == "__main__":
    main()

"""Measures of flatness by flatcore and as they were published: the same numbers, and the time for them.

    python -m benchmarks.measures flatness [--images 2000] [--rounds 5] [--threads 2]
    python -m benchmarks.measures scales [--rounds 3] [--threads 2]

flatness: relative flatness (Petzka et al., NeurIPS 2021) of the last layer, 84 -> 10, of LeNet-5. The published way has
  all images in one batch, differentiates the layer's gradient entry by entry, 840 passes backward through its graph,
  and takes the traces of the 100 blocks of the layer's Hessian. Both are checked against each other in float64.
scales: the minimum over row and column scales inside normalized sharpness (Tsuzuku et al., ICML 2020), for every weight
  matrix of LeNet-5 and of an MLP 784-512-128-512-10. The published way is gradient descent on the logarithms of the
  scales: 10,000 steps of size lr / (1 + step / 1000), after a division of both matrices by their sum.

Ways take turns; times are medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatcore as fc
from examples.digits import digits
from flatcore.bench.workloads import MLP
from flatcore.machine import describe
from flatcore.measures.layers import find_layers
from flatcore.measures.scales import least_over_scales

AT_ONCE = 500  # images in a batch, for what can be done in batches
STEPS, LEARNING_RATES = 10_000, (0.1, 0.3, 1.0)
ROUNDING = 1e-6  # of a sum in float32
Clock = Callable[[], float]
_Result = TypeVar("_Result")

threads_option = click.option("--threads", default=2, show_default=True, help="torch.set_num_threads.")
clock_option = click.option(
    "--processor-time",
    "clock",
    is_flag=True,
    callback=lambda context, option, asked: time.process_time if asked else time.perf_counter,
    help="Not the clock's time: for one thread where other work runs.",
)


def timed(run: Callable[[], _Result], clock: Clock) -> tuple[float, _Result]:
    """Seconds of one call, the mean over as many as take 0.05 s."""
    start, calls = clock(), 0
    while True:
        result = run()
        calls += 1
        seconds = clock() - start
        if seconds > 0.05:
            return seconds / calls, result


def lenet() -> nn.Sequential:
    """LeNet-5 for three channels of 32 x 32 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def images(count: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Digits drawn with repetition, enlarged: (count, 1, pixels, pixels) and labels."""
    (x, y), _ = digits()
    chosen = torch.randint(len(x), (count,), generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(x[chosen].view(-1, 1, 8, 8), size=(pixels, pixels), mode="bilinear")
    return enlarged, y[chosen]


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 100) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        rows = torch.arange(step * 64, (step + 1) * 64) % len(x)
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    return model.eval()


def entry_by_entry(gradient: Tensor, weight: Tensor) -> float:
    """The published way from the gradient on: a pass for each entry, then a trace for each pair of neurons."""
    d, m = weight.shape
    hessian = torch.empty(m, d, d, m, dtype=weight.dtype)
    for t in range(m):
        for s in range(d):
            (hessian[t, s],) = torch.autograd.grad(gradient[s, t], weight, retain_graph=True)
    blocks, W = hessian.numpy(), weight.detach().numpy()
    return float(sum(W[s] @ W[u] * np.trace(blocks[:, s, u]) for s in range(d) for u in range(d)))


def published_flatness(model: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Of the last layer, over all images in one batch."""
    return entry_by_entry(*gradient_and_weight(model, x, y))


def gradient_and_weight(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    weight = model[-1].weight
    assert isinstance(weight, Tensor)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), weight, create_graph=True)
    return gradient, weight


def our_flatness(objective: fc.Objective) -> float:
    last = len(objective.model) - 1  # type: ignore[arg-type]
    return fc.measures.relative_flatness(objective, layer=str(last), standardize=False).value


def whole_net_seconds(model: nn.Sequential, x: Tensor, y: Tensor, clock: Clock, entries: int = 5) -> float:
    """Of one entry's pass where it fills the gradients of all parameters."""
    gradient, _ = gradient_and_weight(model, x, y)
    times = [
        timed(lambda t=t: gradient[0, t].backward(retain_graph=True), clock)[0]  # type: ignore[misc]
        for t in range(entries)
    ]
    model.zero_grad()
    return statistics.median(times)


@click.group()
def main() -> None:
    """Measures by flatcore and as they were published."""


@main.command()
@click.option("--images", "count", default=2000, show_default=True, help="The published experiment: 50000.")
@click.option("--rounds", default=5, show_default=True, help="Timings of each way, interleaved.")
@threads_option
@clock_option
def flatness(count: int, rounds: int, threads: int, clock: Clock) -> None:
    """Relative flatness of the last layer of LeNet-5."""
    torch.set_num_threads(threads)
    print(describe())
    x, y = images(count, 32)
    x = x.expand(-1, 3, -1, -1).contiguous()
    model = trained(lenet(), x, y)
    loss = nn.CrossEntropyLoss()
    few = slice(0, 500)
    wide = lenet().double()
    wide.load_state_dict(model.state_dict())
    exact = published_flatness(wide, x[few].double(), y[few])
    ours = our_flatness(fc.Objective(wide, loss, (x[few].double(), y[few])))
    print(f"float64, {len(x[few])} images: published {exact:.15g}, flatcore {ours:.15g}")
    if abs(ours - exact) > 1e-9 * exact:
        raise SystemExit("the two ways differ")
    del wide

    def in_batches(a: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(a.split(AT_ONCE), y.split(AT_ONCE), strict=True))

    with torch.no_grad():
        features = torch.cat([model[:-1](part) for part, _ in in_batches(x)])
    last = nn.Sequential(model[-1])

    def forward(net: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> list[Tensor]:
            return [loss(net(a), b) for a, b in batches]

        return run

    def measured(net: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], float]:
        objective = fc.Objective(net, loss, batches)
        return lambda: our_flatness(objective)

    ways: dict[str, Callable[[], Any]] = {
        "pass forward, one batch": forward(model, [(x, y)]),
        "pass forward, batches": forward(model, in_batches(x)),
        "flatcore, one batch": measured(model, [(x, y)]),
        "flatcore, batches": measured(model, in_batches(x)),
        "published, one batch": lambda: published_flatness(model, x, y),
        "last layer alone: pass forward": forward(last, [(features, y)]),
        "last layer alone: flatcore": measured(last, [(features, y)]),
        "last layer alone: published": lambda: published_flatness(last, features, y),
    }
    median = medians(ways, rounds, clock)
    whole = 840 * whole_net_seconds(model, x, y, clock)
    print(f"{count} images, float32, {threads} threads, batches of {AT_ONCE}, {rounds} rounds:")
    for name, seconds in median.items():
        print(f"{name:32} {1000 * seconds:12.3f} ms")
    print(f"{'840 passes that fill all gradients':32} {1000 * whole:9.0f} ms, extrapolated from 5")
    published, batches = median["published, one batch"], median["flatcore, batches"]
    pass_forward = median["pass forward, batches"]
    print(
        f"whole call: published / flatcore {published / batches:.1f} in batches, "
        f"{published / median['flatcore, one batch']:.1f} in one; a flatcore that took no more than the pass forward "
        f"(its floor): {published / pass_forward:.1f}; flatcore / floor {batches / pass_forward:.3f}"
    )
    given = median["last layer alone: pass forward"]
    beyond = [median[f"last layer alone: {name}"] - given for name in ("published", "flatcore")]
    print(
        "features given: published / flatcore "
        f"{median['last layer alone: published'] / median['last layer alone: flatcore']:.0f}; "
        f"beyond the last layer's own pass forward {1000 * beyond[0]:.1f} ms / {1000 * beyond[1]:.3f} ms = "
        f"{beyond[0] / beyond[1]:.0f}"
    )
    print(f"passes that fill all gradients / flatcore, batches: {whole / batches:.0f}")


def medians(ways: dict[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, run in ways.items():
        if not name.endswith(("published", "published, one batch")):
            run()
    for _ in range(rounds):
        for name, run in ways.items():
            times[name].append(timed(run, clock)[0])
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def matrices(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Diagonal of the Gauss-Newton matrix and squared weights of each layer, summed over kernels, float64."""
    objective = fc.Objective(model, nn.CrossEntropyLoss(), (x, y))
    diagonal = objective.layout.split(fc.diagonal(fc.GGN(objective), rtol=0.01).value.double())
    weights = objective.snapshot().values
    return {
        layer.path: (
            layer.matrices(diagonal[layer.weight]).sum(-1).clamp(min=0)[0],
            layer.matrices(weights[layer.weight].double().square()).sum(-1)[0],
        )
        for layer in find_layers(objective)
    }


def descended_scales(h: Tensor, w: Tensor, lr: float, steps: int) -> list[float]:
    """The published way: the sum before every step, and at the end.

    Sums over rows and columns are products with vectors here, the cheapest form of the same steps.
    """
    total = h.sum() + w.sum()
    H, W = h / total, w / total
    log_r, log_c = (h.new_zeros(size, requires_grad=True) for size in h.shape)

    def value() -> Tensor:
        r, c = (2 * log_r).exp(), (2 * log_c).exp()
        return r @ (H @ c) + (1 / r) @ (W @ (1 / c))

    optimiser = torch.optim.SGD([log_r, log_c], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + 1e-3 * step))
    values = []
    for _ in range(steps):
        optimiser.zero_grad()
        values.append(value())
        values[-1].backward()
        values[-1] = values[-1].detach()
        optimiser.step()
        schedule.step()
    return (torch.stack([*values, value().detach()]).double() * total.double()).tolist()


@main.command()
@click.option("--images", "count", default=1000, show_default=True, help="For training and the diagonals.")
@click.option(
    "--rounds", default=1, show_default=True, help="Timings of each way and step size, interleaved."
)
@threads_option
@clock_option
def scales(count: int, rounds: int, threads: int, clock: Clock) -> None:
    """The least sum over scales inside normalized sharpness."""
    torch.set_num_threads(threads)
    print(describe())
    (x, y), (flat, _) = images(count, 32), images(count, 28)
    x, flat = x.expand(-1, 3, -1, -1).contiguous(), flat.flatten(1)
    torch.manual_seed(0)
    nets = {"LeNet-5": (lenet(), x), "MLP 784-512-128-512-10": (MLP(784, 512, 128, 512, 10), flat)}
    for name, (net, pictures) in nets.items():
        print(f"{name}, float64 and for the descent float32, {threads} threads:")
        layers = matrices(trained(net, pictures, y), pictures, y)
        times = [one_layer(path, h, w, rounds, clock) for path, (h, w) in layers.items()]
        ours, theirs, needed = (math.fsum(column) for column in zip(*times, strict=True))
        print(
            f"  all layers: {1000 * ours:.1f} ms, {1000 * theirs:.0f} ms, ratio {theirs / ours:.0f}; "
            f"to the descent's accuracy {1000 * needed:.0f} ms, ratio {needed / ours:.0f}"
        )


def one_layer(path: str, h: Tensor, w: Tensor, rounds: int, clock: Clock) -> list[float]:
    """Median seconds of flatcore, of the descent's 10,000 steps, and of as many as its accuracy at the end takes."""
    ours, theirs, found = [], [], []
    for lr in LEARNING_RATES * rounds:
        seconds, least = timed(lambda: least_over_scales(h, w), clock)
        ours.append(seconds)
        seconds, values = timed(lambda lr=lr: descended_scales(h.float(), w.float(), lr, STEPS), clock)  # type: ignore[misc]
        theirs.append(seconds)
        above = [value / least.value - 1 for value in values]
        enough = max(above[-1], ROUNDING)
        if math.isfinite(enough):
            found.append((above[-1], next(n for n, a in enumerate(above) if a <= enough), lr))
    above_least, steps, lr = min(found)
    times = [statistics.median(ours), statistics.median(theirs)]
    times.append(times[1] * steps / STEPS)
    print(
        f"  {path} {tuple(h.shape)}: flatcore {least.value:.12g} in {1000 * times[0]:.2f} ms, {least.sweeps} sweeps; "
        f"descent with {lr:g} {above_least:.1e} above it in {1000 * times[1]:.0f} ms, ratio {times[1] / times[0]:.0f}; "
        f"no better than after {steps} steps, ratio {times[2] / times[0]:.0f}"
    )
    return times


if __name__ == "__main__":
    main()

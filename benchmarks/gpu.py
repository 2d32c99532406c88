"""What flatcore reaches on a GPU: one step after another, each figure written as soon as it is known.

    python -m benchmarks.gpu STEP --out FILE [--seconds 100] [--quick] [--go FILE]

`tools/gpu_check` runs every step in a process of its own and puts the files together. It needs no package beyond
flatcore's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flatcore as fc
from benchmarks import gpu_products
from benchmarks.gpu_products import PRECISIONS, VECTORS
from flatcore.bench import WORKLOADS, Ceilings, Setting, measure, workloads
from flatcore.bench.bare_torch import joined, loss_of_parameters, split, ways
from flatcore.bench.ceilings import seconds
from flatcore.bench.compare import math_attention
from flatcore.bench.memory import peak_bytes
from flatcore.bench.workloads import Built

CUDA = torch.device("cuda")
# The quickest first: what no time is left for is left out.
ORDER = ("mlp-tiny", "mlp-mid", "decoder", "resnet", "mlp-wide", "vit", "gpt2")


class Figures:
    """Named figures, and what failed, in a file that is whole after every one.

    go: a file that says when the machine is quiet; None: it is.
    """

    def __init__(self, path: Path, limit: float, go: Path | None = None) -> None:
        self._path, self._limit, self.go = path, limit, go
        self._found: dict[str, Any] = {"figures": {}, "failures": {}}
        self.begin()

    def begin(self) -> None:
        """The time that there is begins now."""
        self._end = time.monotonic() + self._limit

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def add(self, name: str, work: Callable[[], Any]) -> Any:
        """The figure, None where it fails or no time is left for it."""
        try:
            if self.left <= 0:
                raise TimeoutError("no time is left")
            figure = work()
        except Exception as failure:  # one figure that fails must not take the others along
            traceback.print_exc()
            lines = str(failure).strip().splitlines() or ["-"]
            figure = f"{type(failure).__name__}: {lines[0]}"
        self.put(name, figure)
        torch.cuda.empty_cache()
        return self._found["figures"].get(name)

    def put(self, name: str, figure: Any) -> None:
        """A figure as it is, or a text that says how it failed."""
        self._found["failures" if isinstance(figure, str) else "figures"][name] = figure
        gpu_products.whole(self._path, self._found)


def ceilings(figures: Figures, quick: bool) -> None:
    """Copy bandwidth, and the rate of matrix products in every precision."""
    for name, dtype, precision in (
        ("fp32", torch.float32, "full"),
        ("tf32", torch.float32, "tf32"),
        ("bf16", torch.float32, "bf16"),
        ("fp64", torch.float64, "full"),
    ):
        figures.add(name, lambda d=dtype, p=precision: dataclasses.asdict(measure(d, CUDA, precision=p)))


def products(figures: Figures, quick: bool) -> None:
    """Every workload by flatcore in every precision, and by bare torch in float32."""
    names = [n for n in ORDER if not WORKLOADS[n].missing() and not (quick and WORKLOADS[n].large)]

    def rates() -> dict[str, Ceilings]:
        figures.begin()
        return {p: measure(torch.float32, CUDA, precision=p) for p in PRECISIONS}

    gpu_products.run(names, quick, figures.go, rates, lambda: figures.left, figures.put)


def gpt2(figures: Figures, quick: bool) -> None:
    """GPT-2 small, 4 x 1024 tokens: share of the rate of matrix products; error; one way of autograd."""
    built = WORKLOADS["gpt2-long"].at(torch.float32, CUDA, 0)
    objective = fc.Objective(*built)  # captured once
    V = torch.randn(max(VECTORS), objective.layout.size, device=CUDA)
    for K in reversed(VECTORS):
        for precision in PRECISIONS:
            rate = measure(torch.float32, CUDA, precision=precision).gemm
            figures.add(
                f"flatcore {precision} K={K}",
                lambda: _long_product(fc.Hessian(objective, precision=precision), V[:K], rate),  # noqa: B023
            )
    figures.add("autograd fp32 K=1", lambda: _autograd(built, V[:1]))
    figures.add("errors, 1 x 1024 tokens", lambda: _long_errors(V[:1]))


def _long_product(A: fc.Hessian, V: Tensor, rate: float) -> dict[str, float]:
    spent, peak = _timed(lambda: A @ V.T)
    flops = A.plan().flops(len(V))
    return {
        "seconds": spent / len(V),
        "flops": flops / len(V),
        "gemm_share": flops / spent / rate,
        "peak_bytes": peak,
    }


def _autograd(built: Built, V: Tensor) -> dict[str, float]:
    with math_attention():
        evaluate, parameters = loss_of_parameters(*built)
        way = ways(evaluate, parameters, compiled=False)["retained double backward"]()
        directions = split(V, parameters)
        spent, peak = _timed(lambda: way(directions))
    return {"seconds": spent / len(V), "peak_bytes": peak}


def _long_errors(V: Tensor) -> dict[str, float]:
    """Of flatcore's products, against autograd in float64, whose graph takes tens of GB for one example."""
    workload = workloads.Workload("gpt2", "GPT-2 small", lambda: workloads.gpt2(1024))
    double = workload.at(torch.float64, CUDA, 0)
    with math_attention():
        evaluate, parameters = loss_of_parameters(*double)
        way = ways(evaluate, parameters, compiled=False)["retained double backward"]()
        exact = joined(way(split(V.double(), parameters)))
    del double, evaluate, parameters, way
    objective, found = fc.Objective(*workload.at(torch.float32, CUDA, 0)), {}
    for precision in PRECISIONS:
        A = fc.Hessian(objective, precision=precision)
        found[precision] = float(((A @ V.T).T.double() - exact).norm() / exact.norm())
    return found


def _timed(run: Callable[[], Any], rounds: int = 5) -> tuple[float, int]:
    """Median seconds after a first run, and the peak memory of one."""
    run()
    peak = peak_bytes(run, CUDA)
    return statistics.median(seconds(run, CUDA) for _ in range(rounds)), peak


def attention(figures: Figures, quick: bool) -> None:
    """One block of 8 heads of width 64, causal: time and memory of a product by the number of tokens."""
    for tokens in (2048, 4096) if quick else (4096, 8192):
        figures.add(f"{tokens} tokens", lambda: _attention(tokens))  # noqa: B023


def _attention(tokens: int) -> dict[str, float]:
    def build() -> Built:
        return workloads.decoder(1, tokens=tokens, width=512, heads=8, depth=1)

    built = workloads.Workload("attention", "attention", build).at(torch.float32, CUDA, 0)
    A = Setting(device=str(CUDA)).product_operator(*built)
    V = torch.randn(4, A.shape[0], device=CUDA)
    spent, peak = _timed(lambda: A @ V.T)
    return {"seconds": spent / len(V), "peak_bytes": peak, "state_bytes": A.plan().state_bytes}


def eigenvalues(figures: Figures, quick: bool) -> None:
    """The ten largest of a model of 124 million parameters."""
    figures.add("top 10", lambda: _top(1, 128) if quick else _top(4, 1024))


def _top(examples: int, tokens: int) -> dict[str, Any]:
    workload = workloads.Workload("gpt2", "GPT-2 small", lambda: workloads.gpt2(tokens, examples))
    A = Setting(device=str(CUDA), precision="tf32").product_operator(*workload.at(torch.float32, CUDA, 0))
    A.plan()
    begin = time.perf_counter()
    found = fc.eigsh(A, k=10, tol=1e-2, max_matvecs=600)
    torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - begin,
        "matvecs": found.matvecs,
        "status": found.status,
        "values": found.values.tolist(),
        "setting": f"{examples} x {tokens} tokens, tf32, tol = 0.01",
    }


def trace(figures: Figures, quick: bool) -> None:
    """tr H of a model of more than a billion parameters, from probes of its examples in one pass over them."""
    figures.add("one pass", lambda: _trace(4 if quick else 24))


def _trace(layers: int) -> dict[str, Any]:
    torch.manual_seed(0)
    with CUDA:
        built = workloads.gpt2(256, 4, n_embd=2048, n_layer=layers, n_head=16)
    A = fc.Hessian(fc.Objective(*built))
    A.plan()
    begin = time.perf_counter()
    found = fc.trace(A, method="example", rtol=0.5, max_matvecs=2)
    torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - begin,
        "parameters": A.shape[0],
        "value": float(found.value),
        "stderr": float(found.stderr),
        "matvecs": found.matvecs,
        "method": found.method,
        "held_bytes": torch.cuda.max_memory_allocated(),
    }


def tiny(figures: Figures, quick: bool) -> None:
    """What a product of a tiny net starts on the device: one graph."""
    figures.add("launches", _launches)


def _launches() -> dict[str, int]:
    from torch.profiler import ProfilerActivity, profile

    A = Setting(device=str(CUDA)).product_operator(*WORKLOADS["mlp-tiny"].at(torch.float32, CUDA, 0))
    v = torch.randn(A.shape[0], device=CUDA)
    for _ in range(3):  # as it is, recorded, replayed
        A @ v
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        A @ v
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in recorded.key_averages()}
    return {key: count for key, count in calls.items() if key.startswith(("cuda", "cu"))}


STEPS: dict[str, Callable[[Figures, bool], None]] = {
    step.__name__: step for step in (ceilings, products, gpt2, attention, eigenvalues, trace, tiny)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--go", type=Path, help="products: a file; they are timed once it is there")
    given = parser.parse_args()
    STEPS[given.step](Figures(given.out, given.seconds, given.go), given.quick)


if __name__ == "__main__":
    main()

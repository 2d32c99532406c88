"""Self-attention: Hessian-vector products by flatcore and by torch's math attention, in time, memory and error.

    python -m benchmarks.attention [--tokens 4096] [--heads 8] [--vectors 4] [--rounds 3] [--causal] [--threads 1]

One layer (projections of width 64 per head, no bias) under a mean squared error, float32. The other way is a retained
double backward under SDPBackend.MATH, one direction at a time: torch's fused attention has no second derivative.
Time: both in one process, interleaved. Memory: the growth of the peak resident size over everything that one way
needs for its products, forward and gradient included, in a process of its own. Error: both against the math way in
float64, with `--error-tokens` tokens.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatcore as fc
from flatcore.bench.ceilings import measure

WIDTH = 64  # of a head


class SelfAttention(nn.Module):
    def __init__(self, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.project = nn.Linear(heads * WIDTH, 3 * heads * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, WIDTH)).transpose(1, 2) for part in self.project(x).chunk(3, -1)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2)


Batch = tuple[Tensor, Tensor]
Product = Callable[[Tensor], Tensor]  # (P, K) -> (P, K)


def problem(tokens: int, heads: int, causal: bool) -> tuple[SelfAttention, Batch]:
    torch.manual_seed(0)
    model = SelfAttention(heads, causal)
    return model, (torch.randn(1, tokens, heads * WIDTH), torch.randn(1, tokens, heads * WIDTH))


def by_flatcore(model: SelfAttention, batch: Batch) -> Product:
    H = fc.Hessian(fc.Objective(model, nn.MSELoss(), batch))
    return lambda V: H @ V


def by_math(model: SelfAttention, batch: Batch) -> Product:
    weight = model.project.weight
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(F.mse_loss(model(batch[0]), batch[1]), weight, create_graph=True)

    def one(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, weight, v.view_as(weight), retain_graph=True)[0].flatten()

    return lambda V: torch.stack([one(v) for v in V.T.contiguous()]).T


WAYS: dict[str, Callable[[SelfAttention, Batch], Product]] = {"flatcore": by_flatcore, "math": by_math}


def directions(model: SelfAttention, vectors: int) -> Tensor:
    return torch.randn(vectors, model.project.weight.numel()).T


def peak_resident_bytes() -> int:
    """Of this program. (Linux; the peak that getrusage tells is inherited from the process that started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peak) * 1024


def memory_here(way: str, tokens: int, heads: int, vectors: int, causal: bool) -> int:
    """Growth of this process's peak while `way` makes its products. Both libraries are warm from a small problem."""
    model, batch = problem(32, heads, causal)
    WAYS[way](model, batch)(directions(model, 1))
    model, batch = problem(tokens, heads, causal)
    V = directions(model, vectors)
    before = peak_resident_bytes()
    WAYS[way](model, batch)(V)
    return peak_resident_bytes() - before


def memory(way: str, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "benchmarks.attention", *arguments, "--memory-of", way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def errors(tokens: int, heads: int, vectors: int, causal: bool) -> dict[str, float]:
    """Relative error of each way's float32 product."""
    model, batch = problem(tokens, heads, causal)
    V = directions(model, vectors)
    products = {way: prepare(model, batch)(V).double() for way, prepare in WAYS.items()}
    exact = by_math(model.double(), (batch[0].double(), batch[1].double()))(V.double())
    return {way: ((product - exact).norm() / exact.norm()).item() for way, product in products.items()}


def seconds(tokens: int, heads: int, vectors: int, causal: bool, rounds: int) -> dict[str, list[float]]:
    """Per vector, one entry per round; the first, untimed, makes the states."""
    model, batch = problem(tokens, heads, causal)
    V = directions(model, vectors)
    products = {way: prepare(model, batch) for way, prepare in WAYS.items()}
    for product in products.values():
        product(V[:, :1])
    result: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, product in products.items():
            start = time.perf_counter()
            product(V)
            result[way].append((time.perf_counter() - start) / vectors)
    plan = fc.Hessian(fc.Objective(model, nn.MSELoss(), batch)).plan()
    result["floor (flops at the rate of a square GEMM)"] = [plan.flops(vectors) / vectors / measure().gemm]
    return result


@click.command()
@click.option("--tokens", default=4096, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--vectors", default=4, show_default=True, help="Directions per product, K.")
@click.option("--rounds", default=3, show_default=True, help="Timings of each way, interleaved.")
@click.option("--threads", default=1, show_default=True, help="torch.set_num_threads.")
@click.option("--causal", is_flag=True)
@click.option("--error-tokens", default=1024, show_default=True)
@click.option("--memory-of", type=click.Choice(list(WAYS)), hidden=True)
def main(
    tokens: int,
    heads: int,
    vectors: int,
    rounds: int,
    threads: int,
    causal: bool,
    error_tokens: int,
    memory_of: str | None,
) -> None:
    torch.set_num_threads(threads)
    if memory_of:
        print(memory_here(memory_of, tokens, heads, vectors, causal))
        return
    print(
        f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, flatcore {fc.__version__}, "
        f"{threads} threads; T = {tokens}, {heads} heads of {WIDTH}, K = {vectors}, "
        f"{'causal' if causal else 'no mask'}, float32"
    )
    arguments = [f"--tokens={tokens}", f"--heads={heads}", f"--vectors={vectors}", f"--threads={threads}"]
    arguments += ["--causal"] if causal else []
    error = errors(error_tokens, heads, min(vectors, 2), causal)
    for way, times in seconds(tokens, heads, vectors, causal, rounds).items():
        line = f"{way}: {statistics.median(times):.3f} s per vector [{min(times):.3f}, {max(times):.3f}]"
        if way in WAYS:
            line += (
                f", {memory(way, arguments) / 2**20:.0f} MiB, error {error[way]:.1e} at T = {error_tokens}"
            )
        print(line)


if __name__ == "__main__":
    main()

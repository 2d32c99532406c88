"""What this machine can do at best, measured: the rate of a large matrix product and the bandwidth of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Ceilings:
    """flops and bytes per second, with the threads that are set now.

    gemm:      a square product of 1536, the best of the libraries at hand, which `gemm_library` names.
    bandwidth: copying 256 MiB; bytes read and written both count.
    """

    gemm: float
    gemm_library: str
    bandwidth: float


def measure(dtype: torch.dtype = torch.float32, repeats: int = 8) -> Ceilings:
    """The best of `repeats` runs each."""
    n = 1536
    a, b, out = (torch.randn(n, n, dtype=dtype) for _ in range(3))
    candidates: dict[str, Callable[[], object]] = {"BLAS": lambda: torch.mm(a, b, out=out)}
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        candidates["oneDNN"] = lambda: linear(a, b, None, "none", [], "")
    best = {name: min(seconds(run) for _ in range(repeats)) for name, run in candidates.items()}
    library = min(best, key=lambda name: best[name])
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(repeats))
    return Ceilings(2 * n**3 / best[library], library, 2 * source.nbytes / copy)

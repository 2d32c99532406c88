"""What this machine can do at best, measured: the rate of a large matrix product and the bandwidth of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


def seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Wall time of a run, everything that it starts on the device included."""
    _finish(device)
    start = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class Ceilings:
    """flops and bytes per second in one dtype and precision on one device; on the CPU with the threads set now.

    gemm:      a square product of 1536 (on a GPU, which that would not fill, of 8192), the best of the libraries at
               hand, which `gemm_library` names.
    bandwidth: copying 256 MiB; bytes read and written both count.
    """

    gemm: float
    gemm_library: str
    bandwidth: float


def measure(
    dtype: torch.dtype = torch.float32, device: torch.device = CPU, repeats: int = 8, precision: str = "full"
) -> Ceilings:
    """The best of `repeats` runs each. precision: of the product, "tf32" and "bf16" with operands so rounded."""
    n = 1536 if device.type == "cpu" else 8192
    operands = torch.bfloat16 if precision == "bf16" else dtype
    a, b, out = (torch.randn(n, n, dtype=torch.float32, device=device).to(operands) for _ in range(3))
    candidates: dict[str, Callable[[], object]] = {
        "BLAS" if device.type == "cpu" else "cuBLAS": lambda: torch.mm(a, b, out=out)
    }
    if device.type == "cpu" and operands == torch.float32 and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        candidates["oneDNN"] = lambda: linear(a, b, None, "none", [], "")
    with _tf32(precision == "tf32"):
        best = {name: min(seconds(run, device) for _ in range(repeats)) for name, run in candidates.items()}
    library = min(best, key=lambda name: best[name])
    source = torch.zeros(2**28 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(repeats))
    return Ceilings(2 * n**3 / best[library], library, 2 * source.nbytes / copy)

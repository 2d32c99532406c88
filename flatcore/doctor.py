"""What build, torch, devices, linear algebra and threads are in use, and what looks wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flatcore._C import engine
from flatcore.machine import Machine, describe

__all__ = ["diagnose", "lines"]


def diagnose() -> dict[str, Any]:
    """The machine's facts, `kernel_threads` (counted by running a loop) and `complaints`, a list of sentences."""
    machine = describe()
    threads = engine.threads_used()
    return {
        **dataclasses.asdict(machine),
        "kernel_threads": threads,
        "complaints": list(_complaints(machine, threads)),
    }


def _complaints(machine: Machine, threads: int) -> Iterator[str]:
    if threads != machine.threads:
        yield f"torch is set to {machine.threads} threads, a kernel loop ran on {threads}: OpenMP is limited elsewhere"
    if machine.threads > machine.cores:
        yield (
            f"torch is set to {machine.threads} threads on {machine.cores} cores, which is slower than one each; "
            f"call torch.set_num_threads({machine.cores})"
        )
    if machine.torch_cuda != "none" and machine.built_for_cuda == "none":
        yield (
            f"torch has CUDA {machine.torch_cuda} but flatcore was built without it; "
            "install nvcc and rebuild with pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    if machine.onednn == "none":
        yield "oneDNN is switched off or missing, so convolutions are slow; see torch.backends.mkldnn"
    if machine.cpu_capability in ("DEFAULT", "NO AVX"):
        yield f"torch uses the instruction set {machine.cpu_capability}, without AVX2; unset ATEN_CPU_CAPABILITY"


_LABELS = {
    "flatcore": "flatcore",
    "built_for_torch": "built for torch",
    "built_for_cuda": "built with CUDA",
    "torch": "torch",
    "torch_cuda": "torch's CUDA",
    "python": "Python",
    "system": "system",
    "processor": "processor",
    "cores": "cores to run on",
    "threads": "torch threads",
    "kernel_threads": "kernel threads, counted",
    "blas": "BLAS",
    "onednn": "oneDNN",
    "cpu_capability": "instruction set",
    "devices": "CUDA devices",
}


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts for a person, then the complaints."""
    width = max(map(len, _LABELS.values()))
    for name, label in _LABELS.items():
        value = facts[name]
        yield f"{label:{width}}  {', '.join(value) or 'none' if isinstance(value, tuple) else value}"
    yield ""
    yield from facts["complaints"] or ["nothing looks wrong"]

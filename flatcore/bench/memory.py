"""Peak memory of a computation, counted by torch's allocator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile

_CPU = torch.device("cpu")


def peak_bytes(run: Callable[[], object], device: torch.device = _CPU) -> int:
    """The most bytes that `run` holds on the device at once beyond what was held before, its result included.

    Every tensor counts; what MKL, oneDNN, cuBLAS and the C library allocate for themselves does not.
    """
    return _cuda_peak(run, device) if device.type == "cuda" else _cpu_peak(run)


def _cuda_peak(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = run()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - held


def _cpu_peak(run: Callable[[], object]) -> int:
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    del kept
    events = recorded.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == MEMORY_EVENT_NAME
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library reports every start and stop on the process's stderr, past Python."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)

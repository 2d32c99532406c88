"""How many bytes the parts of a computation may hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Budget:
    """Fixed when an objective is made, so that a product is cut into the same pieces every time.

    data:       batches held in memory.
    states:     activations and their adjoints kept between products.
    directions: tangents and cotangents of one product.
    """

    data: int
    states: int
    directions: int

    @property
    def total(self) -> int:
        """What `of` gives the same budget for, but for bytes."""
        return max(self.data + self.states + self.directions, 1)

    @staticmethod
    def of(memory: int | None, device: torch.device) -> Budget:
        if memory is not None and (not isinstance(memory, int) or isinstance(memory, bool) or memory <= 0):
            raise ValueError(f"memory: expected a positive number of bytes, got {memory!r}")
        total = free_bytes(device) // 2 if memory is None else memory
        return Budget(total // 4, total // 2, total // 4)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device: for the CPU what the system and the control group leave."""
    if device.type == "cuda":
        # What torch keeps for its next tensors is free for ours.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _available()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return max(min(free, limit - used), 0) if limit is not None and used is not None else free


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def readable(count: float) -> str:
    """A number of bytes for a person."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"

"""What a result was computed with: versions, threads, linear algebra, devices."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass

import torch

import flatcore
from flatcore import _build
from flatcore.tuning import processor


@dataclass(frozen=True)
class Machine:
    """`built_for_cuda` and `torch_cuda` are version numbers or "none"; `devices` names the CUDA devices torch sees."""

    flatcore: str
    built_for_torch: str
    built_for_cuda: str
    torch: str
    torch_cuda: str
    python: str
    system: str
    processor: str
    cores: int
    threads: int
    blas: str
    onednn: str
    cpu_capability: str
    devices: tuple[str, ...]


def describe() -> Machine:
    """The present process; nothing is run on any device."""
    configuration = torch.__config__.show()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Machine(
        flatcore=flatcore.__version__,
        built_for_torch=_build.TORCH_VERSION,
        built_for_cuda=_build.CUDA,
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda or "none",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        cores=available_cores(),
        threads=torch.get_num_threads(),
        blas=_found(r"BLAS_INFO=(\w+)", configuration),
        onednn=_found(r"(?:MKL-DNN|oneDNN) v([\d.]+)", configuration) if _has_onednn() else "none",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        devices=tuple(torch.cuda.get_device_name(index) for index in cuda),
    )


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())


def available_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else "unknown"

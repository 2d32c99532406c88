"""Remembers between processes which library multiplies which matrices faster on this machine.

What is measured and when: csrc/engine/gemm_choice.h. The environment variable FLATCORE_GEMM overrides it: "blas" or
"onednn" take one library for all, "measure" is the default.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import re
from pathlib import Path

import torch

from flatcore._C import engine
from flatcore.errors import warn

VARIABLE = "FLATCORE_GEMM"
POLICIES = ("measure", "blas", "onednn")


# Of a class: batch, m, n, k, left and right operand transposed, threads (GemmClass in csrc/engine/gemm_choice.h).
_CLASS = re.compile(r"\d{1,9}( \d{1,9}){3} [01] [01] \d{1,9}", re.ASCII)


def cache_file() -> Path | None:
    """Where the choices of this user are kept; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "flatcore" / "gemm.json"
    except RuntimeError:
        return None


def machine() -> str:
    """What a measured choice holds for."""
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {processor()}"


def start() -> None:
    """Apply FLATCORE_GEMM; load what was measured before, and save at exit what is new."""
    policy = os.environ.get(VARIABLE, POLICIES[0])
    if policy not in POLICIES:
        warn(f"{VARIABLE}: expected one of {', '.join(POLICIES)}, got {policy!r}; measuring")
        policy = POLICIES[0]
    engine.set_gemm_policy(policy)
    if policy == "measure":
        path = cache_file()
        if path is None:
            return
        known = load(path)
        engine.set_gemm_choices(known)
        atexit.register(_save_new, path, known)


def load(path: Path) -> dict[str, bool]:
    """The choices in a file; none where it is missing, damaged, of another form or of another machine."""
    try:
        found = json.loads(path.read_text())
        if found["machine"] != machine():
            return {}
        choices: dict[str, bool] = found["choices"]
        fits = all(_CLASS.fullmatch(name) and isinstance(onednn, bool) for name, onednn in choices.items())
        return choices if fits else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def save(path: Path, choices: dict[str, bool]) -> None:
    """Write in one step, so that a reader never sees half a file. A folder that cannot be written is no error."""
    text = json.dumps({"machine": machine(), "choices": choices}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(path)


def _save_new(path: Path, known: dict[str, bool]) -> None:
    choices = engine.gemm_choices()
    if choices.keys() - known.keys():
        save(path, load(path) | choices)


def processor() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    with contextlib.suppress(OSError):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if named:
            return named.group(1).strip()
    return platform.processor() or "unknown"

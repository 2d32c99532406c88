"""Processes that prepare at once and are timed one after another, with stand-ins for what they prepare and time."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_products
from flatcore.bench import Ceilings

# Leaves the times of its turn, which must not meet another's.
STAND_IN = """
import json, sys, time
from pathlib import Path
name, K, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if name == "dies":
    sys.exit("it cannot be prepared")
if name == "sleeps":
    time.sleep(1000)
(folder / "ready").touch()
while not (folder / "rates.json").exists():
    time.sleep(0.01)
begin = time.time()
time.sleep(0.1)
rates = json.loads((folder / "rates.json").read_text())
found = {"full": [begin, time.time(), rates["full"]["gemm"]], "tf32": "no instructions"}
(folder / "figures.json").write_text(json.dumps(found))
"""


def test_prepared_at_once_and_timed_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    popen, started = subprocess.Popen, []

    def stand_in(command: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(popen([sys.executable, "-c", STAND_IN, *command[3:]], **options))
        return started[-1]

    monkeypatch.setattr(gpu_products.subprocess, "Popen", stand_in)
    monkeypatch.setattr(gpu_products, "LAST_TURN", 60.0)
    go, found, begun = tmp_path / "go", {}, []

    def rates() -> dict[str, Ceilings]:
        begun.append(time.time())
        return {p: Ceilings(2.0, "none", 1.0) for p in gpu_products.PRECISIONS}

    def left() -> float:
        return begun[0] + 60 - time.time() if len(found) < 10 else 0.0  # all but those that sleep

    timer = threading.Timer(0.5, go.touch)
    timer.start()
    called = time.time()
    gpu_products.run(["one", "dies", "sleeps", "two"], False, go, rates, left, found.__setitem__)
    timer.join()
    assert begun[0] >= called + 0.5  # not before it was told to
    turns = sorted(found[f"{name} K={K} full"] for name in ("one", "two") for K in gpu_products.VECTORS)
    assert len(turns) == 4 and all(turn[2] == 2.0 for turn in turns)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(turns))
    assert found["one K=8 tf32"] == "no instructions"
    assert found["dies K=1 full"] == "it cannot be prepared"
    assert found["sleeps K=8 full"] == "not prepared in time"
    assert all(process.poll() is not None for process in started)

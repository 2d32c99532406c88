"""The step "products" of `benchmarks.gpu`: every workload by flatcore in every precision, and by bare torch in float32.

torch.compile takes minutes over all of them. So every workload and number of vectors has a process of its own: all
prepare at once, beside whatever else the machine does then, and are timed one after another, when it is quiet.

    python -m benchmarks.gpu_products WORKLOAD K FOLDER [--quick]

is such a process: it leaves FOLDER/ready when it has prepared, waits for FOLDER/rates.json, and leaves
FOLDER/figures.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flatcore.bench import WORKLOADS, Ceilings, Comparison, Prepared, Setting, prepared

PRECISIONS = ("full", "tf32", "bf16")
VECTORS = (1, 8)
# Of bare torch, beside flatcore: eager, mapped and compiled. The others are slower and take minutes to compile.
EAGER = ("retained double backward", "double backward, batched", "vmap(linearize)", "vmap(jvp(grad))")
COMPILED = ("compiled vmap(linearize)", "compiled vmap(jvp(grad))")
PREPARE = 45.0  # seconds of one way at most
LAST_TURN = 10.0  # seconds that one process is timed at most
# One process compiles in one thread: as many as the machine has cores run at once.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}

Rates = dict[str, Ceilings]  # by precision


@dataclass(frozen=True)
class Process:
    """One workload and number of vectors."""

    name: str
    folder: Path
    running: subprocess.Popen[str]

    @staticmethod
    def started(workload: str, K: int, folder: Path, quick: bool) -> Process:
        folder.mkdir()
        command = [sys.executable, "-m", "benchmarks.gpu_products", workload, str(K), str(folder)]
        with (folder / "log").open("w") as log:
            running = subprocess.Popen(
                [*command, *(["--quick"] if quick else [])],
                env={**os.environ, **ENVIRONMENT},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return Process(f"{workload} K={K}", folder, running)

    @property
    def ready(self) -> bool:
        """Also where it has ended."""
        return (self.folder / "ready").exists() or self.running.poll() is not None

    def end(self) -> None:
        self.running.kill()
        self.running.wait()

    def timed(self, rates: Rates, seconds: float) -> dict[str, Any]:
        """What it found: precision -> figure, or a text where it failed."""
        whole(self.folder / "rates.json", {p: dataclasses.asdict(rate) for p, rate in rates.items()})
        try:
            self.running.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
        found = self.folder / "figures.json"
        if found.exists():
            return json.loads(found.read_text())
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines() or ["no output"]
        return {"full": lines[-1][:300]}


def run(
    names: list[str],
    quick: bool,
    go: Path | None,
    rates: Callable[[], Rates],
    left: Callable[[], float],
    add: Callable[[str, Any], None],
) -> None:
    """Prepares at once; as soon as there is a file `go`, times one after another, the first of `names` first where
    several are ready. add(name, figure), a text for what failed. left(): seconds since `go`, or since the start without
    it, that may still be spent.
    """
    with tempfile.TemporaryDirectory() as folder:
        waiting = [
            Process.started(name, K, Path(folder, f"{name}-{K}"), quick) for name in names for K in VECTORS
        ]
        try:
            while go is not None and not go.exists():
                time.sleep(0.1)
            measured = rates()
            while waiting and left() > 0:
                process = next((p for p in waiting if p.ready), None)
                if process is None:
                    time.sleep(0.1)
                    continue
                waiting.remove(process)
                for precision, figure in process.timed(measured, min(left(), LAST_TURN)).items():
                    add(f"{process.name} {precision}", figure)
            for process in waiting:
                add(f"{process.name} full", "not prepared in time")
        finally:
            for process in waiting:
                process.end()


def whole(path: Path, document: Any) -> None:
    """Written under another name first, so that no one reads half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document))
    part.rename(path)


def _prepared(workload: str, K: int, precision: str, quick: bool) -> Prepared:
    theirs = precision == "full"  # bare torch is in float32 whatever flatcore is in: once is enough
    compiled = theirs and not quick
    found = prepared(
        WORKLOADS[workload],
        K,
        setting=Setting(device="cuda", precision=precision),
        compiled=compiled,
        prepare_limit=PREPARE,
        only=((*EAGER, *COMPILED) if compiled else EAGER) if theirs else EAGER[:1],
    )
    torch.cuda.empty_cache()  # of the others, who prepare too
    return found


def _in_brief(result: Comparison, rates: Ceilings) -> dict[str, Any]:
    ours = result.timing("flatcore")
    return {
        "parameters": result.parameters,
        "gemm_share": result.flops / ours.median / rates.gemm,
        "floors": ours.median / result.floor,
        "ways": {
            t.way: {"seconds": t.median, "error": t.error, "peak_bytes": t.peak_bytes} for t in result.timings
        },
        "left_out": result.left_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("K", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    ways: dict[str, Prepared] = {}
    found: dict[str, Any] = {}

    def attempt(precision: str, results: dict[str, Any], work: Callable[[], Any]) -> None:
        """One precision that fails must not take the others along."""
        try:
            results[precision] = work()
        except Exception as failure:
            found[precision] = f"{type(failure).__name__}: {(str(failure).strip() or '-').splitlines()[0]}"

    for p in PRECISIONS:
        attempt(p, ways, lambda: _prepared(given.workload, given.K, p, given.quick))  # noqa: B023
    (given.folder / "ready").touch()
    turn = given.folder / "rates.json"
    while not turn.exists():
        time.sleep(0.05)
    rates = {p: Ceilings(**rate) for p, rate in json.loads(turn.read_text()).items()}
    for p, way in ways.items():
        attempt(p, found, lambda: _in_brief(way.timed(rates[p], rounds=5, limit=2.0), rates[p]))  # noqa: B023
        whole(given.folder / "figures.json", found)
    whole(given.folder / "figures.json", found)


if __name__ == "__main__":
    main()

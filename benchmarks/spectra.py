"""Eigenpairs, densities and traces by flatcore and by what other packages offer, at equal residuals or equal work.

    python -m benchmarks.spectra digits [--rounds 3] [--threads 2]
    python -m benchmarks.spectra gpt2 [--storage bf16] [--precision bf16]

digits: a tanh net 64-256-256-10 (85,002 parameters) on the 1,437 training digits, trained, float32, one batch.
  The ten eigenvalues largest in absolute value to a relative residual of 1e-3: `eigsh` against ARPACK (scipy) over
  curvlinops' Hessian, told the same tolerance; the residuals of both are checked by products of flatcore in float64.
  A density of 8 probes and 64 steps: `spectral_density` against a loop of one Lanczos recurrence per probe, fully
  reorthogonalised, over curvlinops' products, one vector each.
gpt2: GPT-2 small with random weights, one sequence of 128 tokens: the five eigenvalues largest in absolute value, with
  the peaks of the process's resident size and of its part that is no file's.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch import Tensor, nn

import flatcore as fc
from examples.digits import digits
from flatcore.bench import peers
from flatcore.bench.workloads import MLP, WORKLOADS
from flatcore.machine import describe
from flatcore.results import Eigenpairs

TOP, TOLERANCE = 10, 1e-3
PROBES, STEPS = 8, 64


def trained_net() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    batch, _ = digits()
    model = MLP(64, 256, 256, 10)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimiser.step()
    return model.eval(), batch


class Counted:
    """Products of another package with one vector each, counted."""

    def __init__(self, product: Callable[[Tensor], Tensor], size: int) -> None:
        self.product, self.size, self.count = product, size, 0

    def one(self, v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.count += 1
        return self.product(torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32))[None])[0].numpy()

    def operator(self) -> LinearOperator:
        return LinearOperator((self.size, self.size), matvec=self.one, dtype=np.float32)


def lanczos(product: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], v: np.ndarray[Any, Any]) -> None:
    """`STEPS` steps from v with full reorthogonalisation: what a density needs of one probe."""
    basis = np.empty((STEPS, len(v)), dtype=np.float32)
    alpha, beta = np.zeros(STEPS), np.zeros(STEPS)
    v = v / np.linalg.norm(v)
    for step in range(STEPS):
        basis[step] = v
        w = product(v)
        alpha[step] = w @ v
        for _ in range(2):
            w = w - basis[: step + 1].T @ (basis[: step + 1] @ w)
        beta[step] = np.linalg.norm(w)
        v = w / beta[step]
    np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))


class PeakMemory:
    """Within: the peaks of the process's resident size and of its anonymous part, sampled a hundred times a second."""

    def __enter__(self) -> PeakMemory:
        self.resident = self.anonymous = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {
                line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Vm", "Rss"))
            }
            self.resident = max(self.resident, 1024 * sizes["VmRSS"])
            self.anonymous = max(self.anonymous, 1024 * sizes["RssAnon"])


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


@click.group()
def main() -> None:
    """Spectra by flatcore and by other packages."""


@main.command("digits")
@click.option("--rounds", default=3, show_default=True, help="Timings of each way, interleaved.")
@click.option("--threads", default=2, show_default=True, help="torch.set_num_threads.")
def digits_net(rounds: int, threads: int) -> None:
    """Eigenpairs and a density of a net on digits."""
    torch.set_num_threads(threads)
    model, batch = trained_net()
    loss = nn.CrossEntropyLoss()
    size = sum(p.numel() for p in model.parameters())
    print(describe())
    print(f"P = {size:,}, loss {loss(model(batch[0]), batch[1]).item():.4f}, {threads} threads, float32")
    theirs = Counted(peers.curvlinops_hessian(model, loss, batch), size)

    def ours() -> fc.Hessian:
        return fc.Hessian(fc.Objective(model, loss, batch))

    wide = MLP(64, 256, 256, 10).double().eval()
    wide.load_state_dict(model.state_dict())
    exact = fc.Hessian(fc.Objective(wide, loss, (batch[0].double(), batch[1])))

    def worst_residual(values: Tensor, vectors: Tensor) -> float:
        residuals = (exact @ vectors.double() - vectors.double() * values.double()).norm(dim=0)
        return (residuals / values.abs().max()).max().item()

    probes = np.random.default_rng(0).choice([-1.0, 1.0], size=(PROBES, size)).astype(np.float32)
    H = ours()
    H.plan()
    ways: dict[str, Callable[[], Any]] = {
        "flatcore eigsh": lambda: fc.eigsh(ours(), TOP, tol=TOLERANCE),
        "flatcore eigsh, capture done": lambda: fc.eigsh(H, TOP, tol=TOLERANCE),
        "ARPACK over curvlinops": lambda: arpack(theirs.operator(), k=TOP, which="LM", tol=TOLERANCE),
        "flatcore density": lambda: fc.spectral_density(H, probes=PROBES, steps=STEPS),
        "one-vector loops over curvlinops": lambda: [lanczos(theirs.one, v) for v in probes],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    notes: dict[str, str] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            theirs.count = 0
            seconds, result = timed(run)
            times[name].append(seconds)
            if isinstance(result, Eigenpairs):
                notes[name] = (
                    f"{result.matvecs} products, residual {worst_residual(result.values, result.vectors):.1e}"
                )
            elif name.startswith("ARPACK"):
                values, vectors = (torch.from_numpy(np.ascontiguousarray(part)) for part in result)
                notes[name] = f"{theirs.count} products, residual {worst_residual(values, vectors):.1e}"
            else:
                notes[name] = f"{theirs.count or result.matvecs} products"
    for name, seconds in times.items():
        print(
            f"{name}: {statistics.median(seconds):.3f} s [{min(seconds):.3f}, {max(seconds):.3f}], {notes[name]}"
        )


@main.command()
@click.option("--storage", default=None, help="Of the Krylov basis; by default what fits.")
@click.option("--memory", default=None, type=int, help="Bytes for the Krylov basis.")
@click.option(
    "--precision", default="full", show_default=True, help="Of a draft that the search starts with."
)
@click.option("--tol", default=1e-2, show_default=True)
@click.option("--max-matvecs", default=None, type=int, help="Products, at most.")
@click.option("--threads", default=2, show_default=True)
def gpt2(
    storage: str | None, memory: int | None, precision: str, tol: float, max_matvecs: int | None, threads: int
) -> None:
    """Five eigenpairs of GPT-2 small."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(describe())
    with PeakMemory() as peak:
        model, loss, batch = WORKLOADS["gpt2"].build()
        objective = fc.Objective(model, loss, batch)
        draft = fc.Hessian(objective, precision="bf16") if precision == "bf16" else None
        seconds, pairs = timed(
            lambda: fc.eigsh(
                fc.Hessian(objective),
                5,
                tol=tol,
                block_size=2,
                storage=storage,
                memory=memory,
                draft=draft,
                max_matvecs=max_matvecs,
                progress=True,
            )
        )
    print(pairs.values, pairs.residuals / pairs.scale)
    print(
        f"{pairs.status}: {seconds:.0f} s, {pairs.matvecs} products (and {pairs.draft_matvecs} of the draft), "
        f"basis of {pairs.basis_rows} rows in {pairs.storage}, peak resident size {peak.resident / 1e9:.2f} GB, "
        f"anonymous {peak.anonymous / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()

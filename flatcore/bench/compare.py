"""Times a Hessian-vector product by flatcore and by everything else in turn, after checking them all."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatcore as fc
from flatcore.bench import peers
from flatcore.bench.bare_torch import Directions, Way, gradient_of, joined, loss_of_parameters, split, ways
from flatcore.bench.ceilings import Ceilings, seconds
from flatcore.bench.memory import peak_bytes
from flatcore.bench.workloads import Batch, Loss, Workload

FLATCORE = "flatcore"
_LEAST_ROUNDS = 3
_LEAST_SECONDS = 0.02  # of one timing: what is faster is called several times
_LARGEST_ERROR = 1e-3  # in float32 an honest product is far below, a wrong one far above


@dataclass(frozen=True)
class Timing:
    """One way on one workload. `kind`: "flatcore", "torch" or "peer".

    seconds:    per vector, one entry per round, each the mean of as many calls as fill 20 ms.
    error:      of the product, relative to float64.
    peak_bytes: of one product together with what the way keeps for it, directions and result included.
    """

    way: str
    kind: str
    seconds: tuple[float, ...]
    error: float
    peak_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """All ways on one workload with K directions, fastest first.

    gradient:     seconds of one gradient by autograd, median over the same rounds.
    flops:        of one flatcore product, per vector.
    floor:        seconds per vector that those flops take at the machine's GEMM rate, plus the least bytes (weights
                  once, directions and products once each) at its bandwidth.
    left_out:     way -> why it does not run here.
    """

    workload: str
    title: str
    K: int
    parameters: int
    timings: tuple[Timing, ...]
    gradient: float
    flops: float
    floor: float
    left_out: dict[str, str]

    def timing(self, way: str) -> Timing:
        return next(t for t in self.timings if t.way == way)

    def best(self, kind: str) -> Timing | None:
        """The fastest way of a kind."""
        return min((t for t in self.timings if t.kind == kind), key=lambda t: t.median, default=None)


Run = Callable[[], Tensor | Directions]  # computes the products, flat (K, P) or split


@dataclass(frozen=True)
class _Candidate:
    kind: str
    prepare: Callable[[], Run]


def compare(
    workload: Workload,
    K: int,
    ceilings: Ceilings,
    *,
    rounds: int,
    limit: float,
    compiled: bool,
    only: Collection[str] = (),
    seed: int = 0,
) -> Comparison:
    """Time every way on `workload`.

    rounds, limit: timings of each way; no new round begins after `limit` seconds, but three there are.
    compiled:      also the bare-torch ways through torch.compile.
    only:          names of the ways beside flatcore; empty: all.

    Raises AssertionError where flatcore's product is wrong; any other way that is wrong is left out with its error.
    """
    torch.manual_seed(seed)
    model, loss, batch = workload.build()
    evaluate, parameters = loss_of_parameters(model, loss, batch)
    V = torch.randn(K, sum(p.numel() for p in parameters))
    directions = split(V, parameters)
    H = fc.Hessian(fc.Objective(model, loss, batch))
    flops = H.plan().flops(K) / K
    exact = _reference(workload, seed, V[:1])

    candidates = {FLATCORE: _Candidate(FLATCORE, lambda: _flatcore(model, loss, batch, V))}
    for name, prepare in ways(evaluate, parameters, compiled).items():
        candidates[name] = _Candidate("torch", _bound(prepare, directions))
    for name in peers.installed():
        candidates[name] = _Candidate("peer", _bound_peer(peers.PEERS[name], model, loss, batch, V))
    if only:
        unknown = set(only) - candidates.keys()
        if unknown:
            raise ValueError(f"way: expected some of {', '.join(candidates)}, got {min(unknown)!r}")
        candidates = {name: c for name, c in candidates.items() if name == FLATCORE or name in only}

    runs: dict[str, Run] = {}
    errors, peaks, left_out = {}, {}, {}
    with math_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's transforms and compiler
        for name, candidate in candidates.items():
            try:
                run, product, peaks[name] = _first(candidate)
            except Exception as failure:  # whatever another package or the compiler raises
                if name == FLATCORE:
                    raise
                left_out[name] = f"{type(failure).__name__}: {(str(failure).strip() or '-').splitlines()[0]}"
                continue
            errors[name] = ((product[:1].double() - exact).norm() / exact.norm()).item()
            if errors[name] < _LARGEST_ERROR:
                runs[name] = run
            elif name == FLATCORE:
                raise AssertionError(f"{workload.name}: flatcore's product is wrong by {errors[name]:.1e}")
            else:
                left_out[name] = f"its product is wrong by {errors[name]:.1e}"
        times, gradients = _interleaved(runs, lambda: gradient_of(evaluate, parameters), rounds, limit)
    timings = [
        Timing(name, candidates[name].kind, tuple(t / K for t in times[name]), errors[name], peaks[name])
        for name in runs
    ]
    least_bytes = V.element_size() * V.shape[1] * (2 + 1 / K)
    return Comparison(
        workload.name,
        workload.title,
        K,
        V.shape[1],
        tuple(sorted(timings, key=lambda t: t.median)),
        statistics.median(gradients),
        flops,
        flops / ceilings.gemm + least_bytes / ceilings.bandwidth,
        left_out,
    )


@contextmanager
def math_attention() -> Iterator[None]:
    """torch differentiates fused attention once only; products by autograd need its plain form."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _reference(workload: Workload, seed: int, V: Tensor) -> Tensor:
    """The products in float64 by double backward, from the same float32 parameters and data."""
    torch.manual_seed(seed)
    model, loss, batch = workload.build()
    wide = tuple(t.double() if t.is_floating_point() else t for t in batch)
    evaluate, parameters = loss_of_parameters(model.double(), loss, wide)
    with math_attention():
        way = ways(evaluate, parameters, compiled=False)["retained double backward"]()
        return joined(way(split(V.double(), parameters)))


def _flatcore(model: nn.Module, loss: Loss, batch: Batch, V: Tensor) -> Run:
    H = fc.Hessian(fc.Objective(model, loss, batch))
    H.plan()  # captured, so that its memory is the product's
    return lambda: (H @ V.T).T


def _bound(prepare: Callable[[], Way], V: Directions) -> Callable[[], Run]:
    def bound() -> Run:
        way = prepare()
        return lambda: way(V)

    return bound


def _bound_peer(
    prepare: Callable[[nn.Module, Loss, Batch], peers.FlatWay],
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    V: Tensor,
) -> Callable[[], Run]:
    def bound() -> Run:
        way = prepare(model, loss, batch)
        return lambda: way(V)

    return bound


def _first(candidate: _Candidate) -> tuple[Run, Tensor, int]:
    """The prepared way, its product, and the peak memory of both."""
    prepared: list[Run] = []
    products: list[Tensor | Directions] = []
    if candidate.kind == FLATCORE:
        prepared.append(candidate.prepare())

    def run_once() -> None:
        if not prepared:
            prepared.append(candidate.prepare())
        products.append(prepared[0]())

    peak = peak_bytes(run_once)
    product = products[0]
    return prepared[0], product if isinstance(product, Tensor) else joined(product), peak


def _interleaved(
    runs: dict[str, Run], gradient: Callable[[], object], rounds: int, limit: float
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every run and of a gradient, one entry per round."""
    everything: dict[str, Callable[[], object]] = {"": gradient, **runs}
    calls = {name: max(1, math.ceil(_LEAST_SECONDS / seconds(run))) for name, run in everything.items()}
    times: dict[str, list[float]] = {name: [] for name in everything}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() - begin > limit:
            break
        for name, run in everything.items():
            times[name].append(seconds(lambda: [run() for _ in range(calls[name])]) / calls[name])  # noqa: B023
    return times, times.pop("")

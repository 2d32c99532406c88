"""Times a product by flatcore and by everything else in turn, after checking them all."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatcore.bench.bare_torch import gradient_of, joined, loss_of_parameters, split
from flatcore.bench.candidates import FLATCORE, Candidate, Run, candidates, torch_ways
from flatcore.bench.ceilings import Ceilings, seconds
from flatcore.bench.memory import peak_bytes
from flatcore.bench.setting import DEFAULT, LARGEST_ERROR, Setting
from flatcore.bench.timeout import at_most
from flatcore.bench.workloads import Workload

_LEAST_ROUNDS = 3
_LEAST_SECONDS = 0.02  # of one timing: what is faster is called several times


@dataclass(frozen=True)
class Timing:
    """One way on one workload. `kind`: "flatcore", "torch", "jax" or "peer".

    seconds:    per vector, one entry per round, each the mean of as many calls as fill 20 ms.
    error:      of the product, relative to float64.
    peak_bytes: of one product together with what the way keeps for it, directions and result included; None where
                another allocator than torch's holds it.
    """

    way: str
    kind: str
    seconds: tuple[float, ...]
    error: float
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """All ways on one workload with K directions, fastest first.

    gradient:     seconds of one gradient by autograd, median over the same rounds.
    flops:        of one flatcore product, per vector.
    floor:        seconds per vector that those flops take at the machine's GEMM rate, in the setting's precision, plus
                  the least bytes (weights once, directions and products once each) at its bandwidth.
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
    setting: Setting = DEFAULT

    def timing(self, way: str) -> Timing:
        return next(t for t in self.timings if t.way == way)

    def best(self, kind: str) -> Timing | None:
        """The fastest way of a kind."""
        return min((t for t in self.timings if t.kind == kind), key=lambda t: t.median, default=None)


@dataclass(frozen=True)
class Prepared:
    """What `compare` times: every way on one workload, compiled and checked."""

    workload: Workload
    V: Tensor
    setting: Setting
    flops: float
    runs: dict[str, Run]
    kinds: dict[str, str]
    errors: dict[str, float]
    peaks: dict[str, int | None]
    left_out: dict[str, str]
    gradient: Run

    def timed(self, ceilings: Ceilings, *, rounds: int, limit: float) -> Comparison:
        """rounds, limit: as of `compare`."""
        with _as_compared():
            times, gradients = _interleaved(
                self.runs, self.gradient, self.setting.torch_device, rounds, limit
            )
        K, P = self.V.shape
        timings = [
            Timing(
                name, self.kinds[name], tuple(t / K for t in times[name]), self.errors[name], self.peaks[name]
            )
            for name in self.runs
        ]
        least_bytes = self.V.element_size() * P * (2 + 1 / K)
        return Comparison(
            self.workload.name,
            self.workload.title,
            K,
            P,
            tuple(sorted(timings, key=lambda t: t.median)),
            statistics.median(gradients),
            self.flops,
            self.flops / ceilings.gemm + least_bytes / ceilings.bandwidth,
            self.left_out,
            self.setting,
        )


def compare(
    workload: Workload,
    K: int,
    ceilings: Ceilings,
    *,
    setting: Setting = DEFAULT,
    rounds: int,
    limit: float,
    compiled: bool,
    prepare_limit: float = 300.0,
    only: Collection[str] = (),
    seed: int = 0,
) -> Comparison:
    """Time every way on `workload`.

    rounds, limit: timings of each way; no new round begins after `limit` seconds, but three there are.
    The others: as of `prepared`, and so is what is raised.
    """
    ways = prepared(
        workload, K, setting=setting, compiled=compiled, prepare_limit=prepare_limit, only=only, seed=seed
    )
    return ways.timed(ceilings, rounds=rounds, limit=limit)


def prepared(
    workload: Workload,
    K: int,
    *,
    setting: Setting = DEFAULT,
    compiled: bool,
    prepare_limit: float = 300.0,
    only: Collection[str] = (),
    seed: int = 0,
) -> Prepared:
    """Every way on `workload`, ready to be timed.

    compiled:      also the bare-torch ways through torch.compile.
    prepare_limit: seconds after which a way that is still being prepared or compiled is left out.
    only:          names of the ways beside flatcore; empty: all.

    Raises AssertionError where flatcore's product is wrong; any other way that is wrong is left out with its error.
    """
    device = setting.torch_device
    built = workload.at(setting.torch_dtype, device, seed)
    evaluate, parameters = loss_of_parameters(*built)
    V = torch.randn(K, sum(p.numel() for p in parameters), dtype=setting.torch_dtype).to(device)
    flops = setting.product_operator(*built).plan().flops(K) / K
    exact = _reference(workload, setting, seed, V[:1])
    listed = candidates(built, V, setting, compiled=compiled, only=only)

    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    left_out: dict[str, str] = {}
    with _as_compared():
        for name, candidate in listed.items():
            try:
                if name == FLATCORE:
                    run, product, peaks[name] = _first(candidate, device)
                else:
                    with at_most(prepare_limit):
                        run, product, peaks[name] = _first(candidate, device)
            except Exception as failure:  # whatever another package or the compiler raises
                if name == FLATCORE:
                    raise
                left_out[name] = _reason(failure)
                continue
            errors[name] = ((product[:1].double() - exact).norm() / exact.norm()).item()
            allowed = setting.largest_error if name == FLATCORE else LARGEST_ERROR[setting.dtype]
            if errors[name] < allowed:
                runs[name] = run
            elif name == FLATCORE:
                raise AssertionError(f"{workload.name}: flatcore's product is wrong by {errors[name]:.1e}")
            else:
                left_out[name] = f"its product is wrong by {errors[name]:.1e}"
    kinds = {name: listed[name].kind for name in runs}
    return Prepared(
        workload,
        V,
        setting,
        flops,
        runs,
        kinds,
        errors,
        peaks,
        left_out,
        lambda: gradient_of(evaluate, parameters),
    )


@contextmanager
def _as_compared() -> Iterator[None]:
    """What all ways are prepared and timed under."""
    with math_attention(), float32_convolutions(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's transforms and compiler
        yield


def _reason(failure: BaseException) -> str:
    """The first line of what went wrong; the compiler wraps that once more."""
    cause = getattr(failure, "inner_exception", failure)
    return f"{type(cause).__name__}: {(str(cause).strip() or '-').splitlines()[0]}"


@contextmanager
def math_attention() -> Iterator[None]:
    """torch differentiates fused attention once only; products by autograd need its plain form."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """cuDNN rounds the operands of float32 convolutions to 11 bits unless told not to; no product here may."""
    if not torch.cuda.is_available():
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False
    ):
        yield


def _reference(workload: Workload, setting: Setting, seed: int, V: Tensor) -> Tensor:
    """The products in float64 by reverse mode alone, from the same parameters and data."""
    built = workload.at(torch.float64, setting.torch_device, seed)
    with math_attention():
        way = next(iter(torch_ways(built, setting.operator, compiled=False).values()))()
        return joined(way(split(V.double(), tuple(built[0].parameters()))))


def _first(candidate: Candidate, device: torch.device) -> tuple[Run, Tensor, int | None]:
    """The prepared way, its product, and the peak memory of both."""
    prepared: list[Run] = []
    products: list[Tensor] = []
    if candidate.kind == FLATCORE:
        prepared.append(candidate.prepare())

    def run_once() -> None:
        if not prepared:
            prepared.append(candidate.prepare())
        products.append(candidate.flat(prepared[0]()))

    peak = peak_bytes(run_once, device)
    return prepared[0], products[0], peak if candidate.counted else None


def _interleaved(
    runs: dict[str, Run], gradient: Callable[[], object], device: torch.device, rounds: int, limit: float
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every run and of a gradient, one entry per round."""
    everything: dict[str, Callable[[], object]] = {"": gradient, **runs}
    calls = {name: _calls(run, device) for name, run in everything.items()}
    times: dict[str, list[float]] = {name: [] for name in everything}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() - begin > limit:
            break
        for name, run in everything.items():
            spent = seconds(lambda: [run() for _ in range(calls[name])], device)  # noqa: B023
            times[name].append(spent / calls[name])
    return times, times.pop("")


def _calls(run: Callable[[], object], device: torch.device) -> int:
    """How many fill a timing."""
    if device.type == "cuda":
        run()  # each way has run once; flatcore records its second product, which takes as long as hundreds
    return max(1, math.ceil(_LEAST_SECONDS / seconds(run, device)))

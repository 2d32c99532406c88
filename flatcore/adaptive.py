"""Draws probes in blocks until an estimate is as certain as asked for, or changes over to an exact computation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from flatcore.environment import full_precision
from flatcore.errors import NoRowsError, warn
from flatcore.linear import LinearView, check_count, check_positive, check_seed
from flatcore.means import Samples, Smooth
from flatcore.memory import free_bytes
from flatcore.progress import Bar, progress_bar
from flatcore.results import Estimate

__all__ = ["Block", "Exact", "Options", "Source", "dense", "finite", "run"]

BLOCK = 8  # probes per product
EXACT_AT_ONCE = 64  # products up to which "auto" does not estimate at all
MAX_MATVECS = 2000
_COLUMNS = 32  # of the identity that go through at once


@dataclass(frozen=True)
class Block:
    """Samples (k, q) with the mean of a bound on their covariance (q, q) and of the size of their bias (q,)."""

    values: np.ndarray
    bound: np.ndarray
    bias: np.ndarray
    products: int


class Source(Protocol):
    """Where samples come from: ``draw`` gives those of the probes first, ..., first + count - 1.

    least_probes: before a standard error is believed.
    """

    method: str
    q: int
    least_probes: int

    def draw(self, first: int, count: int, most_products: int) -> Block: ...


@dataclass(frozen=True)
class Exact:
    """An exact way: the products it takes, all it does in products' worth, and whether "auto" may change over to it."""

    method: str
    products: int
    cost: float
    automatic: bool
    compute: Callable[[Bar], float]


@dataclass(frozen=True)
class Options:
    """The arguments that all functionals share, checked."""

    what: str
    method: str
    rtol: float
    max_matvecs: int | None
    seed: int
    progress: bool

    @staticmethod
    def checked(
        what: str,
        method: str,
        methods: tuple[str, ...],
        rtol: float,
        max_matvecs: int | None,
        seed: int,
        progress: bool,
    ) -> Options:
        if method not in methods:
            raise ValueError(f"method: {what} offers {', '.join(methods)}, got {method!r}")
        limit = None if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
        return Options(
            what, method, check_positive("rtol", rtol, 0.01), limit, check_seed(seed), bool(progress)
        )


def run(source: Source, smooth: Smooth, ways: list[Exact], options: Options, began: float) -> Estimate:
    """The estimate, or the exact value where it is asked for or cheaper, by the cheapest of the exact ``ways``."""
    exact = min(ways, key=lambda way: way.cost)
    what, limit, asked = options.what, options.max_matvecs, options.method in ("exact", "gram")
    if asked and limit is not None and limit < exact.products:
        raise ValueError(
            f"max_matvecs: the exact {what} takes {exact.products} products, got {limit}; allow as many"
        )
    budget = limit or max(MAX_MATVECS, exact.products if asked else 0)
    small = exact.cost <= EXACT_AT_ONCE and exact.products <= budget
    use_exact = asked or (options.method == "auto" and small)
    value, error, status, matvecs = 0.0, 0.0, "converged", 0
    with (
        full_precision(),
        progress_bar(what, exact.products if use_exact else budget, options.progress) as bar,
    ):
        if not use_exact:
            value, error, status, matvecs, use_exact = _sample(source, smooth, exact, options, budget, bar)
        if use_exact:
            try:
                value, error, status = exact.compute(bar), 0.0, "converged"
            except NoRowsError as failure:
                if len(ways) == 1:
                    raise
                warn(f'{what}: not by method "{exact.method}": {failure}')
                return run(source, smooth, [way for way in ways if way is not exact], options, began)
            matvecs += exact.products
    if status != "converged":
        warn(f"{what}: {status}")
    return Estimate(
        value=value,
        stderr=error,
        matvecs=matvecs,
        by_parameter=None,
        method=exact.method if use_exact else source.method,
        seed=options.seed,
        seconds=time.perf_counter() - began,
        status=status,
    )


def _sample(
    source: Source, smooth: Smooth, exact: Exact, options: Options, budget: int, bar: Bar
) -> tuple[float, float, str, int, bool]:
    """Value, error, status, products used, and whether the exact way is the cheaper one from here.

    The number of probes depends on the samples, so a spread that happens to come out small ends the run early;
    ``least_probes`` and the bound that the variance is moderated with keep that honest (tested over many seeds).
    """
    samples, used, per_probe = Samples(source.q), 0, 1
    may_change = options.method == "auto" and exact.automatic
    value, error, bias = math.nan, math.nan, math.nan
    while used < budget:
        count = min(BLOCK, (budget - used) // per_probe)
        if count == 0:
            break
        # The first block leaves room for a second one of as many steps.
        room = max(count, budget // source.least_probes * count) if samples.n == 0 else budget - used
        block = source.draw(samples.n, count, min(room, budget - used))
        samples.add(block.values, block.bound, block.bias)
        used += block.products
        per_probe = max(1, -(-block.products // count))
        value, error, bias = samples.estimate(smooth)
        allowed = options.rtol * abs(value)
        bar.update(used, f"{used} products, relative error {_ratio(error, abs(value)):.2g}")
        if samples.n < source.least_probes:
            continue
        if math.hypot(error, bias) <= allowed:
            return value, math.hypot(error, bias), "converged", used, False
        # The error falls as 1 / sqrt(n): n (error / allowed)² probes would do. No number of them mends the bias.
        more = math.inf if bias >= allowed else samples.n * (error**2 / (allowed**2 - bias**2) - 1)
        if may_change and used + exact.products <= budget and more * per_probe > exact.cost:
            return value, error, "", used, True
        if bias >= allowed:
            break
    return value, math.hypot(error, bias), _status(options, samples.n, used, value, error, bias), used, False


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _status(options: Options, n: int, used: int, value: float, error: float, bias: float) -> str:
    if bias > options.rtol * abs(value):
        return (
            f"the error of the quadrature is up to {bias:.3g} at {value:.3g} (it stands in stderr), "
            f"above rtol = {options.rtol:g}; raise steps, max_matvecs or rtol"
        )
    return (
        f"the standard error is {math.hypot(error, bias):.3g} at {value:.3g} after {n} probes and {used} products, "
        f"above rtol = {options.rtol:g}; raise max_matvecs or rtol"
    )


def dense(operator: LinearView, bar: Bar, take: Callable[[int, torch.Tensor], Any]) -> None:
    """Calls ``take(first, rows)`` with A's rows first, first + 1, ... a few at a time."""
    for first in range(0, operator.P, _COLUMNS):
        count = min(_COLUMNS, operator.P - first)
        at = torch.arange(count, device=operator.device)
        units = torch.zeros(count, operator.P, dtype=operator.dtype, device=operator.device)
        units[at, first + at] = 1
        take(first, finite(operator.apply(units)))
        bar.update(first + count, f"{first + count} products")


def eigenvalues(operator: LinearView, bar: Bar) -> np.ndarray:
    """All eigenvalues, increasing, in float64."""
    needed = 2 * 8 * operator.P**2
    if needed > free_bytes(torch.device("cpu")):
        raise ValueError(
            f"method: all P = {operator.P:,} eigenvalues take {needed / 2**30:.1f} GiB, more than is free; "
            "take the estimate"
        )
    A = np.empty((operator.P, operator.P))

    def take(first: int, rows: torch.Tensor) -> None:
        A[first : first + len(rows)] = rows.double().cpu().numpy()

    dense(operator, bar, take)
    return np.linalg.eigvalsh((A + A.T) / 2)


def finite(products: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(products).all():
        raise ValueError(
            "A: A @ V has entries that are not finite (nan or inf); "
            "check the operator, for a Hessian the loss and the parameters"
        )
    return products

"""Trace and diagonal of a symmetric operator, by random signs or exactly."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from flatcore import _C
from flatcore.environment import full_precision
from flatcore.errors import FlatcoreWarning
from flatcore.linear import LinearView, as_operator, check_count, check_positive, check_seed
from flatcore.progress import Bar, progress_bar
from flatcore.results import Estimate

__all__ = ["diagonal", "trace"]

_METHODS = ("auto", "exact", "hutchinson")
_BLOCK = 8  # probes per product
_LEAST_PROBES = 16  # before a standard error is believed
_EXACT_AT_ONCE = 64  # rows up to which "auto" does not estimate at all
_EXACT_AT_MOST = 4096  # rows up to which "auto" may change over to "exact"
_MAX_MATVECS = 2000


def trace(
    A: Any,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """tr A of the symmetric operator A, (P, P): ``value`` and ``stderr`` are floats.

    ``method``: "hutchinson": mean of <v, A v> over probes v of random signs (Hutchinson, Commun. Stat. Simul.
    Comput. 18 (1989) 1059-1076), until stderr <= rtol |value|; "exact": all P columns; "auto": exact where P
    <= 64, else Hutchinson, changing over to exact where the probes seen show that P columns (P <= 4096) are
    the cheaper way to rtol. ``max_matvecs``: products with one vector, by default 2000 for Hutchinson. rtol
    not reached by then: ``status`` says so, and a FlatcoreWarning. ``by_parameter``: the same for the
    diagonal block of each parameter, from the same products, where A has ``parameter_slices`` (name ->
    slice), else None. Raises ValueError or TypeError for bad arguments and for products that are not finite.
    """
    return _estimate("trace", _TraceSums, A, method, rtol, max_matvecs, seed, progress)


def diagonal(
    A: Any,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """diag A of the symmetric operator A, (P, P): ``value`` and ``stderr`` are (P,) float64 tensors on A's
    device.

    As ``trace``, with v * (A v) in place of <v, A v> (Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57
    (2007) 1214-1229), until the norm of stderr <= rtol times the norm of value. Single entries may be far
    less certain than that.
    """
    return _estimate("diagonal", _DiagonalSums, A, method, rtol, max_matvecs, seed, progress)


class _TraceSums:
    """Running mean and squared deviations (Welford) over probes of <v, A v>, in all and per parameter."""

    def __init__(self, operator: LinearView) -> None:
        self.slices = {"": slice(None), **(operator.parameter_slices or {})}
        self.n = 0
        self.mean = torch.zeros(len(self.slices), dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)

    def samples(self, products: torch.Tensor) -> Iterator[torch.Tensor]:
        sums = [products[:, part].sum(dim=1, dtype=torch.float64) for part in self.slices.values()]
        yield from torch.stack(sums, dim=1).cpu()

    def add(self, products: torch.Tensor) -> None:
        """``products`` (K, P): v * (A v) of K probes."""
        for sample in self.samples(products):
            self.n += 1
            away = sample - self.mean
            self.mean += away / self.n
            self.squares += away * (sample - self.mean)

    def stderr(self) -> torch.Tensor:
        return (
            (self.squares / (self.n * (self.n - 1))).sqrt()
            if self.n > 1
            else torch.full_like(self.squares, math.nan)
        )

    def error_and_size(self) -> tuple[float, float]:
        """What is compared: stderr <= rtol * size."""
        return float(self.stderr()[0]), abs(float(self.mean[0]))

    def set_exact(self, diagonal: torch.Tensor) -> None:
        self.mean = torch.stack([diagonal[part].sum() for part in self.slices.values()]).cpu()

    def results(self, exact: bool) -> dict[str, tuple[Any, Any]]:
        stderr = torch.zeros_like(self.mean) if exact else self.stderr()
        return {name: (float(self.mean[i]), float(stderr[i])) for i, name in enumerate(self.slices)}


class _DiagonalSums(_TraceSums):
    """The same for v * (A v), entry by entry."""

    def __init__(self, operator: LinearView) -> None:
        super().__init__(operator)
        self.mean = torch.zeros(operator.P, dtype=torch.float64, device=operator.device)
        self.squares = torch.zeros_like(self.mean)

    def samples(self, products: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from products.double()

    def error_and_size(self) -> tuple[float, float]:
        return float(self.stderr().norm()), float(self.mean.norm())

    def set_exact(self, diagonal: torch.Tensor) -> None:
        self.mean = diagonal

    def results(self, exact: bool) -> dict[str, tuple[Any, Any]]:
        stderr = torch.zeros_like(self.mean) if exact else self.stderr()
        return {name: (self.mean[part], stderr[part]) for name, part in self.slices.items()}


def _estimate(
    what: str,
    kind: type[_TraceSums],
    A: Any,
    method: str,
    rtol: float,
    max_matvecs: int | None,
    seed: int,
    progress: bool,
) -> Estimate:
    began = time.perf_counter()
    operator = as_operator(A)
    if method not in _METHODS:
        raise ValueError(f"method: this operator offers {', '.join(_METHODS)}, got {method!r}")
    rtol = check_positive("rtol", rtol, 0.01)
    seed = check_seed(seed)
    limit = None if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
    if method == "exact" and limit is not None and limit < operator.P:
        raise ValueError(
            f"max_matvecs: the exact {what} takes P = {operator.P} products, got {limit}; allow as many"
        )
    budget = limit or max(_MAX_MATVECS, operator.P if method == "exact" else 0)

    exact = method == "exact" or (method == "auto" and min(_EXACT_AT_ONCE, budget) >= operator.P)
    sums, matvecs = kind(operator), 0
    with full_precision(), progress_bar(what, total=operator.P if exact else budget, enabled=progress) as bar:
        if not exact:
            may_change = method == "auto" and operator.P <= _EXACT_AT_MOST
            matvecs, exact = _hutchinson(operator, sums, rtol, budget, seed, may_change, bar)
        if exact:
            sums.set_exact(_exact_diagonal(operator, bar))
            matvecs += operator.P

    status = "converged" if exact else _status(what, sums, rtol)
    if status != "converged":
        warnings.warn(f"{what}: {status}", FlatcoreWarning, stacklevel=3)
    seconds, used = time.perf_counter() - began, "exact" if exact else "hutchinson"

    def result(numbers: tuple[Any, Any], parts: dict[str, Estimate] | None) -> Estimate:
        value, stderr = numbers
        return Estimate(value, stderr, matvecs, parts, method=used, seed=seed, seconds=seconds, status=status)

    numbers = sums.results(exact)
    whole = numbers.pop("")
    has_parts = operator.parameter_slices is not None
    return result(whole, {name: result(n, None) for name, n in numbers.items()} if has_parts else None)


def _hutchinson(
    operator: LinearView, sums: _TraceSums, rtol: float, budget: int, seed: int, may_change: bool, bar: Bar
) -> tuple[int, bool]:
    """Fills ``sums`` until rtol or the budget is reached; returns the products used and whether to change to
    exact.

    The number of probes depends on the samples, so where their spread happens to come out small it stops
    early: the mean stays consistent, but at its smallest sample sizes the true error exceeds the stated one
    more often than a normal law says. _LEAST_PROBES bounds that (relative error of a standard error from n
    samples: about 1 / sqrt(2 n)).
    """
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    while sums.n < budget:
        count = min(_BLOCK, budget - sums.n)
        probes = _C.krylov.rademacher(seed, sums.n, count, operator.P, like)
        sums.add(_finite(operator.apply(probes)) * probes)
        error, size = sums.error_and_size()
        bar.update(sums.n, f"{sums.n} products, relative error {error / size if size else math.nan:.2g}")
        if sums.n < _LEAST_PROBES:
            continue
        if error <= rtol * size:
            break
        # The error falls as 1 / sqrt(n): n (error / (rtol size))² probes would do.
        probes_more = sums.n * (error / (rtol * size)) ** 2 - sums.n if size else math.inf
        if may_change and sums.n + operator.P <= budget and probes_more > operator.P:
            return sums.n, True
    return sums.n, False


def _exact_diagonal(operator: LinearView, bar: Bar) -> torch.Tensor:
    """(P,) float64, one product per column."""
    entries = torch.empty(operator.P, dtype=torch.float64, device=operator.device)
    block = max(_BLOCK, 32)
    for first in range(0, operator.P, block):
        count = min(block, operator.P - first)
        at = torch.arange(count, device=operator.device)
        units = torch.zeros(count, operator.P, dtype=operator.dtype, device=operator.device)
        units[at, first + at] = 1
        entries[first : first + count] = _finite(operator.apply(units))[at, first + at]
        bar.update(first + count, f"{first + count} products")
    return entries


def _finite(products: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(products).all():
        raise ValueError(
            "A: A @ V has entries that are not finite (nan or inf); "
            "check the operator, for a Hessian the loss and the parameters"
        )
    return products


def _status(what: str, sums: _TraceSums, rtol: float) -> str:
    error, size = sums.error_and_size()
    if error <= rtol * size and sums.n > 1:
        return "converged"
    return (
        f"the standard error of the {what} is {error:.3g} at {size:.3g} after {sums.n} products, "
        f"above rtol = {rtol:g}; raise max_matvecs or rtol"
    )

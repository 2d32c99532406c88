"""What the estimators of trace and diagonal share: counted products, running means, when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch

from flatcore import _C
from flatcore.linear import LinearView
from flatcore.means import moderated
from flatcore.progress import Bar

__all__ = ["BLOCK", "LEAST_PROBES", "DiagonalTally", "Products", "Run", "TraceTally", "exact", "hutchinson"]

BLOCK = 8  # vectors per product
LEAST_PROBES = 16  # before a standard error is believed
_EXACT_BLOCK = 32


class Products:
    """Products with A on rows, counted, and refused where they are not finite."""

    def __init__(self, operator: LinearView) -> None:
        self.P, self.dtype, self.device = operator.P, operator.dtype, operator.device
        self._operator, self.used = operator, 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        products = self._operator.apply(rows)
        finite = torch.isfinite(products).all(dim=1)
        if not finite.all():
            number = self.used + 1 + int((~finite).nonzero()[0])
            raise ValueError(
                f"A: A @ V has entries that are not finite (nan or inf) in product {number}; "
                "check the operator, for a Hessian the loss and the parameters"
            )
        self.used += len(rows)
        return products

    def probes(self, seed: int, first: int, count: int) -> torch.Tensor:
        """Rows of random signs, numbers first to first + count - 1."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return _C.krylov.rademacher(seed, first, count, self.P, like)


class TraceTally:
    """Mean of n samples of the trace, and n (n - 1) times its variance, in all and per parameter.

    ``known`` is what was got without sampling and is added to the mean.
    """

    def __init__(self, operator: LinearView, known: torch.Tensor | None = None) -> None:
        self.slices = {"": slice(None), **(operator.parameter_slices or {})}
        self.n = 0
        self.independent: float = 0  # samples whose spread would tell as much as what squares holds
        self.whole: list[float] = []  # the samples in all
        self.known = self.collect(
            torch.zeros(operator.P, dtype=torch.float64, device="cpu") if known is None else known
        )
        self.mean = torch.zeros_like(self.known)
        self.squares = torch.zeros_like(self.known)
        self.bound: torch.Tensor | None = None  # on the variance of a sample, from ``bounded`` of them
        self.bounded = 0

    def collect(self, diagonal: torch.Tensor) -> torch.Tensor:
        """Of the entries of a diagonal, (P,) float64, what is estimated."""
        return torch.stack([diagonal[part].sum() for part in self.slices.values()]).cpu()

    def samples(self, products: torch.Tensor) -> Iterator[torch.Tensor]:
        sums = [products[:, part].sum(dim=1, dtype=torch.float64) for part in self.slices.values()]
        yield from torch.stack(sums, dim=1).cpu()

    def add(self, products: torch.Tensor) -> None:
        """``products`` (K, P): v * (A v) of K probes; by Welford's recurrence."""
        for sample in self.samples(products):
            self.n += 1
            self.independent = self.n
            self.note(sample)
            away = sample - self.mean
            self.mean += away / self.n
            self.squares += away * (sample - self.mean)
        self.note_bound(products)

    def note_bound(self, products: torch.Tensor) -> None:
        """The entries v_i (A v)_i of independent probes have variances that add up to half of their sum's; those of a
        parameter to half of what its own sum's is at most."""
        if len(products) < 2:
            return
        variances = products.var(dim=0)
        sums = [variances[part].sum(dtype=torch.float64) for part in self.slices.values()]
        bound = 2 * torch.stack(sums).cpu()
        self.bounded += len(products)
        share = len(products) / self.bounded
        self.bound = bound if self.bound is None else (1 - share) * self.bound + share * bound

    def note(self, sample: torch.Tensor) -> None:
        self.whole.append(float(sample[0]))

    def skewness(self) -> float:
        """Of the samples in all; 0 where it is not known."""
        away = torch.tensor(self.whole, dtype=torch.float64, device="cpu")
        away -= away.mean()
        squares = float((away**2).mean()) if self.whole else 0.0
        return float((away**3).mean()) / squares**1.5 if squares > 0 else 0.0

    def take(self, estimator: _C.estimators.LeaveOneOut, final: bool) -> None:
        """The leave-one-out estimates so far, those per parameter only if ``final``."""
        found = estimator.estimates(final)
        self.n = estimator.probes
        self.mean, self.squares = torch.zeros_like(self.known), torch.zeros_like(self.known)
        self.mean[: len(found)] = found[:, 0]
        self._take_variance(found[:, 1])

    def _take_variance(self, variance: torch.Tensor) -> None:
        """A variance that holds a covariance, itself estimated from the same probes, is about as uncertain as
        that of half as many independent samples."""
        self.independent = self.n / 2
        self.squares[: len(variance)] = variance * (self.n * (self.n - 1))

    @property
    def value(self) -> torch.Tensor:
        return self.known + self.mean

    def stderr(self) -> torch.Tensor:
        if self.n < 2:
            return torch.full_like(self.squares, math.nan)
        variance = self.squares / (self.n - 1)
        if self.bound is not None:
            variance = moderated(variance, self.bound, self.n)
        return student(self.independent) * (variance / self.n).sqrt()

    def error_and_size(self) -> tuple[float, float]:
        """What is compared: stderr <= rtol * size."""
        return float(self.stderr()[0]), abs(float(self.value[0]))

    def set_exact(self, diagonal: torch.Tensor) -> None:
        self.known, self.mean = self.collect(diagonal), torch.zeros_like(self.mean)

    def results(self, exact: bool) -> dict[str, tuple[Any, Any]]:
        stderr = torch.zeros_like(self.mean) if exact else self.stderr()
        return {name: (float(self.value[i]), float(stderr[i])) for i, name in enumerate(self.slices)}


class DiagonalTally(TraceTally):
    """The same for v * (A v), entry by entry."""

    def __init__(self, operator: LinearView, known: torch.Tensor | None = None) -> None:
        zeros = torch.zeros(operator.P, dtype=torch.float64, device=operator.device)
        super().__init__(operator, zeros if known is None else known)

    def collect(self, diagonal: torch.Tensor) -> torch.Tensor:
        return diagonal

    def samples(self, products: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from products.double()

    def note(self, sample: torch.Tensor) -> None:
        pass

    def note_bound(self, products: torch.Tensor) -> None:
        pass

    def take(self, estimator: _C.estimators.LeaveOneOut, final: bool) -> None:
        self.n = estimator.probes
        self.squares = torch.zeros_like(self.known)
        self.mean, variance = estimator.diagonal()
        self._take_variance(variance)

    def error_and_size(self) -> tuple[float, float]:
        return float(self.stderr().norm()), float(self.value.norm())

    def results(self, exact: bool) -> dict[str, tuple[Any, Any]]:
        stderr = torch.zeros_like(self.mean) if exact else self.stderr()
        value = self.value
        return {name: (value[part], stderr[part]) for name, part in self.slices.items()}


@dataclass
class Run:
    """One estimate under way."""

    operator: LinearView  # what is sampled: A, or what a deflation left of it
    products: Products
    tally: TraceTally
    new_tally: Callable[[torch.Tensor | None], TraceTally]  # of a diagonal that is known further
    rtol: float
    budget: int
    seed: int
    bar: Bar
    first_probe: int = 0  # the number of the tally's first probe

    @property
    def left(self) -> int:
        return self.budget - self.products.used

    def reached(self) -> bool:
        """Whether to stop: what the standard error may be in truth is within rtol."""
        error, size = self.tally.error_and_size()
        text = f"{self.products.used} products, relative error {error / size if size else math.nan:.2g}"
        self.bar.update(self.products.used, text)
        if self.tally.n < LEAST_PROBES:
            return False
        return error * caution(self.tally.independent, self.tally.skewness()) <= self.rtol * size

    def samples_needed(self) -> float:
        """How many samples of the spread seen would reach rtol: the error falls as 1 / sqrt(n)."""
        error, size = self.tally.error_and_size()
        if error == 0:
            return 0.0
        return self.tally.n * (error / (self.rtol * size)) ** 2 if size else math.inf


@overload
def student(n: float) -> float: ...
@overload
def student(n: torch.Tensor) -> torch.Tensor: ...
def student(n: float | torch.Tensor) -> float | torch.Tensor:
    """What makes 2 standard errors of n samples an interval of 95 % (the quantile of Student's t over the
    normal one, to first order in 1 / n)."""
    degrees = (n - 1).clamp_min(1) if isinstance(n, torch.Tensor) else max(n - 1, 1)
    return 1 + 5 / (4 * degrees)


def caution(n: float, skewness: float) -> float:
    """How much larger than that of n >= 2 samples the true deviation may be.

    A rule that stops where the error bar is small enough stops first where it happens to be too small. Two
    factors against it: the 90 % bound for normal samples (the quantile of chi-square is Wilson and
    Hilferty's, PNAS 17 (1931) 684-688), and for skewed ones, as a single eigenvalue far above the others
    makes them, whose mean and spread are too small together, the first term of the expansion by which
    Johnson (J. Am. Stat. Assoc. 73 (1978) 536-544) corrects the interval, at 2 deviations. A few samples
    cannot miss a rare large value altogether: they are quadratic polynomials of signs, whose fourth moments
    their variance bounds (Bonami's lemma).
    """
    rest = 2 / (9 * (n - 1))
    spread = float(max(1 - rest - 1.2816 * math.sqrt(rest), 0.1) ** -1.5)
    return spread * (1 + 0.75 * abs(skewness) / math.sqrt(n))


def hutchinson(run: Run, may_change: bool) -> bool:
    """Adds probes to the tally, whose number tells the next one, until rtol or the budget is reached.

    Returns whether to change to exact: the probes still needed are more than P.
    """
    P = run.operator.P
    while run.left > 0 and not run.reached():
        believed = may_change and run.tally.n >= LEAST_PROBES and run.left >= P
        if believed and run.samples_needed() - run.tally.n > P:
            return True
        probes = run.products.probes(run.seed, run.first_probe + run.tally.n, min(BLOCK, run.left))
        run.tally.add(run.operator.apply(probes) * probes)
    return False


def exact(run: Run) -> None:
    """One product per column."""
    P = run.products.P
    entries = torch.empty(P, dtype=torch.float64, device=run.products.device)
    for first in range(0, P, _EXACT_BLOCK):
        count = min(_EXACT_BLOCK, P - first)
        at = torch.arange(count, device=entries.device)
        units = torch.zeros(count, P, dtype=run.products.dtype, device=entries.device)
        units[at, first + at] = 1
        entries[first : first + count] = run.products(units)[at, first + at]
        run.bar.update(run.products.used, f"{run.products.used} products")
    run.tally.set_exact(entries)

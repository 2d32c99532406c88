"""Trace and diagonal from sweeps over the examples: probes of each example's own, and exact sums over the outputs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from flatcore.linear import LinearView
from flatcore.progress import Bar
from flatcore.sampling import BLOCK, LEAST_PROBES, DiagonalTally, Products, TraceTally, caution, student

__all__ = ["ByExample", "Sweeps"]

_PILOT = 2  # probes of a round, the fewest whose spread is seen
# Degrees of freedom, one for each example and probe beyond a round's first, before a standard error is believed.
_LEAST_DEGREES = LEAST_PROBES - 1
_MOST_PROBES = 64  # of a round
# Products whose work is predicted from which what is known of the whole matrix may serve better: their pilot takes 16.
_DEAR = 64
_FEW_COLUMNS = 64  # of what is left without sweeps, up to which it is taken exactly


class Sweeps(Protocol):
    """What an operator offers whose loss is a sum over examples. Works are in floating-point operations.

    examples: of all batches. left: parameters without probes of each example's own. exact: do the outputs give all of
    the operator, and not only its Gauss-Newton part? outputs: sweeps of `from_outputs`, 0 where there are none.
    probe_work: infinite where there are no probes.
    """

    examples: int
    probed: tuple[str, ...]
    left: tuple[str, ...]
    exact: bool
    outputs: int
    probe_work: float
    remainder_work: float
    output_work: float
    product_work: float

    def probe(self, remainder: bool, seed: int, first: int, K: int) -> Any: ...
    def from_outputs(self) -> tuple[Tensor, Tensor | None]: ...
    def release(self) -> None: ...


class ByExample:
    """An estimate under way: what the sweeps have given, and what vectors shared by all examples give of the rest."""

    def __init__(
        self,
        sweeps: Sweeps,
        operator: LinearView,
        diagonal: bool,
        rtol: float,
        budget: int,
        seed: int,
        bar: Bar,
    ) -> None:
        self.sweeps, self.P, self.rtol, self.budget, self.seed, self.bar = (
            sweeps,
            operator.P,
            rtol,
            budget,
            seed,
            bar,
        )
        self.device = operator.device
        self.used = 0
        self.pilot = max(_PILOT, 1 + math.ceil(_LEAST_DEGREES / max(sweeps.examples, 1)))
        self.sums = Sums(len(sweeps.probed), operator.P if diagonal else None)
        self.rest = Rest(operator, sweeps.left, diagonal, seed) if sweeps.left else None

    def run(self, method: str) -> str | None:
        """The method that was carried out; None where another one is called for, of the whole matrix."""
        sweeps = self.sweeps
        if sweeps.exact and (
            method == "exact" or (method == "auto" and self._pilot_is_vain()) or sweeps.probe_work == math.inf
        ):
            self._take_outputs()
            return "exact"
        if method == "exact":
            return None
        if method == "auto" and sweeps.outputs and self._room and self._pilot_is_vain():
            self._take_outputs()
            return self._probes(remainder=True, method="ggn+example", may_change=True)
        self._round(False, max(_PILOT, min(self.pilot, self.budget)))
        if method == "auto" and not self.reached() and (choice := self._cheaper()) is not None:
            if choice == "whole matrix":
                return None
            self._take_outputs()
            return choice if choice == "exact" else self._probes(True, choice, may_change=True)
        return self._probes(remainder=False, method="example", may_change=method == "auto")

    def _pilot_is_vain(self) -> bool:
        """Will sums over the outputs be cheaper than probes, whatever a pilot shows? Near a minimum an example's
        curvature has mostly one direction u, and <v, u>² of random signs v the variance 2: rtol takes 2 / rtol²."""
        sweeps = self.sweeps
        splitting = sweeps.outputs * sweeps.output_work
        if not sweeps.exact:
            splitting += self.pilot * sweeps.remainder_work
        return splitting < 2 * sweeps.probe_work / (sweeps.examples * self.rtol**2)

    @property
    def _room(self) -> bool:
        """Does the budget suffice for the outputs and some probes of what they leave?"""
        return self.sweeps.exact or self.used + self.sweeps.outputs + _PILOT <= self.budget

    def _cheaper(self) -> str | None:
        """What promises less work than further probes of the whole."""
        sweeps = self.sweeps
        probing = (self.sums.needed(self.rtol) - self.sums.K) * sweeps.probe_work
        outputs = sweeps.outputs * sweeps.output_work
        if sweeps.outputs and sweeps.exact:
            splitting = outputs
        else:
            splitting = outputs + self.pilot * sweeps.remainder_work if sweeps.outputs else math.inf
        if min(probing, splitting) > _DEAR * sweeps.product_work:
            return "whole matrix"
        if splitting < probing and self._room:
            return "exact" if sweeps.exact else "ggn+example"
        return None

    def _take_outputs(self) -> None:
        self.used += self.sweeps.outputs
        self.sums = Sums(len(self.sweeps.probed), self.P if self.sums.diagonal is not None else None)
        self.sums.known, diagonal = self.sweeps.from_outputs()
        if diagonal is not None:
            self.sums.known_diagonal = diagonal

    def _probes(self, remainder: bool, method: str, may_change: bool) -> str | None:
        while self.sums.K == 0 or (self.used + _PILOT <= self.budget and not self.reached()):
            if may_change and self.sums.K and self.believed and self._columns_are_cheaper(remainder):
                return None
            if self.sums.K and self.rest is not None and self._rest_is_worse(self.rest):
                before = self.rest.products.used
                self.rest.step(self.budget - self.used)
                self.used += self.rest.products.used - before
                continue
            missing = self.sums.needed(self.rtol) * 1.1 - self.sums.K if self.sums.K else self.pilot
            if not self.believed:
                missing = max(missing, self.sums.K)
            self._round(
                remainder, max(_PILOT, math.ceil(min(missing, _MOST_PROBES, self.budget - self.used)))
            )
        return method

    def _columns_are_cheaper(self, remainder: bool) -> bool:
        """Than the probes still needed, by the spread of those seen: all columns of the whole matrix."""
        sweeps = self.sweeps
        if self.budget - self.used < self.P:
            return False
        missing = self.sums.needed(self.rtol) - self.sums.K
        return self.P * sweeps.product_work < missing * (
            sweeps.remainder_work if remainder else sweeps.probe_work
        )

    def _rest_is_worse(self, rest: Rest) -> bool:
        if rest.exact:
            return False
        return not rest.begun or rest.error_and_size()[0] >= self.sums.error_and_size()[0]

    def _round(self, remainder: bool, K: int) -> None:
        self.sums.add(self.sweeps.probe(remainder, self.seed, self.sums.K, K))
        self.used += K

    @property
    def believed(self) -> bool:
        """Are there so many samples that their spread is that of more?"""
        sums = self.sums
        each = sums.K - sums.rounds
        if sums.K == 0 or each >= _LEAST_DEGREES:
            return True
        # Of most examples the loss may be flat: those count whose spread is seen.
        some = sums.variance_in_all() > 0 and sums.degrees() >= _LEAST_DEGREES / 2
        return some and self.sweeps.examples * each >= _LEAST_DEGREES

    def error_and_size(self) -> tuple[float, float]:
        """What is compared: stderr <= rtol * size."""
        error, size = self.sums.error_and_size()
        if self.rest is None:
            return error, abs(size)
        other, other_size = self.rest.error_and_size()
        if self.sums.diagonal is not None:
            return math.hypot(error, other), math.hypot(size, other_size)
        return math.hypot(error, other), abs(size + self.rest.value())

    def reached(self) -> bool:
        error, size = self.error_and_size()
        text = f"{self.used} sweeps, relative error {error / size if size else math.nan:.2g}"
        self.bar.update(self.used, text)
        if not self.believed or (self.rest is not None and not self.rest.begun):
            return False
        return error * caution(1 + self.sums.degrees(), 0.0) <= self.rtol * size

    def results(self, slices: dict[str, slice]) -> dict[str, tuple[Any, Any]]:
        """Value and standard error, in all under "" and by parameter; (P,) tensors for a diagonal."""
        others = self.rest.tally.results(self.rest.exact) if self.rest is not None else {}
        if self.sums.diagonal is None:
            found = self.sums.of_parameters(self.sweeps.probed)
            if others:
                (value, error), (more, other) = found[""], others[""]
                found |= others | {"": (value + more, math.hypot(error, other))}
            return {name: found[name] for name in ("", *slices)}
        values, errors = self.sums.of_entries()
        if self.rest is not None:
            places = self.rest.places.cpu()
            values[places], errors[places] = (t.cpu() for t in others[""])
        values, errors = values.to(self.device), errors.to(self.device)
        return {name: (values[part], errors[part]) for name, part in {"": slice(None), **slices}.items()}


class Sums:
    """Means over independent probes of sums over examples: in all (entry 0) and for each parameter, or entry by entry
    of a diagonal, with the variances of these means.

    known: what was got without probes. K: probes so far, each of every example, in how many rounds.
    """

    def __init__(self, parameters: int, P: int | None) -> None:
        def zeros(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.float64, device="cpu")

        self.K = self.rounds = 0
        self.known, self.mean, self.variance, self.fourth = (zeros(1 + parameters) for _ in range(4))
        self.diagonal = self.diagonal_variance = self.known_diagonal = None if P is None else zeros(P)

    def add(self, samples: Any) -> None:
        """Another round of probes: what was there and what comes count by their numbers."""
        old, new = self.K / (self.K + samples.K), samples.K / (self.K + samples.K)
        self.mean = old * self.mean + new * samples.mean
        self.variance = old**2 * self.variance + new**2 * samples.variance
        self.fourth = old**4 * self.fourth + new**4 * samples.fourth * 3 / (samples.K + 1)
        if self.diagonal is not None and self.diagonal_variance is not None:
            self.diagonal = old * self.diagonal + new * samples.diagonal
            self.diagonal_variance = old**2 * self.diagonal_variance + new**2 * samples.diagonal_variance
        self.K += samples.K
        self.rounds += 1

    def degrees(self, entry: int = 0) -> float:
        """Of freedom: a variance adds up one for each example and round of K probes, each of K - 1 degrees, whose
        squares are on average (K + 1) / (K - 1) times too large (Satterthwaite, Biometrics Bulletin 2 (1946)
        110-114)."""
        variance, fourth = float(self.variance[entry]), float(self.fourth[entry])
        return max(1.0, 3 * variance**2 / fourth - 2) if fourth > 0 else math.inf

    def variance_in_all(self) -> float:
        if self.diagonal_variance is not None:
            return float(self.diagonal_variance.sum())
        return float(self.variance[0])

    def needed(self, rtol: float) -> float:
        """How many probes in all would reach rtol."""
        error, size = self.error_and_size()
        if error == 0:
            return float(self.K)
        return self.K * (error / (rtol * size)) ** 2 if size else math.inf

    def error_and_size(self) -> tuple[float, float]:
        """Of the sum, or norms for a diagonal."""
        error = math.sqrt(self.variance_in_all()) * student(1 + self.degrees())
        if self.diagonal is not None and self.known_diagonal is not None:
            return error, float((self.diagonal + self.known_diagonal).norm())
        return error, float(self.known[0] + self.mean[0])

    def of_parameters(self, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        """Value and standard error of the sums, in all under ""."""
        value = self.known + self.mean
        return {
            name: (float(value[i]), math.sqrt(float(self.variance[i])) * student(1 + self.degrees(i)))
            for i, name in enumerate(("", *names))
        }

    def of_entries(self) -> tuple[Tensor, Tensor]:
        """Value and standard error of the diagonal, (P,)."""
        assert self.diagonal is not None and self.known_diagonal is not None
        assert self.diagonal_variance is not None
        return self.diagonal + self.known_diagonal, self.diagonal_variance.sqrt() * student(
            1 + self.degrees()
        )


class Rest:
    """The diagonal block of the parameters that no example's own probes reach, by vectors shared by all examples."""

    def __init__(self, operator: LinearView, names: tuple[str, ...], diagonal: bool, seed: int) -> None:
        assert operator.parameter_slices is not None
        parts = [operator.parameter_slices[name] for name in names]
        self.places = torch.cat([torch.arange(p.start, p.stop, device=operator.device) for p in parts])
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + part.stop - part.start)
        slices = {name: slice(*pair) for name, pair in zip(names, pairwise(bounds), strict=True)}
        size = len(self.places)

        def product(rows: Tensor) -> Tensor:
            whole = rows.new_zeros(len(rows), operator.P)
            whole[:, self.places] = rows
            return operator.apply(whole)[:, self.places]

        self.products = Products(LinearView(size, operator.dtype, operator.device, product, slices))
        self.view = LinearView(size, operator.dtype, operator.device, self.products, slices)
        self.tally = (DiagonalTally if diagonal else TraceTally)(self.view)
        self.seed, self.names, self.exact = seed, names, False

    def step(self, most: int) -> None:
        """A block of products; all columns at once where they are few."""
        if min(_FEW_COLUMNS, most) >= self.view.P:
            exact_diagonal(self)
            return
        count = max(1, min(BLOCK, most))
        probes = self.products.probes(self.seed, self.tally.n, count)
        self.tally.add(self.view.apply(probes) * probes)

    @property
    def begun(self) -> bool:
        return self.exact or self.tally.n >= LEAST_PROBES

    def error_and_size(self) -> tuple[float, float]:
        if self.exact:
            return 0.0, self.tally.error_and_size()[1]
        error, size = self.tally.error_and_size()
        return (math.inf if math.isnan(error) else error), size

    def value(self) -> float:
        return float(self.tally.value[0])


def exact_diagonal(rest: Rest) -> None:
    units = torch.eye(rest.view.P, dtype=rest.view.dtype, device=rest.view.device)
    rest.tally.set_exact(rest.view.apply(units).diagonal().double())
    rest.exact = True

"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flatcore import _C
from flatcore.environment import full_precision
from flatcore.linear import as_operator, check_count, check_seed
from flatcore.means import BOUND_WEIGHT, gamma_band, moderated, score_interval, student
from flatcore.quadrature import Jacobi, joined
from flatcore.results import Estimate
from flatcore.spectral import rounding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Atom", "Density", "spectral_density"]

_LEFT_OPEN = 0.05  # share of eigenvalues


@dataclass(frozen=True)
class Atom:
    """The share of eigenvalues with |lambda| <= radius.

    ``low`` and ``high`` bound what each probe's quadrature leaves open, on average: where the spectrum goes on outside
    the radius without a gap, no few steps can tell what lies inside, and the two are far apart. ``stderr`` holds that
    and, added in squares, the standard error over the probes. ``resolved``: the former is at most twice the latter.
    """

    share: float
    stderr: float
    low: float
    high: float
    radius: float
    resolved: bool

    def __str__(self) -> str:
        return f"{100 * self.share:.3g} ± {100 * self.stderr:.2g} % within {self.radius:.2g} of zero"


@dataclass(frozen=True)
class Density:
    """Spectral density of a symmetric (P, P) operator by stochastic Lanczos quadrature.

    Probe i gives the quadrature sum_j weights[i, j] f(nodes[i, j]), whose mean over probes estimates (1/P) tr
    f(A): Golub and Welsch, Math. Comp. 23 (1969); Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017),
    algorithm 1. ``nodes`` and ``weights`` are (probes, steps) float64 arrays, each row of weights sums to 1.
    A probe whose Krylov space was exhausted early has fewer nodes, is exact for its start vector, and is
    padded with weights 0. ``jacobi`` holds the recurrences themselves, ``zero`` is the size up to which an eigenvalue
    cannot be told from zero in A's precision.

    ``pdf`` and ``cdf`` come with plain standard errors over the probes, nan for one probe. ``pdf_band`` and
    ``cdf_band`` are intervals that hold with few probes, even one, and include the error of the quadrature.
    """

    jacobi: Jacobi
    dimension: int
    zero: float
    matvecs: int
    seconds: float
    seed: int
    status: str = "converged"

    @functools.cached_property
    def _gauss(self) -> tuple[np.ndarray, np.ndarray]:
        return self.jacobi.gauss()

    @property
    def nodes(self) -> np.ndarray:
        return self._gauss[0]

    @property
    def weights(self) -> np.ndarray:
        return self._gauss[1]

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest node: inside the spectrum, close to its ends."""
        return float(self.nodes.min()), float(self.nodes.max())

    @functools.cached_property
    def atom(self) -> Atom:
        """The eigenvalues that are zero in A's precision: nets have many."""
        return self.near_zero(self.zero)

    def near_zero(self, radius: float | None = None) -> Atom:
        """The eigenvalues with |lambda| <= radius.

        By default the radius doubles from A's rounding, up to a tenth of the largest |node|, until the quadrature
        leaves at most 5 % of the eigenvalues open: the small eigenvalues of a net reach down to zero without a gap, and
        a narrower window cannot be told from its surroundings.
        """
        if radius is None:
            found = self.atom
            while found.high - found.low > _LEFT_OPEN and 2 * found.radius <= 0.1 * max(map(abs, self.range)):
                found = self.near_zero(2 * found.radius)
            return found
        if not radius >= 0:
            raise ValueError(f"radius: expected a number >= 0, got {radius}")
        shares = (self.weights * (np.abs(self.nodes) <= radius)).sum(axis=1)
        below = self.jacobi.share_bounds(np.nextafter(-radius, -np.inf))
        upto = self.jacobi.share_bounds(np.nextafter(radius, np.inf))
        low, high = np.clip(upto[0] - below[1], 0, 1), np.clip(upto[1] - below[0], 0, 1)
        share = float(shares.mean())
        least, most = min(float(low.mean()), share), max(float(high.mean()), share)
        chance = float(self._moderated(shares, np.float64(share)))
        return Atom(
            share=share,
            stderr=math.hypot(chance, max(share - least, most - share)),
            low=least,
            high=most,
            radius=float(radius),
            resolved=most - least <= 2 * chance + 1e-6,
        )

    def sum(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """sum_i f(lambda_i) over all P eigenvalues; ``function`` maps an array of eigenvalues to an array.

        ``stderr`` and the error of the quadrature in it: as in ``functional``, which takes as many probes and steps as
        it needs.
        """
        samples, squares = self._quadrature(self._gauss, function)
        bias = 0.0
        if self.jacobi.going.any():
            error = self.jacobi.gauss_error(lambda *rule: self._quadrature(rule, function)[0])
            bias = float(error.mean()) * self.dimension
        stderr = float(self._moderated(samples, squares.mean())) * self.dimension
        value = float(samples.mean()) * self.dimension
        status = self.status
        if bias > max(stderr, 1e-12 * abs(value)):
            status = (
                f"the error of the quadrature, up to {bias:.3g} at {value:.3g}, exceeds the standard error over the "
                f"probes, {stderr:.3g}; take more steps"
            )
        return Estimate(
            value=value,
            stderr=math.hypot(stderr, bias) if self.jacobi.probes > 1 else math.nan,
            matvecs=self.matvecs,
            by_parameter=None,
            method="stochastic Lanczos quadrature",
            seed=self.seed,
            seconds=self.seconds,
            status=status,
        )

    def cdf(self, grid: Any) -> tuple[np.ndarray, np.ndarray]:
        """Share of eigenvalues below each grid point (one at it counts half), and its standard error."""
        points = np.asarray(grid, dtype=np.float64)
        step = 0.5 + 0.5 * np.sign(points[..., None, None] - self.nodes)
        return _mean_and_stderr((step * self.weights).sum(axis=-1))

    def cdf_band(self, grid: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end for the share of eigenvalues up to each grid point, with the probability ``level`` at
        each.

        The Chebyshev-Markov-Stieltjes bounds of the quadrature, widened by the score interval (Wilson, J. Am. Stat.
        Assoc. 22 (1927) 209-212): a probe's share has at most the variance 2 F (1 - F) / P, that of a binomial one of
        P / 2 trials, because the projector onto the eigenvalues below is idempotent. Costs an eigenvalue problem per
        point and probe.
        """
        points = np.asarray(grid, dtype=np.float64)
        ends = np.array([[end.mean() for end in self.jacobi.share_bounds(float(x))] for x in points.ravel()])
        ends = ends.reshape(*points.shape, 2)
        trials = self.jacobi.probes * self.dimension / 2
        return score_interval(ends[..., 0], trials, level)[0], score_interval(ends[..., 1], trials, level)[1]

    def pdf(
        self, grid: Any, width: float | None = None, *, atom: bool = True, log: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Density at each grid point, smoothed by a Gaussian of standard deviation ``width``, and its standard error.

        The default width is 1/200 of the range of the nodes. The density integrates to 1; without the ``atom``, the
        eigenvalues that are zero in A's precision, to the share of the rest. ``log``: per decade of |lambda|, smoothed
        by ``width`` decades (default 0.1), among the eigenvalues of the grid point's sign.
        """
        return _mean_and_stderr(self._smoothed(grid, width, atom, log, self._gauss)[0])

    def pdf_band(
        self,
        grid: Any,
        width: float | None = None,
        *,
        level: float = 0.95,
        atom: bool = True,
        log: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end for the smoothed density, with the probability ``level`` at each point.

        Intervals of a Gamma law, positive and wider above, from the standard error over the probes, moderated as in
        ``flatcore/means.py``, with Student's t for its degrees of freedom; then by what the rules of three quarters
        of the steps differ within a width, and where nodes are more than two widths apart, by what lies open between
        them. Where that decides, more steps or a larger width are needed.
        """
        quantile = self._student(level)
        samples, squares = self._smoothed(grid, width, atom, log, self._gauss)
        mean = samples.mean(axis=-1)
        stderr = self._moderated(samples, squares.mean(axis=-1))
        lower, upper = gamma_band(mean, stderr, self.jacobi.probes, quantile)
        if self.jacobi.steps < self.dimension and self.jacobi.going.any():
            shorter = self.jacobi.after(max(1, 3 * self.jacobi.steps // 4)).gauss()
            points = np.asarray(grid, dtype=np.float64)
            size = self._size(width, log)
            around = [points * 10.0**s if log else points + s for s in (-size, 0.0, size)]
            differences = [
                np.abs(
                    self._smoothed(at, width, atom, log, self._gauss)[0].mean(axis=-1)
                    - self._smoothed(at, width, atom, log, shorter)[0].mean(axis=-1)
                )
                for at in around
            ]
            off = np.max(differences, axis=0)
            less, more = self._between(grid, width, atom, log)
            less, more = np.maximum(off, less), np.maximum(off, more)
            if not atom and not log:
                # What may be part of the atom, or of the rest.
                at_zero = _bells(points, np.zeros(1), size, log)
                less = less + at_zero * (self.atom.high - self.atom.share)
                more = more + at_zero * (self.atom.share - self.atom.low)
            lower, upper = np.maximum(lower - less, 0.0), upper + more
        return lower, upper

    def isolated(self, width: float | None = None) -> np.ndarray:
        """Eigenvalues that stand alone: three quarters of the probes have found one there, and none has anything else
        within two widths of it."""
        width = self._width() if width is None else float(width)
        nodes, weights, errors = self.jacobi.ritz()
        # What a rule gives less weight than a thousandth of one eigenvalue is a copy or a trace of rounding.
        real = weights > 1e-3 / self.dimension
        found: list[float] = []
        for value in np.unique(nodes[real & (errors <= width / 4) & (np.abs(nodes) > self.zero)]):
            near = real & (np.abs(nodes - value) <= 2 * width)
            once = (near.sum(axis=1) <= 1).all() and near.sum() >= 0.75 * self.jacobi.probes
            new = not found or value - found[-1] > 2 * width
            if once and new and (errors[near] <= width / 4).all():
                found.append(float(np.median(nodes[near])))
        return np.array(found)

    def plot(self, ax: Axes | None = None, *, log: bool = False) -> Axes:
        """The density on a logarithmic axis; returns the axes. See ``flatcore/density_plot.py``."""
        from flatcore.density_plot import plot

        return plot(self, ax, log)

    def _quadrature(
        self, rule: tuple[np.ndarray, np.ndarray], function: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Per probe the mean of f, and of f², over the eigenvalues."""
        nodes, weights = rule
        values = np.asarray(function(nodes), dtype=np.float64)
        if values.shape != nodes.shape:
            raise ValueError(
                f"function: expected the shape {nodes.shape} of its argument, got {values.shape}; "
                "write it elementwise, e.g. lambda x: x**2"
            )
        return (weights * values).sum(axis=1), (weights * values**2).sum(axis=1)

    def _smoothed(
        self, grid: Any, width: float | None, atom: bool, log: bool, rule: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Per grid point and probe the mean over the eigenvalues of a Gaussian there, and of its square, with
        a margin."""
        points = np.asarray(grid, dtype=np.float64)[..., None, None]
        if log and (points == 0).any():
            raise ValueError("grid: expected eigenvalues other than zero for log=True, got zero")
        nodes, weights = rule
        if not atom or log:
            weights = np.where(np.abs(nodes) > self.zero, weights, 0.0)
        bells = _bells(points, nodes, self._size(width, log), log)
        squares, fourth = (bells**2 * weights).sum(axis=-1), (bells**4 * weights).sum(axis=-1)
        # Probes that miss the few eigenvalues which decide find the squares small too: by their own deviation more.
        miss = np.sqrt(2 * fourth.mean(axis=-1, keepdims=True) / (self.dimension * self.jacobi.probes))
        return (bells * weights).sum(axis=-1), squares + miss

    def _between(
        self, grid: Any, width: float | None, atom: bool, log: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """How much less, or more, the smoothed density may be where the nodes are too far apart to tell.

        By the inequalities of Chebyshev, Markov and Stieltjes the true measure comes from the rule's by moving each
        weight no further than to the neighbouring nodes. A node that is an eigenvalue stays where it is.
        """
        points = np.asarray(grid, dtype=np.float64)[..., None, None]
        size = self._size(width, log)
        nodes, weights, errors = self.jacobi.ritz()
        if not atom or log:
            weights = np.where(np.abs(nodes) > self.zero, weights, 0.0)
        left = np.column_stack([nodes[:, 0] - errors[:, 0], nodes[:, :-1]])
        right = np.column_stack([nodes[:, 1:], nodes[:, -1] + errors[:, -1]])
        scale = np.abs(points) * math.log(10) * size if log else size
        coarse = (right - left > 4 * scale) & (errors > scale / 4)
        own = _bells(points, nodes, size, log)
        ends = np.minimum(_bells(points, left, size, log), _bells(points, right, size, log))
        nearest = _bells(points, np.clip(points, left, right), size, log)
        less = (np.where(coarse, own - np.minimum(own, ends), 0.0) * weights).sum(axis=-1)
        more = (np.where(coarse, nearest - own, 0.0) * weights).sum(axis=-1)
        return less.mean(axis=-1), more.mean(axis=-1)

    def _moderated(self, samples: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Standard error of the mean over the last axis, given the mean over the eigenvalues of the function's
        square."""
        n = self.jacobi.probes
        bound = 2 * np.maximum(squares - samples.mean(axis=-1) ** 2, 0.0) / self.dimension
        own = samples.var(axis=-1, ddof=1) if n > 1 else np.zeros_like(bound)
        return np.asarray(np.sqrt(moderated(own, bound, n) / n))

    def _student(self, level: float) -> float:
        return student(level, self.jacobi.probes - 1 + BOUND_WEIGHT)

    def _size(self, width: float | None, log: bool) -> float:
        """The width asked for, in eigenvalues or decades."""
        size = (0.1 if log else self._width()) if width is None else float(width)
        if not size > 0:
            raise ValueError(f"width: expected a positive number, got {width}")
        return size

    def _width(self) -> float:
        low, high = self.range
        # One eigenvalue, P times over: any width is arbitrary.
        return (high - low) / 200 or 1e-3 * (abs(high) or 1.0)


def spectral_density(
    A: Any, *, probes: int = 8, steps: int = 64, block_size: int | None = None, seed: int = 0
) -> Density:
    """Spectral density of the symmetric operator A, (P, P), from independent probes of random signs.

    Each probe runs ``steps`` steps (at most P) of Lanczos with full reorthogonalisation. ``block_size``
    probes, by default all, ride in one product; they do not influence one another, so their spread is an
    error bar. Costs probes * steps products; memory: block_size * steps vectors of A's precision. Raises
    ValueError or TypeError for bad arguments and for products that are not finite.
    """
    began = time.perf_counter()
    operator = as_operator(A)
    probes, steps = check_count("probes", probes, 1), min(check_count("steps", steps, 1), operator.P)
    block = probes if block_size is None else min(check_count("block_size", block_size, 1), probes)
    seed = check_seed(seed)

    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    parts, matvecs = [], 0
    for first in range(0, probes, block):
        with full_precision():
            start = _C.krylov.rademacher(seed, first, min(block, probes - first), operator.P, like)
            alpha, beta, lengths, products = _C.krylov.tridiagonalise(operator.apply, start, steps)
        parts.append(Jacobi.of(alpha, beta, lengths, steps))
        matvecs += products
    jacobi = joined(parts)
    return Density(
        jacobi=jacobi,
        dimension=operator.P,
        zero=rounding(operator.dtype, float(np.abs(jacobi.gauss()[0]).max())),
        matvecs=matvecs,
        seconds=time.perf_counter() - began,
        seed=seed,
    )


def _bells(points: np.ndarray, nodes: np.ndarray, width: float, log: bool) -> np.ndarray:
    """Gaussians around the points at the nodes; ``log``: in decades, and zero for nodes of the other sign."""
    if log:
        same = np.sign(points) == np.sign(nodes)
        ratio = np.where(same, nodes / points, 1.0)
        bells = np.where(same, np.exp(-0.5 * (np.log10(ratio) / width) ** 2), 0.0)
    else:
        bells = np.exp(-0.5 * ((points - nodes) / width) ** 2)
    return np.asarray(bells / (width * math.sqrt(2 * math.pi)))


def _mean_and_stderr(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis and its standard error, nan for one sample."""
    n = samples.shape[-1]
    mean = samples.mean(axis=-1)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, samples.std(axis=-1, ddof=1) / math.sqrt(n)

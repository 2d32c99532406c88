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
from flatcore.quadrature import Jacobi, joined
from flatcore.results import Estimate
from flatcore.sampling import BOUND_WEIGHT, gamma_band, moderated, student
from flatcore.spectral import rounding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Atom", "Density", "spectral_density"]

_LEFT_OPEN = 0.05  # share of eigenvalues


@dataclass(frozen=True)
class Atom:
    """The share of eigenvalues with |lambda| <= radius, with its standard error over the probes.

    ``low`` and ``high`` bound what the probes' quadratures leave open (Chebyshev, Markov, Stieltjes), on average:
    where the spectrum goes on outside the radius without a gap, no few steps can tell what lies inside.
    """

    share: float
    stderr: float
    low: float
    high: float
    radius: float

    @property
    def resolved(self) -> bool:
        """Whether the quadrature leaves at most 5 % of the eigenvalues open."""
        return self.high - self.low <= _LEFT_OPEN

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the quadrature, widened by two standard errors."""
        return max(self.low - 2 * self.stderr, 0.0), min(self.high + 2 * self.stderr, 1.0)

    def __str__(self) -> str:
        least, most = (100 * end for end in self.interval)
        share = f"{100 * self.share:.3g} % ({least:.3g} to {most:.3g} %)"
        return (
            f"{share if self.resolved else f'{least:.3g} to {most:.3g} %'} at zero (|λ| ≤ {self.radius:.1g})"
        )


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
        """The eigenvalues at zero: within the smallest radius in which the quadrature knows their share.

        Nets have huge null spaces, and small eigenvalues beside them without a gap. The radius starts at what cannot be
        told from zero in A's precision and doubles up to a tenth of the largest |node|, until the share is
        ``resolved``; where it never is, the atom is that of the first radius, with its bounds.
        """
        first = self.near_zero(self.zero)
        found = first
        while not found.resolved and 2 * found.radius <= 0.1 * max(map(abs, self.range)):
            found = self.near_zero(2 * found.radius)
        return found if found.resolved else first

    def near_zero(self, radius: float) -> Atom:
        """The eigenvalues with |lambda| <= radius."""
        if not radius >= 0:
            raise ValueError(f"radius: expected a number >= 0, got {radius}")
        shares = (self.weights * (np.abs(self.nodes) <= radius)).sum(axis=1)
        below = self.jacobi.share_bounds(np.nextafter(-radius, -np.inf))
        upto = self.jacobi.share_bounds(np.nextafter(radius, np.inf))
        low, high = np.clip(upto[0] - below[1], 0, 1), np.clip(upto[1] - below[0], 0, 1)
        mean = float(shares.mean())
        return Atom(
            share=mean,
            stderr=float(self._moderated(shares, np.float64(mean))),
            low=min(float(low.mean()), mean),
            high=max(float(high.mean()), mean),
            radius=float(radius),
        )

    def sum(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """sum_i f(lambda_i) over all P eigenvalues; ``function`` maps an array of eigenvalues to an array.

        ``stderr`` and the error of the quadrature in it: as in ``functional``, which takes as many probes and steps as
        it needs.
        """
        samples, squares = self._quadrature(self._gauss, function)
        error = self.jacobi.gauss_error(lambda *rule: self._quadrature(rule, function)[0])
        bias = self.dimension * float(error.mean())
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

        The Chebyshev-Markov-Stieltjes bounds of the quadrature, widened by Student's t times the standard error over
        the probes, moderated as in ``flatcore/sampling.py``. Costs an eigenvalue problem per point and probe.
        """
        points = np.asarray(grid, dtype=np.float64)
        wide = self._student(level)
        ends = np.array([[end.mean() for end in self.jacobi.share_bounds(float(x))] for x in points.ravel()])
        ends = ends.reshape(*points.shape, 2)
        step = 0.5 + 0.5 * np.sign(points[..., None, None] - self.nodes)
        shares = (step * self.weights).sum(axis=-1)
        # An indicator is its own square.
        away = wide * self._moderated(shares, shares.mean(axis=-1))
        return np.clip(ends[..., 0] - away, 0, 1), np.clip(ends[..., 1] + away, 0, 1)

    def pdf(
        self, grid: Any, width: float | None = None, *, atom: bool = True, log: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Density at each grid point, smoothed by a Gaussian of standard deviation ``width``, and its standard error.

        The default width is 1/200 of the range of the nodes. The density integrates to 1; without the ``atom`` to
        the share of the rest. ``log``: per decade of |lambda|, smoothed by ``width`` decades (default 0.1), among the
        eigenvalues of the grid point's sign outside the atom.
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
        ``flatcore/sampling.py``, with Student's t for its degrees of freedom; then by what the rules of three quarters
        of the steps differ within a width. Where that decides, more steps or a larger width are needed.
        """
        quantile = self._student(level)
        samples, squares = self._smoothed(grid, width, atom, log, self._gauss)
        mean = samples.mean(axis=-1)
        lower, upper = gamma_band(mean, self._moderated(samples, squares.mean(axis=-1)), quantile)
        if self.jacobi.going.any():
            shorter = self.jacobi.after(max(1, 3 * self.jacobi.steps // 4)).gauss()
            points = np.asarray(grid, dtype=np.float64)
            size = (0.1 if log else self._width()) if width is None else float(width)
            around = [points * 10.0**s if log else points + s for s in (-size, 0.0, size)]
            differences = [
                np.abs(
                    self._smoothed(at, width, atom, log, self._gauss)[0].mean(axis=-1)
                    - self._smoothed(at, width, atom, log, shorter)[0].mean(axis=-1)
                )
                for at in around
            ]
            off = np.max(differences, axis=0)
            lower, upper = np.maximum(lower - off, 0.0), upper + off
        return lower, upper

    def isolated(self, width: float | None = None) -> np.ndarray:
        """Eigenvalues that stand alone: half of the probes or more have found one there, none a second one within two
        widths."""
        width = self._width() if width is None else float(width)
        nodes, weights, errors = self.jacobi.ritz()
        # A start vector may miss an eigenvector by chance: its weight, of P squares of a normal number, is then small.
        real = (weights > 1e-6 / self.dimension) & (np.abs(nodes) > self.atom.radius)
        sure = real & (errors <= width / 4)
        found: list[float] = []
        for value in np.unique(nodes[sure]):
            near = real & (np.abs(nodes - value) <= 2 * width)
            alone = (near.sum(axis=1) <= 1).all() and 2 * (near & sure).sum() >= len(nodes)
            if alone and not (found and value - found[-1] <= 2 * width):
                found.append(float(np.median(nodes[near & sure])))
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
        """Per grid point and probe the mean over the eigenvalues of a Gaussian there, and of its square."""
        points = np.asarray(grid, dtype=np.float64)[..., None, None]
        width = (0.1 if log else self._width()) if width is None else float(width)
        if not width > 0:
            raise ValueError(f"width: expected a positive number, got {width}")
        nodes, weights = rule
        if not atom or log:
            weights = np.where(np.abs(nodes) > self.atom.radius, weights, 0.0)
        if log:
            if (points == 0).any():
                raise ValueError("grid: expected eigenvalues other than zero for log=True, got zero")
            same = np.sign(points) == np.sign(nodes)
            ratio = np.where(same, nodes / points, 1.0)
            bells = np.where(same, np.exp(-0.5 * (np.log10(ratio) / width) ** 2), 0.0)
        else:
            bells = np.exp(-0.5 * ((points - nodes) / width) ** 2)
        bells /= width * math.sqrt(2 * math.pi)
        return (bells * weights).sum(axis=-1), (bells**2 * weights).sum(axis=-1)

    def _moderated(self, samples: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Standard error of the mean over the last axis, given the mean over the eigenvalues of the function's
        square."""
        n = self.jacobi.probes
        bound = 2 * np.maximum(squares - samples.mean(axis=-1) ** 2, 0.0) / self.dimension
        own = samples.var(axis=-1, ddof=1) if n > 1 else np.zeros_like(bound)
        return np.sqrt(moderated(own, bound, n) / n)

    def _student(self, level: float) -> float:
        if not 0 < level < 1:
            raise ValueError(f"level: expected a probability between 0 and 1, got {level}; give e.g. 0.95")
        return student(level, self.jacobi.probes - 1 + BOUND_WEIGHT)

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


def _mean_and_stderr(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis and its standard error, nan for one sample."""
    n = samples.shape[-1]
    mean = samples.mean(axis=-1)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, samples.std(axis=-1, ddof=1) / math.sqrt(n)

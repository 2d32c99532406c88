"""Results: numbers together with how they were got."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BlockSpectra", "Density", "Eigenpairs", "Estimate", "MeasuredError", "Solution"]


@dataclass(frozen=True)
class Eigenpairs:
    """A few eigenpairs of a symmetric (P, P) operator A.

    ``values`` (k,) float64 on the CPU: LM by decreasing absolute value, LA decreasing, SA and BE increasing.
    ``vectors`` (P, k), unit columns in A's dtype on its device, or None if they were not asked for.
    ``residuals`` (k,) = |A v - value v|, from products of their own, not from a bound.
    ``converged`` (k,): residual <= tol * scale, with ``scale`` the largest absolute eigenvalue estimate seen.
    ``matvecs``: products of A with one vector, all included; ``draft_matvecs``: those of the draft. ``storage``,
    ``basis_rows``: where the Krylov basis was kept, and how many vectors. ``status``: "converged", or one sentence that
    says why not. "interrupted ...": residuals are the recurrence's estimates, and there may be fewer than k pairs.
    """

    values: torch.Tensor
    vectors: torch.Tensor | None
    residuals: torch.Tensor
    converged: torch.Tensor
    matvecs: int
    seconds: float
    seed: int
    status: str
    which: str
    tol: float
    scale: float
    block_size: int
    restarts: int
    storage: str = "full"
    basis_rows: int = 0
    draft_matvecs: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number, or a (P,) tensor for a diagonal, with its standard error.

    ``stderr`` is 0 where the value is exact up to rounding, and nan where a single probe gives no spread. Of
    few probes it is enlarged (Student), so that 2 stderr are an interval of 95 %.
    ``matvecs``: products with one vector. ``status``: "converged" or one sentence that says what was not
    reached.
    """

    value: Any
    stderr: Any
    matvecs: int
    by_parameter: Mapping[str, Estimate] | None
    method: str
    seed: int
    seconds: float
    status: str


@dataclass(frozen=True)
class BlockSpectra:
    """Eigenpairs of the diagonal block of every parameter.

    ``by_parameter``: name -> Eigenpairs of that block, whose ``vectors`` (n, k) have the parameter's n
    entries. ``matvecs``: products of A with one vector, in all. ``status``: "converged", or one sentence that
    says which blocks have not.
    """

    by_parameter: Mapping[str, Eigenpairs]
    matvecs: int
    seconds: float
    seed: int
    status: str

    def __getitem__(self, name: str) -> Eigenpairs:
        return self.by_parameter[name]


@dataclass(frozen=True)
class Solution:
    """x with (A + damping I) x = b.

    ``value``: (P,) or (P, K) like b, in A's dtype on its device. ``residuals``: |b - (A + damping I) x| / |b|,
    from products of their own, a float for (P,) and (K,) float64 on the CPU else; 0 where b is 0.
    ``converged``: residual <= tol, a bool or (K,). ``matvecs``: products of A with one vector, all included.
    ``curvature``: the least <v, (A + damping I) v> / <v, v> met, above the least eigenvalue. ``status``:
    "converged", or one sentence that says why not.
    """

    value: torch.Tensor
    residuals: Any
    converged: Any
    matvecs: int
    iterations: int
    seconds: float
    damping: float
    tol: float
    curvature: float
    status: str


@dataclass(frozen=True)
class MeasuredError:
    """How far products with rounded operands, those of B, are from the same operator's in full precision, A.

    ``errors`` (vectors,) float64: |B v - A v| / |A v| for random signs v. ``asymmetry``: an estimate of |B - B^T| / |B|
    in the Frobenius norm from the same products, nan for one vector; in full precision a little is left too.
    ``precision``: what B's operands are rounded to; "full" where B is A. ``matvecs``: products with one vector, half of
    them by A.
    """

    errors: torch.Tensor
    asymmetry: float
    precision: str
    matvecs: int
    seed: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean of the errors over the vectors."""
        return float(self.errors.mean())

    @property
    def max(self) -> float:
        """Largest of the errors."""
        return float(self.errors.max())


@dataclass(frozen=True)
class Density:
    """Spectral density of a symmetric (P, P) operator by stochastic Lanczos quadrature.

    Probe i gives the quadrature sum_j weights[i, j] f(nodes[i, j]), whose mean over probes estimates (1/P) tr
    f(A): Golub and Welsch, Math. Comp. 23 (1969); Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017),
    algorithm 1. ``nodes`` and ``weights`` are (probes, steps) float64 arrays, each row of weights sums to 1.
    A probe whose Krylov space was exhausted early has fewer nodes, is exact for its start vector, and is
    padded with weights 0. Error bars are standard errors over the independent probes; one probe alone gives
    nan. Where few eigenvalues decide (beyond a gap), a bar from few probes is itself rough: take more probes
    there, or ``eigsh``.
    """

    nodes: np.ndarray
    weights: np.ndarray
    dimension: int
    matvecs: int
    seconds: float
    seed: int
    status: str = field(default="converged")

    def sum(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """sum_i f(lambda_i) over all P eigenvalues; ``function`` maps an array of eigenvalues to an array."""
        values = np.asarray(function(self.nodes), dtype=np.float64)
        if values.shape != self.nodes.shape:
            raise ValueError(
                f"function: expected the shape {self.nodes.shape} of its argument, got {values.shape}; "
                "write it elementwise, e.g. lambda x: x**2"
            )
        # A padded node may be where f is not finite; its weight is 0.
        per_probe = np.where(self.weights > 0, self.weights * values, 0.0).sum(axis=1) * self.dimension
        value, stderr = _mean_and_stderr(per_probe)
        return Estimate(
            value=float(value),
            stderr=float(stderr),
            matvecs=self.matvecs,
            by_parameter=None,
            method="stochastic Lanczos quadrature",
            seed=self.seed,
            seconds=self.seconds,
            status=self.status,
        )

    def cdf(self, grid: Any) -> tuple[np.ndarray, np.ndarray]:
        """Share of eigenvalues below each grid point (one at it counts half), and its standard error."""
        points = np.asarray(grid, dtype=np.float64)
        step = 0.5 + 0.5 * np.sign(points[..., None, None] - self.nodes)
        return _mean_and_stderr((step * self.weights).sum(axis=-1))

    def pdf(self, grid: Any, width: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Density at each grid point, smoothed by a Gaussian of standard deviation ``width``, and its
        standard error.

        The default width is 1/200 of the range of the nodes. The density integrates to 1.
        """
        points = np.asarray(grid, dtype=np.float64)
        width = self._width() if width is None else float(width)
        if not width > 0:
            raise ValueError(f"width: expected a positive number, got {width}")
        bells = np.exp(-0.5 * ((points[..., None, None] - self.nodes) / width) ** 2)
        return _mean_and_stderr((bells * self.weights).sum(axis=-1) / (width * math.sqrt(2 * math.pi)))

    def _width(self) -> float:
        low, high = self.range
        # One eigenvalue, P times over: any width is arbitrary.
        return (high - low) / 200 or 1e-3 * (abs(high) or 1.0)

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest node: inside the spectrum, close to its ends."""
        return float(self.nodes.min()), float(self.nodes.max())

    def plot(self, ax: Axes | None = None) -> Axes:
        """The density on a logarithmic axis, with a band of one standard error; returns the axes."""
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots()
        low, high = self.range
        margin = 5 * self._width()
        grid = np.linspace(low - margin, high + margin, 1001)
        value, stderr = self.pdf(grid)
        floor = (
            0.1 / self.dimension / (self._width() * math.sqrt(2 * math.pi))
        )  # a tenth of one eigenvalue's peak
        ax.semilogy(grid, np.maximum(value, floor))
        if len(self.nodes) > 1:
            ax.fill_between(
                grid, np.maximum(value - stderr, floor), np.maximum(value + stderr, floor), alpha=0.3
            )
        ax.set_ylim(bottom=floor)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        return ax


def _mean_and_stderr(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis and its standard error, nan for one sample."""
    n = samples.shape[-1]
    mean = samples.mean(axis=-1)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, samples.std(axis=-1, ddof=1) / math.sqrt(n)

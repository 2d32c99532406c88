"""Means of independent samples, smooth functions of them, and error bars that hold with few samples too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

__all__ = [
    "BOUND_WEIGHT",
    "Samples",
    "Smooth",
    "gamma_band",
    "moderated",
    "power",
    "quotient",
    "score_interval",
    "student",
    "total",
]

# Samples that the bound on the variance counts for, beside those seen.
BOUND_WEIGHT = 16


def moderated(variance: Any, bound: Any, n: int) -> Any:
    """The variance of one sample, from the sample variance of n of them and an estimate that errs to the large side.

    Where few eigenvalues decide, samples are skewed: one that has not met the large values underestimates the mean
    and the variance alike, and 16 samples of a squared normal number lie within two standard errors 87 % of the
    time. For random signs v the variance of <v, B v> is known but for diag B: 2 (|B|_F² - |diag B|²) <= 2 (|B|_F² -
    (tr B)² / P) (Hutchinson, Commun. Stat. Simul. Comput. 18 (1989) 1059-1076). Its estimate counts as
    BOUND_WEIGHT degrees of freedom beside the n - 1 of the sample, as a conjugate prior would (Smyth, Stat. Appl.
    Genet. Mol. Biol. 3 (2004), article 3): it tells with few samples and fades with many.
    """
    own = (n - 1) * variance if n > 1 else 0 * bound
    return (own + BOUND_WEIGHT * bound) / (n - 1 + BOUND_WEIGHT)


def student(level: float, degrees: float) -> float:
    """Half width, in standard errors, of the two-sided interval of Student's t, for 8 or more degrees of freedom.

    Fisher and Cornish, Technometrics 2 (1960) 209-225; to 1e-3 there.
    """
    z = _normal(level)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def gamma_band(
    mean: np.ndarray, stderr: np.ndarray, n: int, quantile: float
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of ``quantile`` deviations for a positive mean, which a logarithmic axis can show.

    What m eigenvalues contribute to the mean over n probes is about a Gamma variable of shape a = n m / 2, exactly so
    for normal probes, and a = (mean / stderr)² in general, but no less than for one eigenvalue; its quantiles by Wilson
    and Hilferty, Proc. Natl. Acad. Sci. 17 (1931) 684-688. Close to mean -+ quantile * stderr where that is far above
    zero. The upper end is infinite for a single probe.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ninth = np.where(mean > 0, np.minimum((stderr / mean) ** 2, 2 / n) / 9, 0.0)
        spread = quantile * np.sqrt(ninth)
        lower = mean / (1 - ninth + spread) ** 3
        upper = np.where(1 - ninth - spread > 0, mean / (1 - ninth - spread) ** 3, np.inf)
    return np.where(mean > 0, lower, 0.0), np.where(mean > 0, upper, 0.0)


def score_interval(share: np.ndarray, trials: float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The shares whose binomial deviation, with so many trials, reaches ``share``."""
    z = _normal(level)
    part = z**2 / trials
    middle = (share + part / 2) / (1 + part)
    half = np.sqrt(part * share * (1 - share) + part**2 / 4) / (1 + part)
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)


def _normal(level: float) -> float:
    """Half width, in deviations, of the two-sided interval of a normal number."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a probability between 0 and 1, got {level}; give e.g. 0.95")
    return NormalDist().inv_cdf(0.5 + level / 2)


@dataclass(frozen=True)
class Smooth:
    """A number made of means m: value, gradient (q,) and second derivatives (q, q), all at m."""

    at: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


def total() -> Smooth:
    """The one mean itself."""
    return Smooth(lambda m: (float(m[0]), np.ones(1), np.zeros((1, 1))))


def power(exponent: float) -> Smooth:
    """m^exponent of one mean m >= 0."""

    def at(m: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        x = float(m[0])
        if x <= 0:  # every sample was zero
            return 0.0, np.zeros(1), np.zeros((1, 1))
        first = exponent * x ** (exponent - 1)
        return x**exponent, np.array([first]), np.array([[(exponent - 1) * first / x]])

    return Smooth(at)


def quotient() -> Smooth:
    """m_0² / m_1, zero where m_1 is."""

    def at(m: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        t, q = float(m[0]), float(m[1])
        if q <= 0:
            return 0.0, np.zeros(2), np.zeros((2, 2))
        second = np.array([[2 / q, -2 * t / q**2], [-2 * t / q**2, 2 * t**2 / q**3]])
        return t**2 / q, np.array([2 * t / q, -(t**2) / q**2]), second

    return Smooth(at)


class Samples:
    """Samples (n, q), a bound on their covariance, and what each may be off by for another reason than chance."""

    def __init__(self, q: int) -> None:
        self.values = np.zeros((0, q))
        self._bound = np.zeros((q, q))
        self._bias = np.zeros(q)

    @property
    def n(self) -> int:
        return len(self.values)

    def add(self, values: np.ndarray, bound: np.ndarray, bias: np.ndarray) -> None:
        """k samples (k, q) with means over them of the bound (q, q) and of the size of the bias (q,)."""
        k = len(values)
        share = k / (self.n + k)
        self.values = np.concatenate([self.values, values])
        self._bound = self._bound + share * (bound - self._bound)
        self._bias = (1 - share) * self._bias + share * bias  # either may be infinite

    def estimate(self, smooth: Smooth) -> tuple[float, float, float]:
        """Value, standard error (nan for one sample) and bound on the bias of ``smooth`` of the means.

        The delta method to second order: with covariance C of the means, gradient g and second derivatives S the
        value has the bias tr(S C) / 2, which is taken off, and the variance gᵀ C g + tr(S C S C) / 2, exact to that
        order for normal means (e.g. Oehlert, Am. Stat. 46 (1992) 27-29).
        """
        n = self.n
        value, gradient, second = smooth.at(self.values.mean(axis=0))
        bias = float(np.abs(gradient) @ self._bias)
        if n < 2:
            return value, math.nan, bias
        sample = np.atleast_2d(np.cov(self.values.T, ddof=1))
        covariance = moderated(sample, self._bound, n) / n
        product = second @ covariance
        variance = float(gradient @ covariance @ gradient + np.trace(product @ product) / 2)
        return value - float(np.trace(second @ sample / n)) / 2, math.sqrt(max(variance, 0.0)), bias

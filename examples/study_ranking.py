"""Kendall's tau-b of `measures_study.py`, its bootstrap interval, and what chance alone gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
COVERAGE = 0.95
SEED = 0


@dataclass(frozen=True)
class Ranking:
    """``low`` to ``high``: the interval. ``chance``: in this share of random orders, |tau| is no larger."""

    tau: float
    low: float
    high: float
    chance: float


def rank(predicted: Numbers, gaps: Numbers, resamples: int) -> Ranking:
    """Arrays of (repeats, settings). tau is that of the nets of one repeat, averaged over the repeats.

    The interval is the percentile interval of the bootstrap over settings: each resample draws as many as there are,
    with replacement, the same ones for all repeats, as their nets are alike. A setting drawn twice is tied with itself
    in both orders, which tau-b leaves out. Chance: the gaps are dealt out to the settings in random order.
    """
    x, y = _signs(predicted), _signs(gaps)
    n = x.shape[-1]
    generator = np.random.default_rng(SEED)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    edges = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    low, high = np.nanquantile(_taus(x, y, counts), edges)
    everyone = np.ones((1, n))
    orders = generator.permuted(np.tile(np.arange(n), (resamples, 1)), axis=1)
    dealt = _dealt(x, y, orders)
    return Ranking(
        float(_taus(x, y, everyone)[0]), float(low), float(high), float(np.quantile(abs(dealt), COVERAGE))
    )


def _signs(values: Numbers) -> Numbers:
    return np.sign(values[:, :, None] - values[:, None, :])


def _taus(x: Numbers, y: Numbers, counts: Numbers) -> Numbers:
    """tau-b for each row of ``counts``, how often each setting is there: pairs in one order less pairs in opposite
    ones, over the geometric mean of the numbers of pairs that x and y tell apart."""

    def pairs(signs: Numbers) -> Numbers:
        return np.einsum("bi,sij,bj->bs", counts, signs, counts, optimize=True)

    with np.errstate(invalid="ignore"):  # nothing told apart: nan
        return (pairs(x * y) / np.sqrt(pairs(x * x) * pairs(y * y))).mean(axis=1)


def _dealt(x: Numbers, y: Numbers, orders: NDArray[np.int64]) -> Numbers:
    """tau-b where y's settings come in each of these orders, which changes no number of pairs told apart."""
    told = np.sqrt((x * x).sum(axis=(1, 2)) * (y * y).sum(axis=(1, 2)))
    with np.errstate(invalid="ignore"):
        return np.mean(
            [
                other[orders[:, :, None], orders[:, None, :]].reshape(len(orders), -1)
                @ one.reshape(-1)
                / both
                for one, other, both in zip(x, y, told, strict=True)
            ],
            axis=0,
        )

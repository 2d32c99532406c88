"""Eigenvalues for tests of what is sampled, and how often error bars hold."""

from __future__ import annotations

import numpy as np

P = 96
_RNG = np.random.default_rng(3)
SPECTRA = {
    "flat": np.linspace(0.5, 1.5, P),
    "outliers": np.r_[50.0, 20.0, 8.0, _RNG.uniform(0.01, 0.1, P - 3)],
    "null": np.r_[10.0, _RNG.uniform(0.05, 1, 23), np.zeros(P - 24)],
    "indefinite": np.r_[8.0, 5.0, 5.0, -2.0, 0.5 * _RNG.standard_normal(P - 4)],
}
SEEDS = 200


def least_covered(level: float = 0.9, n: int = SEEDS) -> float:
    """The level less two binomial deviations."""
    return float(level - 2 * (level * (1 - level) / n) ** 0.5)

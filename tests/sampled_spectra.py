"""Symmetric matrices with prescribed eigenvalues, and how often error bars hold."""

from __future__ import annotations

import numpy as np
import torch

P = 96
_RNG = np.random.default_rng(3)
SPECTRA = {
    "flat": np.linspace(0.5, 1.5, P),
    "outliers": np.r_[50.0, 20.0, 8.0, _RNG.uniform(0.01, 0.1, P - 3)],
    "null": np.r_[10.0, _RNG.uniform(0.05, 1, 23), np.zeros(P - 24)],
    "indefinite": np.r_[8.0, 5.0, 5.0, -2.0, 0.5 * _RNG.standard_normal(P - 4)],
}
SEEDS = 200


def matrix(spectrum: np.ndarray, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))
    A = (Q * spectrum) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


def least_covered(level: float = 0.9, n: int = SEEDS) -> float:
    """The level less two binomial deviations."""
    return float(level - 2 * (level * (1 - level) / n) ** 0.5)

"""Dense symmetric matrices with prescribed spectra, and what is wanted of them by definition."""

from __future__ import annotations

import numpy as np
import torch


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    A = (Q * values) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


def spread(P: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 1).standard_normal(P)


SPECTRA = {
    "indefinite": spread(60),
    "cluster": np.concatenate([5 + 1e-9 * np.arange(5), spread(55)]),
    "multiple": np.concatenate([np.full(10, 5.0), np.full(7, -4.0), spread(43)]),
    "low rank": np.concatenate([[3.0, -2.0, 1.0], np.zeros(57)]),
    "zero": np.zeros(60),
    "identity": np.ones(60),
    "outliers": np.concatenate([10.0 ** np.arange(1, 5), 0.01 * spread(56)]),
}


def wanted(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """The definition: sort everything, take k."""
    values = np.sort(values)
    if which == "LM":
        return values[np.argsort(-np.abs(values), kind="stable")][:k]
    if which == "LA":
        return values[::-1][:k]
    if which == "SA":
        return values[:k]
    return np.concatenate([values[: k // 2], values[len(values) - (k - k // 2) :]])


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


class Counting:
    """A dense matrix as an operator that counts its products."""

    def __init__(self, A: torch.Tensor) -> None:
        self.A, self.products = A, 0
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.products += V.shape[1]
        return self.A @ V

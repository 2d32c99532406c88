"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from flatcore import _C
from flatcore.environment import full_precision
from flatcore.linear import LinearView, as_operator, check_count, check_seed
from flatcore.results import Density

__all__ = ["spectral_density"]


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

    nodes, weights, matvecs = [], [], 0
    for first in range(0, probes, block):
        with full_precision():
            group_nodes, group_weights, products = _quadratures(
                operator, seed, first, min(block, probes - first), steps
            )
        nodes += group_nodes
        weights += group_weights
        matvecs += products
    return Density(
        nodes=np.stack(nodes),
        weights=np.stack(weights),
        dimension=operator.P,
        matvecs=matvecs,
        seconds=time.perf_counter() - began,
        seed=seed,
    )


def _quadratures(
    operator: LinearView, seed: int, first: int, count: int, steps: int
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Nodes and weights of probes first to first + count - 1, padded to ``steps``, and the products used."""
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    start = _C.krylov.rademacher(seed, first, count, operator.P, like)
    alpha, beta, lengths, products = _C.krylov.tridiagonalise(operator.apply, start, steps)
    nodes, weights = [], []
    for diagonal, coupling, length in zip(alpha.numpy(), beta.numpy(), lengths, strict=True):
        off = np.diag(coupling[: length - 1], 1)
        values, vectors = np.linalg.eigh(np.diag(diagonal[:length]) + off + off.T)
        padding = steps - length
        nodes.append(np.pad(values, (0, padding), mode="edge"))
        weights.append(np.pad(vectors[0] ** 2, (0, padding)))
    return nodes, weights, products

"""How many vectors a product should take, from what products cost."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from flatcore.linear import LinearView

__all__ = ["DEFAULT_BLOCK", "measured_block"]

_WIDTHS = (1, 2, 4, 8, 16)


# The default, the same whatever a product costs, so that a seed gives the same numbers every time. On a net whose
# products cost the same per vector in blocks and alone, two vectors needed 36 products where four needed 46 and eight
# 58 (docs/performance.md); one alone needs more again, as it cannot see that a value has copies.
DEFAULT_BLOCK = 2


def measured_block(
    operator: LinearView, k: int, seed: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[int, int]:
    """The width of least time t(K) / sqrt(K) among 1, 2, 4, ... up to k + 2, and the products this took.

    Block Lanczos with K vectors converges like exp(-2 steps sqrt(gap)), where the gap is that between the wanted
    value and the K-th behind it, relative to the spectrum's width (Saad, SIAM J. Numer. Anal. 17 (1980) 687-706).
    Where values are evenly spaced that gap grows like K, so that steps fall like 1 / sqrt(K): the time of all
    steps goes like t(K) / sqrt(K).
    """
    most = min(k + 2, operator.P)
    widths = [K for K in _WIDTHS if most >= K]
    generator = torch.Generator("cpu").manual_seed(seed % 2**63)
    rows = (
        torch.randn(widths[-1], operator.P, generator=generator, device="cpu")
        .to(operator.dtype)
        .to(operator.device)
    )
    operator.apply(rows[:1])  # buffers, caches, states of the batches
    cost = {}
    for K in widths:
        _settle(operator.device)
        began = clock()
        operator.apply(rows[:K])
        _settle(operator.device)
        cost[K] = clock() - began
    return min(widths, key=lambda K: cost[K] / K**0.5), 1 + sum(widths)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

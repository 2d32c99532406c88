"""Precision of a product's matrix multiplications: as the parameters', or operands rounded to bfloat16."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flatcore._C import engine, krylov
from flatcore.errors import FlatcoreWarning
from flatcore.results import MeasuredError
from flatcore.vectors import Layout

Precision = Literal["full", "bf16"]
Product = Callable[[Tensor], Tensor]  # of rows (K, P)


def usable(precision: Any, layout: Layout) -> Precision:
    """``precision`` as products can have it here: full, with a FlatcoreWarning, where the processor lacks bfloat16.

    Raises ValueError for another name, and for parameters whose products have no other precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f'precision: expected "full" or "bf16", got {precision!r}')
    if precision == "full":
        return "full"
    if layout.dtype != torch.float32:
        raise ValueError(
            f'precision: expected "full" for parameters of {layout.dtype}, got "bf16", which rounds float32; '
            "convert the model and the data with .float(), or leave precision out"
        )
    if layout.device.type != "cpu":
        raise ValueError(
            f'precision: expected "full" for parameters on {layout.device}, got "bf16", which is for '
            "products on the CPU; leave precision out"
        )
    if not engine.bf16_available():
        warnings.warn(
            'precision="bf16": this processor has no instructions for bfloat16 that torch uses, so the products are in '
            "full precision",
            FlatcoreWarning,
            stacklevel=3,
        )
        return "full"
    return "bf16"


def measured(
    lower: Product, full: Product, like: Tensor, precision: Precision, vectors: int, seed: int
) -> MeasuredError:
    """Compares two products on ``vectors`` random signs like the rows (P,) of ``like``."""
    started = time.perf_counter()
    V = krylov.rademacher(seed, 0, vectors, like.numel(), like)
    B, A = lower(V), full(V)
    difference, size = _norms(B - A), _norms(A)
    return MeasuredError(
        errors=torch.where(difference == 0, 0.0, difference / size),
        asymmetry=_asymmetry(V, B),
        precision=precision,
        matvecs=2 * vectors,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.cpu()


def _asymmetry(V: Tensor, B: Tensor) -> float:
    """sqrt of the mean over i < j of (<v_i, B v_j> - <v_j, B v_i>)^2 over that of |B v|^2, from the rows of V and B V.

    For random signs the expectations are |B - B^T|_F^2 and |B|_F^2.
    """

    def inner(i: int, j: int) -> float:
        return float((V[i] * B[j]).sum(dtype=torch.float64))

    differences = [inner(i, j) - inner(j, i) for i, j in combinations(range(len(V)), 2)]
    if not differences:
        return math.nan
    size = float(_norms(B).square().mean())
    return math.sqrt(sum(d * d for d in differences) / len(differences) / size) if size else 0.0

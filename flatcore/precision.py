"""Precision of a product's matrix multiplications: as the parameters', or operands rounded to bfloat16 or TF32."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from flatcore._C import engine, krylov
from flatcore.errors import warn
from flatcore.results import MeasuredError
from flatcore.vectors import Layout

Precision = Literal["full", "tf32", "bf16"]
_VECTORS_AT_ONCE = 16
_TENSOR_CORES = (8, 0)  # the first compute capability that rounds to TF32 and bfloat16 itself
Product = Callable[[Tensor], Tensor]  # of rows (K, P)


def usable(precision: Any, layout: Layout) -> Precision:
    """``precision`` as products can have it here: full, with a FlatcoreWarning, where the device lacks instructions.

    Raises ValueError for another name, and for parameters whose products have no other precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f'precision: expected "full", "tf32" or "bf16", got {precision!r}')
    if precision == "full":
        return "full"
    if layout.dtype != torch.float32:
        raise ValueError(
            f'precision: expected "full" for parameters of {layout.dtype}, got "{precision}", which rounds float32; '
            "convert the model and the data with .float(), or leave precision out"
        )
    on_gpu = layout.device.type == "cuda" or engine.gpu == "emulated"
    if precision == "tf32" and not on_gpu:
        raise ValueError(
            f'precision: expected "full" or "bf16" for parameters on {layout.device}, got "tf32", which is for '
            "products on a GPU; move the model and the data there, or leave precision out"
        )
    if layout.device.type == "cuda":
        there = torch.cuda.get_device_capability(layout.device) >= _TENSOR_CORES
    else:
        there = on_gpu or engine.bf16_available()
    if not there:
        warn(
            f'precision="{precision}": {layout.device} has no instructions for it that torch uses, so the products are '
            "in full precision"
        )
        return "full"
    return cast("Precision", precision)


def measured(
    lower: Product, full: Product, like: Tensor, precision: Precision, vectors: int, seed: int
) -> MeasuredError:
    """Compares two products on ``vectors`` random signs like the rows (P,) of ``like``, a few at a time."""
    started = time.perf_counter()
    errors, differences, sizes = [], [], []
    for first in range(0, vectors, _VECTORS_AT_ONCE):
        count = min(_VECTORS_AT_ONCE, vectors - first)
        V = krylov.rademacher(seed, first, count, like.numel(), like)
        B = lower(V)
        differences += _differences(V, B)
        sizes.append(_norms(B))
        A = full(V)
        size = _norms(A)
        difference = _norms(A.sub_(B))
        errors.append(torch.where(difference == 0, 0.0, difference / size))
    return MeasuredError(
        errors=torch.cat(errors),
        asymmetry=_asymmetry(differences, torch.cat(sizes)),
        precision=precision,
        matvecs=2 * vectors,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.cpu()


def _differences(V: Tensor, B: Tensor) -> list[float]:
    """<v_i, B v_j> - <v_j, B v_i> for i < j, from the rows of V and B V."""

    def inner(i: int, j: int) -> float:
        return float((V[i] * B[j]).sum(dtype=torch.float64))

    return [inner(i, j) - inner(j, i) for i, j in combinations(range(len(V)), 2)]


def _asymmetry(differences: list[float], sizes: Tensor) -> float:
    """sqrt of the mean of the squared differences over that of |B v|^2.

    For random signs the expectations are |B - B^T|_F^2 and |B|_F^2.
    """
    if not differences:
        return math.nan
    size = float(sizes.square().mean())
    return math.sqrt(sum(d * d for d in differences) / len(differences) / size) if size else 0.0

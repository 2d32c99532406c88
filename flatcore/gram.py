"""The eigenvalues of A = Rᵀ diag(s) R from the Gram matrix R Rᵀ, where R has fewer rows than columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flatcore import _C
from flatcore.adaptive import finite
from flatcore.errors import NoRowsError
from flatcore.linear import LinearView
from flatcore.memory import free_bytes

__all__ = ["GramMatrix", "gram_of"]

# What things cost in units of one flop of a large float32 matrix product: float64, LAPACK's eigenvalues, a backward
# pass of one example, whose matrices are thin, and what evaluating a model or calling a product takes at least.
_DOUBLE, _EIGEN, _THIN, _EVALUATION, _CALL = 2.0, 4.0, 4.0, 2e7, 2e6
_PANEL = 2**20  # numbers that are converted to float64 at once
_STRIP = 64  # rows that a matrix product has at least


class Unit(Protocol):
    """Rows first, first + 1, ...: their signs, float64, and a way to compute them, (len(signs), P)."""

    first: int
    signs: Tensor
    rows: Callable[[], Tensor]


class Extent(Protocol):
    """most: rows there may be in all; largest: rows of one unit; units: evaluations of the model;
    passes: what the backward passes of all rows cost, in backward passes through all data."""

    most: int
    largest: int
    units: int
    passes: float


class Rows(Protocol):
    """R and s, a unit of rows after the other."""

    extent: Extent

    def units(self) -> Iterator[Unit]: ...


@dataclass(frozen=True)
class GramMatrix:
    """What ``A.output_rows()`` tells of an operator: that it is Rᵀ diag(s) R.

    products_worth: cost of the eigenvalues, or without them of `power_sums`, in products with one vector.
    """

    operator: LinearView
    rows: Rows
    _flops: float

    @property
    def bytes(self) -> int:
        """At least: the matrix, what LAPACK makes of it, and twice the rows of one unit."""
        extent, P = self.rows.extent, self.operator.P
        return 3 * 8 * extent.most**2 + 2 * extent.largest * P * self.operator.dtype.itemsize

    def products_worth(self, eigenvalues: bool) -> float:
        extent, P = self.rows.extent, self.operator.P
        # A row's backward pass is half of a product: that has a forward sweep as well.
        rows = extent.passes * self._flops / 2 * _THIN + extent.units * _EVALUATION
        gram = extent.most**2 * P * _DOUBLE
        lapack = 4 / 3 * extent.most**3 * _DOUBLE * _EIGEN if eigenvalues else 0.0
        return 1 + (rows * self._sweeps() + gram + lapack) / max(self._flops, _CALL)

    def _held(self) -> int:
        """Rows that are kept at once."""
        extent, P = self.rows.extent, self.operator.P
        free = free_bytes(self.operator.device) // 2 - 3 * 8 * extent.most**2
        return int(
            min(extent.most, max(free // (P * self.operator.dtype.itemsize) - extent.largest, extent.largest))
        )

    def _sweeps(self) -> float:
        """How often each row is computed."""
        times = -(-self.rows.extent.most // max(1, self._held()))
        return (times + 1) / 2

    def eigenvalues(self) -> np.ndarray:
        """All P, increasing, in float64: those of R Rᵀ diag(s), and zeros.

        With R Rᵀ = B Bᵀ they are those of Bᵀ diag(s) B, which is symmetric where signs differ too.
        """
        K, signs = self._matrix()
        if (signs < 0).any():
            values, vectors = np.linalg.eigh(K)
            B = vectors * np.sqrt(np.maximum(values, 0.0))  # negative ones are rounding
            K = (B.T * signs) @ B
        values = np.linalg.eigvalsh(K)
        return np.sort(np.concatenate([values, np.zeros(self.operator.P - len(values))]))

    def power_sums(self) -> tuple[float, float]:
        """tr A and tr A²."""
        K, signs = self._matrix()
        return float(signs @ K.diagonal()), float(signs @ K**2 @ signs)

    @torch.inference_mode(False)  # rows are taken by autograd, and sums written in place
    def _matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """R Rᵀ and s. The rows are checked on the way by a product: Rᵀ diag(s) R v = A v for random signs v."""
        operator, extent = self.operator, self.rows.extent
        like = torch.empty(0, dtype=operator.dtype, device=operator.device)
        v = _C.krylov.rademacher(0, 0, 1, operator.P, like)
        expected = finite(operator.apply(v))[0]
        found = torch.zeros_like(expected)
        K = torch.zeros(extent.most, extent.most, dtype=torch.float64, device=operator.device)
        signs = torch.zeros(extent.most, dtype=torch.float64, device="cpu")
        done, total, first_sweep = 0, 0, True
        while first_sweep or done < total:
            held = torch.empty(self._held(), operator.P, dtype=operator.dtype, device=operator.device)
            kept, full = 0, False
            for unit in self.rows.units():
                count = len(unit.signs)
                if count == 0 or unit.first < done:
                    continue
                rows = finite(unit.rows())
                if first_sweep:
                    signs[unit.first : unit.first + count] = unit.signs
                    found += (unit.signs.to(rows) * (rows @ v[0])) @ rows
                    total = unit.first + count
                full = full or kept + count > len(held)
                if full and kept == 0:
                    raise NoRowsError(
                        f"the {count} outputs of a batch, whose loss couples its examples, do not fit"
                    )
                if not full:
                    held[kept : kept + count] = rows
                    kept += count
                else:
                    block = _products(rows, held[:kept])
                    K[unit.first : unit.first + count, done : done + kept] = block
                    K[done : done + kept, unit.first : unit.first + count] = block.T
            K[done : done + kept, done : done + kept] = _symmetric_products(held[:kept])
            done, first_sweep = done + kept, False
        off, size = float((found - expected).norm()), float(torch.maximum(found.norm(), expected.norm()))
        if off > math.sqrt(torch.finfo(operator.dtype).eps) * size:
            raise NoRowsError(
                f"its rows give a product that differs from A's by {off / size:.1g}, so that the outputs taken are not "
                "those the operator takes"
            )
        return K[:total, :total].cpu().numpy(), signs[:total].numpy()


def _products(X: Tensor, Y: Tensor) -> Tensor:
    """X Yᵀ in float64, converted in panels of columns."""
    result = torch.zeros(len(X), len(Y), dtype=torch.float64, device=X.device)
    width = max(1, _PANEL // max(len(X), len(Y), 1))
    for x, y in zip(X.split(width, dim=1), Y.split(width, dim=1), strict=True):
        result.addmm_(x.double(), y.double().T)
    return result


def _symmetric_products(X: Tensor) -> Tensor:
    """X Xᵀ in float64; little more than its upper half is computed."""
    result = torch.zeros(len(X), len(X), dtype=torch.float64, device=X.device)
    step = max(_STRIP, -(-len(X) // 8))
    for panel in X.split(max(1, _PANEL // max(len(X), 1)), dim=1):
        wide = panel.double()
        for first in range(0, len(X), step):
            result[first : first + step, first:].addmm_(wide[first : first + step], wide[first:].T)
    return result.triu() + result.triu(1).T


def gram_of(A: Any, operator: LinearView, asked: bool) -> GramMatrix | None:
    """The Gram matrix of an operator that has rows, or None.

    Raises ValueError instead where it is asked for.
    """
    rows = A.output_rows() if hasattr(A, "output_rows") else None
    reason = ""
    if rows is None:
        reason = f"A ({type(A).__name__}) is known by its products alone; take fc.GGN or another method"
    else:
        try:
            extent = rows.extent
        except NoRowsError as error:
            reason = f"{error}; take another method"
        else:
            found = GramMatrix(operator, rows, A.plan().flops(1))
            free = free_bytes(torch.device("cpu")) // 2
            if extent.most >= operator.P:
                reason = (
                    f"the model has {extent.most:,} outputs on all data, no fewer than the P = {operator.P:,} "
                    'parameters; take method="exact"'
                )
            elif found.bytes > free:
                reason = (
                    f"the Gram matrix of {extent.most:,} outputs takes {found.bytes / 2**30:.1f} GiB, more than half "
                    "of what is free; take fewer data or another method"
                )
            else:
                return found
    if asked:
        raise ValueError(f'method: "gram" needs a Gauss-Newton matrix of few outputs: {reason}')
    return None

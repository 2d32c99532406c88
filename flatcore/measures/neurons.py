"""A layer's weight as rows w_s of neurons, for features that may be standardised, and directions in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcore.measures.layers import Layer
from flatcore.operators import Hessian

__all__ = ["Neurons", "NeuronsHessian", "embedded"]


@dataclass(frozen=True)
class Neurons:
    """Of the weight W and deviations s of its inputs, W' = W diag(s) and phi' = phi / s, so that W' phi' = W phi.

    ``weight``: W' (groups, outputs, columns), float64, a column for each input and place of the kernel. ``inverse``:
    1 / s by column, 1 where s is 0. ``order``: where each entry stands in the flat weight.
    """

    layer: Layer
    weight: Tensor
    inverse: Tensor
    order: Tensor
    standardized: bool

    @staticmethod
    def of(layer: Layer, weight: Tensor, deviations: Tensor | None) -> Neurons:
        matrices = layer.matrices(weight.double())
        groups, outputs, inputs, places = matrices.shape
        s = weight.new_ones(groups * inputs, dtype=torch.float64) if deviations is None else deviations
        by_column = (
            s.to(weight.device).view(groups, 1, inputs, 1).expand(-1, -1, -1, places).reshape(groups, 1, -1)
        )
        numbers = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
        return Neurons(
            layer,
            matrices.reshape(groups, outputs, -1) * by_column,
            torch.where(by_column > 0, 1 / by_column, 1.0),
            layer.matrices(numbers).reshape(-1),
            deviations is not None,
        )

    @property
    def outputs(self) -> int:
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def columns(self) -> int:
        return self.weight.shape[2]

    def root(self) -> Tensor:
        """R with R Rᵀ = W' W'ᵀ in each group, (groups, outputs, least of outputs and columns)."""
        if self.columns <= self.weight.shape[1]:
            return self.weight
        values, vectors = torch.linalg.eigh(self.weight @ self.weight.mT)
        root: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        return root

    def directions(self, U: Tensor, dtype: torch.dtype) -> Tensor:
        """Changes U (K, groups, outputs, columns) of W' as changes of the flat weight, (K, n)."""
        rows = torch.empty(len(U), self.order.numel(), dtype=dtype, device=U.device)
        rows[:, self.order] = (U * self.inverse).to(dtype).flatten(1)
        return rows


class NeuronsHessian:
    """The Hessian in the coordinates W' of several layers, one after another, each neuron's entries together.

    ``parameter_slices``: of each neuron, as (path, number), or of each layer.
    """

    def __init__(self, hessian: Hessian, layers: Mapping[str, Neurons], by: str) -> None:
        self._hessian, self._layers = hessian, layers
        self.dtype, self.device = hessian.dtype, hessian.device
        self.parameter_slices: dict[tuple[str, int], slice] = {}
        start = 0
        for path, neurons in layers.items():
            blocks = neurons.outputs if by == "neuron" else 1
            size = neurons.order.numel() // blocks
            for s in range(blocks):
                self.parameter_slices[path, s] = slice(start, start + size)
                start += size
        self.shape = (start, start)

    def __matmul__(self, V: Tensor) -> Tensor:
        slices = self._hessian.parameter_slices
        rows = torch.zeros(V.shape[1], self._hessian.shape[0], dtype=self.dtype, device=self.device)
        sizes = [n.order.numel() for n in self._layers.values()]
        for neurons, part in zip(self._layers.values(), V.T.split(sizes, 1), strict=True):
            U = part.reshape(-1, *neurons.weight.shape)
            rows[:, slices[neurons.layer.weight]] = neurons.directions(U, self.dtype)
        products = (self._hessian @ rows.T).T
        parts = [_back(n, products[:, slices[n.layer.weight]]) for n in self._layers.values()]
        return torch.cat(parts, 1).T


def _back(neurons: Neurons, rows: Tensor) -> Tensor:
    U = rows[:, neurons.order].view(-1, *neurons.weight.shape)
    return (U * neurons.inverse.to(rows.dtype)).flatten(1)


def embedded(parts: Sequence[tuple[slice, Tensor]], like: Hessian) -> Tensor:
    """Directions (K, P) that are zero outside of these parts."""
    rows = torch.zeros(len(parts[0][1]), like.shape[0], dtype=like.dtype, device=like.device)
    for place, part in parts:
        rows[:, place] = part
    return rows

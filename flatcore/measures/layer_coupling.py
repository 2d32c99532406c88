"""Gains of layers, balance between consecutive ones, and the angles between their singular vectors, for any net."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcore.measures.layers import Layer

__all__ = ["Coupling", "Gain", "couplings", "gains", "table"]

_SHOWN = 10  # singular vectors of which the angles are kept


@dataclass(frozen=True)
class Gain:
    """Of one weight matrix, outputs by (inputs * places in the kernel): shape, largest singular value, Frobenius norm,
    and all singular values, decreasing."""

    path: str
    outputs: int
    inputs: int
    places: int
    spectral: float
    frobenius: float
    singular_values: Tensor


@dataclass(frozen=True)
class Coupling:
    """How the outputs of one layer meet the inputs of the next.

    ``cosines`` (i, j): |<u_i, v_j>| for the leading left singular vectors of the one and right singular vectors of
    the other; where an output of the one is several inputs of the other (the places of a kernel, or a flattened
    image), the length of v_j's part along u_i (x) anything. ``top``: cosine of u_1 and v_1. ``best``: largest cosine
    of u_1 and any v_j, j its number from 1. ``chance``: root mean square of the cosine of random vectors.
    ``imbalance``: |W'ᵀ W' - W Wᵀ|_F / sqrt(|W'ᵀ W'|_F |W Wᵀ|_F), 0 for a balanced pair. ``reason``: why there is none
    of all this.
    """

    first: str
    second: str
    cosines: Tensor | None = None
    top: float = math.nan
    best: tuple[float, int] = (math.nan, 0)
    chance: float = math.nan
    imbalance: float = math.nan
    reason: str = ""


def gains(layers: Sequence[Layer], values: dict[str, Tensor]) -> list[Gain]:
    result = []
    for layer in layers:
        matrices = layer.matrices(values[layer.weight].detach()).double()
        groups, outputs, inputs, places = matrices.shape
        singular = torch.linalg.svdvals(matrices.reshape(groups, outputs, inputs * places))
        singular = singular.flatten().sort(descending=True).values.cpu()
        result.append(
            Gain(
                layer.path,
                groups * outputs,
                groups * inputs,
                places,
                float(singular[0]),
                float(matrices.norm()),
                singular,
            )
        )
    return result


def couplings(layers: Sequence[Layer], values: dict[str, Tensor]) -> list[Coupling]:
    """Of each layer and the one listed next."""
    return [_couple(a, b, values) for a, b in itertools.pairwise(layers)]


def _couple(first: Layer, second: Layer, values: dict[str, Tensor]) -> Coupling:
    W = first.matrices(values[first.weight].detach()).double()
    V = second.matrices(values[second.weight].detach()).double()
    if W.shape[0] > 1 or V.shape[0] > 1:
        return Coupling(first.path, second.path, reason="a grouped convolution")
    W, V = W[0].flatten(1), V[0]
    d, (outputs, inputs, places) = len(W), V.shape
    if inputs % d:
        return Coupling(first.path, second.path, reason=f"{d} outputs, {inputs} inputs")
    V = V.reshape(outputs, d, inputs // d * places)
    left = torch.linalg.svd(W, full_matrices=False)[0][:, :_SHOWN]
    right = torch.linalg.svd(V.flatten(1), full_matrices=False)[2].reshape(-1, *V.shape[1:])
    cosines = torch.einsum("di,jdp->ijp", left, right).norm(dim=2)
    along = cosines[0].max(dim=0)
    after, before = torch.einsum("odp,oep->de", V, V), W @ W.T
    scale = math.sqrt(float(after.norm()) * float(before.norm()))
    return Coupling(
        first.path,
        second.path,
        cosines=cosines[:, :_SHOWN].cpu(),
        top=float(cosines[0, 0]),
        best=(float(along.values), int(along.indices) + 1),
        chance=1 / math.sqrt(d),
        imbalance=float((after - before).norm()) / scale if scale else math.nan,
    )


def table(gain: Sequence[Gain], coupling: Sequence[Coupling]) -> str:
    """One line a layer, with its coupling to the next."""
    width = max(5, *(len(g.path) for g in gain))
    head = f"{'layer':<{width}}  {'shape':>14}  {'gain':>9}  {'|W|_F':>9}   to the next: {'imbalance':>9}  "
    lines = [head + f"{'cos u1,v1':>9}  {'best cos (j)':>13}  {'chance':>6}"]
    for index, g in enumerate(gain):
        shape = f"{g.outputs} x {g.inputs}" + (f" x {g.places}" if g.places > 1 else "")
        line = f"{g.path:<{width}}  {shape:>14}  {g.spectral:>9.4g}  {g.frobenius:>9.4g}"
        if index < len(coupling):
            c = coupling[index]
            best = f"{c.best[0]:.3f} ({c.best[1]})"
            numbers = f"{c.imbalance:>9.3g}  {c.top:>9.3f}  {best:>13}  {c.chance:>6.3f}"
            line += " " * 16 + (f"{'none: ' + c.reason}" if c.reason else numbers)
        lines.append(line.rstrip())
    return "\n".join(lines)

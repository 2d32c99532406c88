"""Kronecker factors of the Gauss-Newton matrix's diagonal blocks, and the eigenvalues they give.

Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015; for
convolutions Grosse and Martens, ICML 2016. With a the inputs of a layer (and 1 for its bias) and d the derivatives of
the columns of the outputs' curvature root by the layer's outputs, over R rows (examples times places),

    block  sum_rows (d dᵀ) (x) (a aᵀ)   is taken as   (sum_rows d dᵀ) (x) (1/R) sum_rows a aᵀ.

All columns are swept, no labels are drawn. Exact for one row, and for linear nets with a squared error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatcore.environment import exclusive
from flatcore.evaluate import Evaluation, plain_torch
from flatcore.measures.layers import Layer, find_layers
from flatcore.measures.likelihood import curvature_at_outputs
from flatcore.objective import Objective, WeightedBatch

__all__ = ["kfac_eigenvalues"]


@exclusive
def kfac_eigenvalues(objective: Objective) -> dict[str, Tensor]:
    """Of each layer the products of the two factors' eigenvalues, float64. Cost: outputs backward passes a batch.

    Raises ValueError for parameters of other modules than linear layers and convolutions without groups, and for
    outputs that are not examples by numbers.
    """
    layers = find_layers(objective)
    _check(objective, layers)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    values = objective.snapshot().values
    with plain_torch(objective.layout.device):
        for batch in objective.batches():
            for path, a, d, rows in _factors(objective, batch, values, layers):
                before = sums.get(path)
                sums[path] = (
                    (a, d, rows) if before is None else (before[0] + a, before[1] + d, before[2] + rows)
                )
    result = {}
    for path, (a, d, rows) in sums.items():
        inner, outer = torch.linalg.eigvalsh(a / rows), torch.linalg.eigvalsh(d)
        result[path] = torch.outer(outer.clamp_min(0), inner.clamp_min(0)).flatten().cpu()
    return result


def _factors(
    objective: Objective, batch: WeightedBatch, values: dict[str, Tensor], layers: list[Layer]
) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Path, sum of a aᵀ, sum of d dᵀ and number of rows, of one batch."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer in layers:

        def record(_: nn.Module, args: Any, output: Tensor, path: str = layer.path) -> None:
            if path in seen:
                raise ValueError(
                    f"objective: expected layers that run once for method='kfac', got {path!r} twice"
                )
            seen[path] = (args[0].detach(), output)

        handles.append(layer.module.register_forward_hook(record))
    try:
        leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
        evaluation = objective.evaluate(batch.batch, leaves)
    finally:
        for handle in handles:
            handle.remove()
    if len(evaluation.outputs) != 1 or evaluation.outputs[0].dim() != 2:
        raise ValueError(
            "objective: expected one output of examples by numbers for method='kfac', got "
            f"{[tuple(z.shape) for z in evaluation.outputs]}; use another method"
        )
    used = [layer for layer in layers if layer.path in seen]
    z, places = evaluation.outputs[0], [seen[layer.path][1] for layer in used]
    outer: list[Any] = [0.0] * len(used)
    for column in _root_columns(evaluation, z, batch.weight):
        gradients = torch.autograd.grad(z, places, column, retain_graph=True)
        for index, (layer, g) in enumerate(zip(used, gradients, strict=True)):
            rows = _output_rows(layer, g).double()
            outer[index] = outer[index] + rows.T @ rows
    for layer, d in zip(used, outer, strict=True):
        a = _input_rows(layer, seen[layer.path][0]).double()
        yield layer.path, a.T @ a, d, len(a)


def _root_columns(evaluation: Evaluation, z: Tensor, weight: float) -> Iterator[Tensor]:
    """Columns of S^(1/2) for all rows of z at once, S the blocks of the loss's second derivative by a row of z."""
    columns = []
    for k in range(z.shape[1]):
        unit = torch.zeros_like(z)
        unit[:, k] = 1
        product = curvature_at_outputs(evaluation, z, unit)
        columns.append(torch.zeros_like(z) if product is None else product)
    blocks = weight * torch.stack(columns, dim=2).double()
    eigenvalues, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    if bool((eigenvalues < -1e-6 * eigenvalues.abs().max()).any()):
        raise ValueError(
            "loss: expected one that is convex in the outputs for method='kfac', got negative curvature"
        )
    roots = vectors * eigenvalues.clamp_min(0).sqrt()[:, None, :]
    for k in range(z.shape[1]):
        yield roots[:, :, k].to(z)


def _input_rows(layer: Layer, x: Tensor) -> Tensor:
    """(rows, inputs), with a last column of ones for a bias that is selected."""
    module = layer.module
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise ValueError(
                f"objective: expected numbers as zero padding for method='kfac', got {layer.path!r}"
            )
        patches = torch.nn.functional.unfold(
            x,
            module.kernel_size,
            module.dilation,
            module.padding,
            module.stride,
        )
        rows = patches.mT.reshape(-1, patches.shape[1])
    else:
        rows = x.reshape(-1, x.shape[-1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if layer.bias else rows


def _output_rows(layer: Layer, g: Tensor) -> Tensor:
    if isinstance(layer.module, nn.Conv2d):
        return g.flatten(2).mT.reshape(-1, g.shape[1])
    return g.reshape(-1, g.shape[-1])


def _check(objective: Objective, layers: list[Layer]) -> None:
    for layer in layers:
        fine = isinstance(layer.module, nn.Conv2d) or (
            isinstance(layer.module, nn.Linear) and layer.outputs_first
        )
        if not fine or layer.groups > 1 or layer.uses > 1:
            shared = "a shared weight" if layer.uses > 1 else f"a {type(layer.module).__name__}"
            grouped = " with groups" if layer.groups > 1 else ""
            raise ValueError(
                f"objective: expected Linear and Conv2d layers without groups for method='kfac', got {layer.path!r}, "
                f"{shared}{grouped}"
            )
        size = math.prod(objective.layout.shapes[layer.weight][1:])
        if size > 10_000:
            raise ValueError(
                f"objective: expected at most 10 000 inputs for method='kfac', got {size} of {layer.path!r}"
            )
    covered = {layer.weight for layer in layers} | {layer.bias for layer in layers if layer.bias}
    other = [name for name in objective.layout.shapes if name not in covered]
    if other:
        raise ValueError(
            f"objective: expected parameters of linear layers and convolutions for method='kfac', got {other[0]!r}; "
            "select others with params="
        )

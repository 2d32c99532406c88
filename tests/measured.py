"""Small float64 nets, their dense Hessians by torch.func, and copies that compute the same function."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from reference import Reference
from torch import Tensor, nn

import flatcore as fc

Batch = tuple[Tensor, Tensor]
EPS = torch.finfo(torch.float64).eps


def mlp(
    *widths: int, bias: bool = True, activation: Callable[[], nn.Module] = nn.ReLU, seed: int = 0
) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float64)
        for p in linear.parameters():
            scale = 1.3 / inputs**0.5 if p.dim() > 1 else 0.3
            p.data.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        modules += [linear, activation()]
    return nn.Sequential(*modules[:-1])


def batch(examples: int, inputs: int, classes: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (examples,), generator=generator)


def cross_entropy(model: nn.Module, data: Batch, params: object = None) -> fc.Objective:
    return fc.Objective(model, F.cross_entropy, data, params=params)


def dense_hessian(objective: fc.Objective, data: Batch) -> Tensor:
    """By torch.func alone, in the order of the objective's flat vector; every parameter is selected."""
    return Reference(objective.model, objective.loss_function, data, "output_target").hessian()


def rescaled(model: nn.Sequential, seed: int = 3, largest: float = 20.0) -> nn.Sequential:
    """The same function of the input: in front of each ReLU every neuron is scaled by a factor, behind it back."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    layers = [m for m in other if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for before, behind in itertools.pairwise(layers):
            c = (
                largest * (torch.rand(before.out_features, generator=generator, dtype=torch.float64) - 0.5)
            ).exp2()
            before.weight *= c[:, None]
            if before.bias is not None:
                before.bias *= c
            behind.weight /= c
    return other


def close(a: float, b: float, relative: float) -> bool:
    return abs(a - b) <= relative * max(abs(a), abs(b))

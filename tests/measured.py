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
from flatcore import measures

Batch = tuple[Tensor, Tensor]
EPS = torch.finfo(torch.float64).eps
CONVOLUTION = 2, 4  # channels in and size of the images of `convolutional`


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


def blocks(model: nn.Module, data: Batch, path: str, groups: int = 1) -> list[tuple[Tensor, Tensor]]:
    """(W, H) of each group: (d, m) and (d, m, d, m), from the dense Hessian of everything."""
    objective = cross_entropy(model, data)
    weight = model.get_submodule(path).weight.detach()
    place = objective.parameter_slices[f"{path}.weight"]
    W = weight.reshape(groups, weight.shape[0] // groups, -1)
    size = W[0].numel()
    H = dense_hessian(objective, data)[place, place].view(groups, size, groups, size)
    return [(W[g], H[g, :, g].view(*W[g].shape, *W[g].shape)) for g in range(groups)]


def kappa(W: Tensor, H: Tensor) -> float:
    """The definition, one neuron after another."""
    d = range(len(W))
    return sum(float(W[s] @ W[t]) * float(H[s, :, t, :].diagonal().sum()) for s in d for t in d)


def dense_value(form: str, W: Tensor, H: Tensor) -> float:
    flat = H.reshape(W.numel(), W.numel())
    square = float(W.square().sum())
    if form == "max":
        tops = [float(torch.linalg.eigvalsh(H[s, :, s, :])[-1]) for s in range(len(W))]
        return sum(float(w @ w) * top for w, top in zip(W, tops, strict=True))
    if form == "2019-max":
        return square * float(torch.linalg.eigvalsh(flat)[-1])
    if form == "2021":
        return kappa(W, H)
    return square * float(flat.diagonal().sum()) / (W.numel() if form == "2019" else 1)


def convolutional(groups: int = 1) -> tuple[nn.Sequential, Batch]:
    torch.manual_seed(0)
    channels, size = CONVOLUTION
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3, groups=groups), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2, 3)
    )
    x = torch.randn(9, channels, size, size, dtype=torch.float64)
    return model.double(), (x * torch.tensor([1.0, 3.0]).view(2, 1, 1).double(), torch.arange(9) % 3)


def of_layer(model: nn.Module, data: object, path: str) -> fc.Objective:
    return cross_entropy(model, data, params=[f"{path}.weight"])


def value(model: nn.Module, data: object, path: str, **options: object) -> float:
    options = {"method": "exact", "standardize": False} | options
    return float(measures.relative_flatness(of_layer(model, data, path), path, **options).value)

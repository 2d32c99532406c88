"""The path norm: all paths through a net, each with the product of its squared weights."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatcore import checks
from flatcore.capture.batch import split_batch
from flatcore.environment import exclusive
from flatcore.evaluate import ModelLoss, plain_torch
from flatcore.measures.derived import check_objective
from flatcore.measures.result import Measure
from flatcore.objective import Objective

__all__ = ["path_norm"]

# Layers whose outputs on squared weights and ones are not sums over paths.
_NO_PATHS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.Embedding,
    nn.Bilinear,
)
_OTHER_ACTIVATIONS = (
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Softplus,
    nn.Mish,
    nn.SELU,
    nn.CELU,
    nn.Softmax,
)
_ROUNDING = 1000.0  # of sums of positive numbers, which lose no more than a unit for each term added in turn


@exclusive
def path_norm(objective: Objective) -> Measure:
    """sum_k f_{theta²}(1)_k: the net on an input of ones, with every parameter squared, summed over its outputs.

    Neyshabur, Tomioka and Srebro, "Norm-Based Capacity Control in Neural Networks", COLT 2015, as computed by Jiang et
    al., ICLR 2020: the sum, over paths from an input or a bias to an output, of the product of squared weights. No root
    is taken (``details["root"]``). One example of the shape of the data's first; each of its entries starts a path.

    A batch normalisation in eval mode is the scaling and shift it amounts to, both squared: a layer of its own, so the
    bias of a layer in front of it starts paths that its shift does not share. Max pooling takes the largest sum.
    Every parameter counts, selected or not; a weight made by a parametrisation counts as it is used.

    Units: squared weights to the power of the depth. Cost: three forward passes of one example, on a copy of the
    model: sums over paths are affine in the size of the input, which half of it and half as much again must show.
    Invariant to scaling neurons and whole layers in nets of ReLUs, and to rotations of the inputs. Not invariant to:
    rotations of hidden layers, scaling the inputs.
    Raises ValueError, one sentence, where the model has layers for which paths mean nothing: other normalisation,
    attention, recurrence, embeddings, activations that are not positively homogeneous, as modules or as functions.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    objective.snapshot()  # refuses parameters that are not finite
    for path, module in objective.model.named_modules():
        if isinstance(module, (*_NO_PATHS, *_OTHER_ACTIVATIONS)):
            raise ValueError(
                f"model: expected linear layers, convolutions, batch normalisation and ReLUs, whose paths are sums, "
                f"got {path!r} ({type(module).__name__}); the path norm does not apply"
            )
    if isinstance(objective.loss_function, ModelLoss):
        raise ValueError(
            "loss: expected loss(output, target), whose model is called with the inputs, got a ModelLoss, which calls "
            "the model itself"
        )
    checks.check_batch_statistics(objective.model)
    with plain_torch(objective.layout.device), torch.no_grad():
        model = copy.deepcopy(objective.model)
        _square(model)
        args, kwargs, _ = split_batch(next(iter(objective.batches())).batch)
        dtype = objective.layout.dtype

        def at(size: float) -> float:
            inputs = [_filled(a, size, dtype) for a in args]
            output = model(*inputs, **{k: _filled(a, size, dtype) for k, a in kwargs.items()})
            if not isinstance(output, Tensor):
                raise ValueError(f"model: expected one tensor of outputs, got {type(output).__name__}")
            return float(output.double().sum())

        less, value, more = at(0.5), at(1.0), at(1.5)
    if not abs(more - 2 * value + less) <= _ROUNDING * torch.finfo(dtype).eps * abs(value):
        raise ValueError(
            "model: expected outputs that are sums over paths, got a net that is not affine in the size of its input "
            "where all numbers are positive (an activation or a normalisation does that); the path norm does not apply"
        )
    return Measure(
        value=value,
        stderr=0.0,
        by_layer=None,
        definition="sum_k f_{theta²}(1)_k",
        matvecs=0,
        name="path norm",
        passes=3,
        seconds=time.perf_counter() - began,
        details={"root": value**0.5},
    )


def _square(model: nn.Module) -> None:
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                weight = nn.Parameter(getattr(module, name).detach().clone())
                parametrize.remove_parametrizations(module, name)
                delattr(module, name)  # a parameter or not, as gradients were on or off
                setattr(module, name, weight)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            mean, var = module.running_mean, module.running_var
            assert mean is not None and var is not None
            scale = (var + module.eps).rsqrt() * (1 if module.weight is None else module.weight)
            shift = (0 if module.bias is None else module.bias) - mean * scale
            module.eps, module.affine = 0.0, True
            module.running_mean, module.running_var = torch.zeros_like(mean), torch.ones_like(var)
            module.weight, module.bias = nn.Parameter(scale), nn.Parameter(shift)
    for parameter in model.parameters():
        parameter.data = parameter.data.square()


def _filled(value: Any, size: float, dtype: torch.dtype) -> Any:
    """One example of equal numbers in place of an input."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        raise ValueError(
            f"data: expected inputs of real numbers, got {value.dtype}; the path norm does not apply"
        )
    return torch.full_like(value[:1], size, dtype=dtype)

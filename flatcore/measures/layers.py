"""The weight matrices of a model: linear layers and convolutions, whose weights an objective has selected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatcore.objective import Objective
from flatcore.parameters import did_you_mean

__all__ = ["Layer", "find_layer", "find_layers", "layer_form", "layers_if_any"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """One weight matrix, d outputs by m inputs, or one per group of a grouped convolution.

    ``path``: of the module. ``weight``, ``bias``: names among the objective's selected parameters; bias is None where
    there is none or it is not selected. ``outputs_first``: the axes of the weight are (outputs, inputs, ...), not
    (inputs, outputs, ...). ``uses``: how many modules or names share the weight.
    """

    path: str
    module: nn.Module
    weight: str
    bias: str | None
    outputs_first: bool
    groups: int
    uses: int

    def matrices(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, outputs, inputs, places in the kernel)."""
        g, first, second = self.groups, tensor.shape[0], tensor.shape[1]
        places = math.prod(tensor.shape[2:])
        grouped = tensor.reshape(g, first // g, second, places)
        return grouped if self.outputs_first else grouped.transpose(1, 2)

    def from_matrices(self, matrices: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrices`: a tensor of the shape of ``like``."""
        return (matrices if self.outputs_first else matrices.transpose(1, 2)).reshape(like.shape)


def find_layers(objective: Objective) -> list[Layer]:
    """Linear layers (`nn.Linear`, Hugging Face's `Conv1D`) and convolutions with a selected weight, in module order.

    A weight that several of them share is listed once, at the first. Embeddings, recurrent layers, the packed
    projections of `nn.MultiheadAttention`, and weights made by a parametrisation are no layers here.
    Raises ValueError where there is none.
    """
    found = layers_if_any(objective)
    if not found:
        raise ValueError(
            "objective: expected a linear layer or convolution whose weight is among the selected parameters, got "
            "none; select weights with params="
        )
    return found


def layers_if_any(objective: Objective) -> list[Layer]:
    """What `find_layers` gives, or an empty list."""
    selected = {id(p): name for name, p in objective.parameters.items()}
    found: dict[str, Layer] = {}
    for path, module in objective.model.named_modules():
        layer = _layer(objective, path, module, selected)
        if layer is not None:
            found.setdefault(layer.weight, layer)
    return list(found.values())


def find_layer(objective: Objective, path: str) -> Layer:
    """The layer at a module path. Raises ValueError where that is no layer with a selected weight."""
    if not isinstance(path, str):
        raise TypeError(f"layer: expected a module path, got {type(path).__name__}; give e.g. 'fc'")
    modules = dict(objective.model.named_modules())
    if path not in modules:
        layers = [layer.path for layer in find_layers(objective)]
        raise ValueError(
            f"layer: expected a module path of the model, got {path!r}{did_you_mean(path, layers)}"
        )
    module = modules[path]
    layer = _layer(objective, path, module, {id(p): n for n, p in objective.parameters.items()})
    if layer is None:
        reason = type(module).__name__
        if layer_form(module) is not None:
            reason += " whose weight is not a selected parameter"
        raise ValueError(
            f"layer: expected a linear layer or convolution with a selected weight, got {path!r}, a {reason}"
        )
    return layer


def _layer(objective: Objective, path: str, module: nn.Module, selected: dict[int, str]) -> Layer | None:
    form = layer_form(module)
    weight = module._parameters.get("weight") if form is not None else None
    if form is None or weight is None or id(weight) not in selected:
        return None
    bias = module._parameters.get("bias")
    name = selected[id(weight)]
    uses = sum(p is weight for _, p in objective.model.named_parameters(remove_duplicate=False))
    return Layer(path, module, name, selected.get(id(bias)), *form, uses)


def layer_form(module: nn.Module) -> tuple[bool, int] | None:
    """(outputs first, groups) of a module that is a layer."""
    if isinstance(module, nn.Linear):
        return True, 1
    if isinstance(module, _CONVOLUTIONS):
        return True, module.groups
    if isinstance(module, _TRANSPOSED):
        return False, module.groups
    weight = module._parameters.get("weight")
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, torch.Tensor):
        return (False, 1) if weight.dim() == 2 else None
    return None

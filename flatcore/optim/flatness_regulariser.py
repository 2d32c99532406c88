"""Relative flatness as a term of the training loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcore.capture.batch import split_batch
from flatcore.evaluate import LossCall, recorded_loss
from flatcore.linear import check_count
from flatcore.measures.features import Call, feature_rows, layer_calls
from flatcore.measures.last_layer import gives, row_masses
from flatcore.measures.layers import Layer, layer_form
from flatcore.parameters import did_you_mean

__all__ = ["LossAndFlatness", "relative_flatness_penalty"]

_METHODS = ("auto", "closed", "exact", "probes")


class LossAndFlatness(NamedTuple):
    """``loss`` of the batch, and its relative ``flatness``, with their graphs. ``method``: how the latter was got."""

    loss: Tensor
    flatness: Tensor
    method: str


def relative_flatness_penalty(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batch: Any,
    layer: str,
    *,
    method: str = "auto",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> LossAndFlatness:
    """The loss of a batch and kappa = sum_ss' <w_s, w_s'> Tr H_ss' of one layer, to train on loss + strength * kappa.

        out = fc.optim.relative_flatness_penalty(model, loss, batch, "fc")
        (out.loss + 0.1 * out.flatness).backward()

    Adilova, Abourayya, Li, Dada, Petzka, Egger, Kleesiek and Kamp, "FAM: Relative Flatness Aware Minimization", TAG-ML
    at ICML 2023 (arXiv 2307.02337); the measure is `flatcore.measures.relative_flatness`, form "2021", with features as
    they are. The gradient is the true one: 2 sum_s' w_s' Tr H_ss' in the rows of the layer and, in all parameters, the
    third derivatives sum_ss' <w_s, w_s'> sum_t d³L / (dtheta dw_st dw_s't), which the authors' code leaves out.

    Args:
        loss: loss(output, target), the mean over the batch; batch: (inputs..., target), or a mapping with a target.
        layer: path of a linear layer or convolution; the paper takes the last but one representation's.
        method: "closed": of the last linear layer under a cross-entropy, E[|phi|² Var_{s ~ p} w_s]. "exact": a
            product for each weight. "probes": the mean of <W A, H[W A]> over ``probes`` random signs A, unbiased, as is
            its gradient. "auto": closed where that applies, else probes.

    Runs the model once, as it stands (in train mode batch statistics take part, and running ones are updated once).
    Cost beside the loss: closed, next to nothing; else a product for each probe, and the backward of all that: a
    backward three times differentiated, so the model must not use attention without second derivatives
    (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`). Random signs come from ``generator``, else from torch's own.
    Raises TypeError or ValueError, one sentence, for bad arguments and where method="closed" does not apply.
    """
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    count = check_count("probes", probes, 1)
    found = _layer(model, layer)
    args, kwargs, target = split_batch(batch)
    with layer_calls([found]) as seen:
        output = model(*args, **kwargs)
    calls = seen[layer]
    value, call = recorded_loss(lambda: loss(output, target))
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        raise ValueError("loss: expected one number that depends on the parameters, got something else")
    weight = found.module._parameters["weight"]
    assert weight is not None
    if not weight.requires_grad:
        raise ValueError(
            f"layer: expected a layer whose weight is trained, got {layer!r} frozen; set requires_grad, or leave the "
            "penalty out"
        )
    closed = _is_last_layer(found, calls, call, weight)
    if method == "closed" and not closed:
        raise ValueError(
            f"method: the closed form is that of a last linear layer under torch's cross_entropy, got {layer!r}, whose "
            "outputs are not the loss's logits, or whose weight has other uses; pass method='auto'"
        )
    if closed and call is not None and method in ("auto", "closed"):
        return LossAndFlatness(value, _closed(found, calls[0].given, call, weight), "closed")
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"layer: expected a layer that the loss depends on, got {layer!r}, which it does not"
        )
    if method == "exact":
        return LossAndFlatness(value, _exact(found, gradient, weight), "exact")
    return LossAndFlatness(value, _probed(found, gradient, weight, count, generator), "probes")


def _layer(model: nn.Module, path: str) -> Layer:
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else None
    if modules is None:
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if path not in modules:
        layers = [name for name, module in modules.items() if layer_form(module) is not None]
        raise ValueError(
            f"layer: expected a module path of the model, got {path!r}{did_you_mean(str(path), layers)}"
        )
    module = modules[path]
    form, weight = layer_form(module), module._parameters.get("weight")
    if form is None or weight is None:
        raise ValueError(
            f"layer: expected a linear layer or convolution with a weight, got {path!r}, a {type(module).__name__}"
        )
    uses = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False))
    return Layer(path, module, f"{path}.weight", None, *form, uses)


def _is_last_layer(layer: Layer, calls: list[Call], call: LossCall | None, weight: Tensor) -> bool:
    if (
        len(calls) != 1
        or call is None
        or call.function is not F.cross_entropy
        or layer.uses > 1
        or weight.dim() != 2
    ):
        return False
    features, logits = calls[0].given, calls[0].output
    if call.arguments["input"] is not logits or logits.dim() != 2 or call.reduction not in ("mean", "sum"):
        return False
    W = layer.matrices(weight.detach())[0, :, :, 0]
    if calls[0].changed or not gives(layer, W, feature_rows(layer, features.detach()), logits.detach()):
        return False
    return not _depends(features, weight)


def _depends(value: Tensor, leaf: Tensor) -> bool:
    """Does the graph of a value hold the leaf?"""
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is leaf:
            return True
        pending += [following for following, _ in node.next_functions]
    return False


def _closed(layer: Layer, given: Tensor, call: LossCall, weight: Tensor) -> Tensor:
    """sum_n mass_n |phi_n|² Var_{s ~ p_n} w_s, the variance from the differences to the likeliest class's weights."""
    W = layer.matrices(weight)[0, :, :, 0]
    rows = feature_rows(layer, given)
    p = call.arguments["input"].softmax(1)
    top = p.detach().argmax(1, keepdim=True)
    q = p.scatter(1, top, 0.0)
    rest, W_top, squares = q.sum(1, keepdim=True), W[top[:, 0]], W.square().sum(1)
    to_top = squares - 2 * (W_top @ W.T) + squares[top]  # |w_s - w_top|²
    variance = (q * to_top).sum(1) - (q @ W - rest * W_top).square().sum(1)
    kappa: Tensor = (row_masses(call).to(rows.dtype) * rows.square().sum(1) * variance).sum()
    return kappa


def _exact(layer: Layer, gradient: Tensor, weight: Tensor) -> Tensor:
    """sum_ss' <w_s, w_s'> sum_t (H e_st)_s't, a product for each unit vector e_st."""
    W = layer.matrices(weight).flatten(2)
    gram, total = W @ W.mT, weight.new_zeros(())
    units = torch.eye(weight.numel(), dtype=weight.dtype, device=weight.device).view(-1, *weight.shape)
    for unit in units:
        (column,) = torch.autograd.grad(gradient, weight, unit, create_graph=True, materialize_grads=True)
        H, e = layer.matrices(column).flatten(2), layer.matrices(unit).flatten(2)
        total = total + (gram * (e @ H.mT)).sum()
    return total


def _probed(
    layer: Layer, gradient: Tensor, weight: Tensor, probes: int, generator: torch.Generator | None
) -> Tensor:
    """Mean of <v, H v> over v = W A. The graph holds v both times, so its change with W counts in the gradient."""
    W = layer.matrices(weight).flatten(2)
    total = weight.new_zeros(())
    for _ in range(probes):
        shape = (W.shape[0], W.shape[2], W.shape[2])
        signs = torch.randint(2, shape, generator=generator, device=generator.device if generator else None)
        v = layer.from_matrices(W @ (signs.to(W) * 2 - 1), weight)
        (Hv,) = torch.autograd.grad(gradient, weight, v, create_graph=True, materialize_grads=True)
        total = total + (v * Hv).sum() / probes
    return total

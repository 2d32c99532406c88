"""Normalisation: batch, layer, RMS, group, instance; weight normalisation."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import torch
from torch import fx

from ..lower import Lowering, lowers


@lowers("batch_norm.default", "_native_batch_norm_legit_no_training.default")
def _batch_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int | tuple[int, None, None]:
    """By the running statistics; in train mode it reaches the lowerings as one of the next."""
    mean, var = lower.constant(lower.take(a.running_mean)), lower.constant(lower.take(a.running_var))
    weight, bias = lower.optional(a.weight), lower.optional(a.bias)
    y = lower.emit("batch_norm", lower.operand(a.input), weight, bias, mean, var, eps=float(a.eps))
    return (y, None, None) if "native" in str(node.target) else y


@lowers("_native_batch_norm_legit_functional.default", "_native_batch_norm_legit.no_stats")
def _batch_statistics(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int | None, ...]:
    """By the batch's own mean and variance; the running statistics it updates have no meaning here."""
    x = lower.operand(a.input)
    swapped = [1, 0, *range(2, lower.rank(x))]  # each channel a row of its own
    y = lower.permute(_normalised(lower, lower.permute(x, swapped), 1, a.eps), swapped)
    y = _per_channel(lower, y, lower.optional(a.weight), lower.optional(a.bias))
    return (y, None, None, None, None) if "functional" in str(node.target) else (y, None, None)


@lowers("layer_norm.default", "native_layer_norm.default")
def _layer_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int | tuple[int, None, None]:
    x, weight, bias = lower.operand(a.input), lower.optional(a.weight), lower.optional(a.bias)
    axes = len(a.normalized_shape)
    y = lower.emit("normalise", x, weight, bias, eps=float(a.eps), centred=True, axes=axes)
    return (y, None, None) if "native" in str(node.target) else y


@lowers("rms_norm.default", "_fused_rms_norm.default")
def _rms_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int | tuple[int, None]:
    x, weight = lower.operand(a.input), lower.optional(a.weight)
    eps = torch.finfo(a.input.meta["val"].dtype).eps if a.eps is None else float(a.eps)
    y = lower.emit("normalise", x, weight, None, eps=eps, centred=False, axes=len(a.normalized_shape))
    return (y, None) if "fused" in str(node.target) else y


@lowers("group_norm.default", "native_group_norm.default")
def _group_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int | tuple[int, None, None]:
    groups = a.group if "native" in str(node.target) else a.num_groups
    y = _grouped(
        lower, lower.operand(a.input), groups, lower.optional(a.weight), lower.optional(a.bias), a.eps
    )
    return (y, None, None) if "native" in str(node.target) else y


@lowers("instance_norm.default")
def _instance_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, weight, bias = lower.operand(a.input), lower.optional(a.weight), lower.optional(a.bias)
    if a.use_input_stats:
        return _grouped(lower, x, lower.shape(x)[1], weight, bias, a.eps)
    mean, var = lower.constant(lower.take(a.running_mean)), lower.constant(lower.take(a.running_var))
    return lower.emit("batch_norm", x, weight, bias, mean, var, eps=float(a.eps))


@lowers("_weight_norm.default", "_weight_norm_interface.default")
def _weight_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int | tuple[int, None]:
    v, g = lower.operand(a.v), lower.operand(a.g)
    axes = [axis for axis in range(lower.rank(v)) if axis != a.dim % lower.rank(v) or a.dim == -1]
    inverse = lower.unary("rsqrt", lower.sum(lower.unary("square", v), axes, keepdim=lower.rank(g) > 0))
    weight = lower.emit("mul", v, lower.emit("mul", g, inverse))
    return weight if "interface" not in str(node.target) else (weight, None)


def _grouped(lower: Lowering, x: int, groups: int, weight: int | None, bias: int | None, eps: float) -> int:
    return _per_channel(lower, _normalised(lower, x, groups, eps), weight, bias)


def _normalised(lower: Lowering, x: int, groups: int, eps: float) -> int:
    """Each of the `groups` groups along axis 1 of each example normalised."""
    shape = lower.shape(x)
    flat = lower.view(x, (shape[0], groups, prod(shape[1:]) // groups))
    return lower.view(lower.emit("normalise", flat, None, None, eps=float(eps), centred=True, axes=1), shape)


def _per_channel(lower: Lowering, y: int, weight: int | None, bias: int | None) -> int:
    """Scaled by weight and shifted by bias, both along axis 1."""
    shape = lower.shape(y)
    per_channel = (shape[1], *(1 for _ in shape[2:]))
    if weight is not None:
        y = lower.emit("mul", y, lower.view(weight, per_channel))
    return y if bias is None else lower.emit("add", y, lower.view(bias, per_channel), alpha=1.0)

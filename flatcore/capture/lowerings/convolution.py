"""Convolutions in one and two dimensions."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import torch
from torch import fx

from ..lower import Lowering, lowers, pair


@lowers("conv2d.default", "conv2d.padding", "conv1d.default", "conv1d.padding")
def _convolution(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    weight, bias = lower.operand(a.weight), lower.optional(a.bias)
    flat = lower.rank(weight) == 3
    if flat:  # one dimension: height 1
        out, per_group, length = lower.shape(weight)
        weight = lower.view(weight, (out, per_group, 1, length))
    stride, dilation = (1, a.stride[0]) if flat else a.stride, (1, a.dilation[0]) if flat else a.dilation
    kernel = lower.shape(weight)[2:]
    before, after = _padding(lower, a.padding, kernel, pair(dilation), flat)
    x = _input(lower, a.input, before, after, flat)
    batched = lower.rank(x) == 4
    if not batched:
        x = lower.view(x, (1, *lower.shape(x)))
    y = lower.emit(
        "conv2d",
        x,
        weight,
        bias,
        stride=pair(stride),
        padding=before if before == after else (0, 0),
        dilation=pair(dilation),
        groups=int(a.groups),
    )
    return lower.view(y, node.meta["val"].shape)


def _padding(
    lower: Lowering, padding: object, kernel: tuple[int, ...], dilation: tuple[int, int], flat: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros in front of and behind each of the two axes."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = (total[0] // 2, total[1] // 2)
        return before, (total[0] - before[0], total[1] - before[1])
    both = (0, pair(padding)[0]) if flat else pair(padding)
    return both, both


def _input(
    lower: Lowering, node: fx.Node, before: tuple[int, int], after: tuple[int, int], flat: bool
) -> int:
    """The input, with the axis of height 1; padded where the padding is lopsided."""
    x = lower.operand(node)
    if flat:
        *front, length = lower.shape(x)
        x = lower.view(x, (*front, 1, length))
    if before == after:
        return x
    return lower.emit("pad", x, pads=(before[1], after[1], before[0], after[0]), value=0.0)


@lowers("conv_transpose2d.input", "conv_transpose1d.default")
def _transposed_convolution(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    """As a convolution: zeros between the elements of x, and the kernel turned round."""
    x, weight, bias = lower.operand(a.input), lower.operand(a.weight), lower.optional(a.bias)
    flat = lower.rank(weight) == 3
    if flat:
        x, weight = (lower.view(t, (*lower.shape(t)[:-1], 1, lower.shape(t)[-1])) for t in (x, weight))
    stride, dilation, padding, extra = (
        (neutral, int(given[0])) if flat else pair(given)
        for given, neutral in ((a.stride, 1), (a.dilation, 1), (a.padding, 0), (a.output_padding, 0))
    )
    *front, height, width = lower.shape(x)
    kernel = lower.shape(weight)[2:]
    channels = front[-1]
    if stride != (1, 1):
        apart = lower.view(x, (prod(front), height, 1, width, 1))
        apart = lower.emit("pad", apart, pads=(0, stride[1] - 1, 0, 0, 0, stride[0] - 1), value=0.0)
        x = lower.view(apart, (*front, height * stride[0], width * stride[1]))
    x = lower.view(x, (prod(front) // channels, channels, *lower.shape(x)[-2:]))
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    behind = [r + e - (s - 1) for r, e, s in zip(reach, extra, stride, strict=True)]
    x = lower.emit("pad", x, pads=(reach[1], behind[1], reach[0], behind[0]), value=0.0)
    y = lower.emit(
        "conv2d",
        x,
        _turned_round(lower, weight, int(a.groups)),
        bias,
        stride=(1, 1),
        padding=(0, 0),
        dilation=dilation,
        groups=int(a.groups),
    )
    return lower.view(y, node.meta["val"].shape)


def _turned_round(lower: Lowering, weight: int, groups: int) -> int:
    """(in, out / groups, *kernel) as (out, in / groups, *kernel), the kernel reversed along its axes."""
    channels, per_group, *kernel = lower.shape(weight)
    taps = prod(kernel)
    if taps > 1:
        flat = lower.view(weight, (channels, per_group, taps))
        weight = lower.rows(flat, 2, lower.index(torch.arange, taps - 1, -1, -1))
    grouped = lower.view(weight, (groups, channels // groups, per_group, taps))
    return lower.view(lower.permute(grouped, (0, 2, 1, 3)), (groups * per_group, channels // groups, *kernel))

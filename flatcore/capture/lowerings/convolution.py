"""Convolutions in one and two dimensions."""

from __future__ import annotations

from types import SimpleNamespace

import torch.nn.functional as F
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
    """The input, with the axis of height 1; padded in the prelude where the padding is lopsided."""
    if before == after:
        x = lower.operand(node)
    elif lower.is_active(node):
        raise lower.error(
            "padding='same' with an even kernel extent pads unevenly; use an odd extent or explicit padding"
        )
    else:
        width = (before[1], after[1]) if flat else (before[1], after[1], before[0], after[0])
        x = lower.constant(lower.prelude.call(F.pad, lower.take(node), width))
    if flat:
        *front, length = lower.shape(x)
        x = lower.view(x, (*front, 1, length))
    return x

"""Elements picked by an index or a mask that does not depend on the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from ..lower import Lowering, lowers


@lowers("embedding.default")
def _embedding(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    if a.scale_grad_by_freq:
        raise lower.error("scales gradients by frequency, which no loss has as its derivative")
    index = lower.constant(lower.take(a.indices), torch.int64)
    return lower.emit("rows", lower.operand(a.weight), index, frozen=max(int(a.padding_idx), -1))


@lowers("index_select.default")
def _index_select(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, index = lower.operand(a.self), lower.take(a.index)
    size = lower.shape(x)[a.dim]
    picked = lower.rows(x, a.dim, lower.constant(lower.prelude.call(_wrapped, index, size), torch.int64))
    return lower.view(picked, node.meta["val"].shape)


@lowers("index.Tensor")
def _index(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    given = [(axis, i) for axis, i in enumerate(a.indices) if i is not None]
    if any(lower.take(i).meta["val"].dtype in (torch.bool, torch.uint8) for _, i in given):
        raise lower.error("picks elements by a mask, so its shape depends on the batch")
    x = lower.operand(a.self)
    if len(given) > 1:
        return _moved(lower, node, a)
    ((axis, i),) = given
    index = lower.prelude.call(_wrapped, lower.take(i), lower.shape(x)[axis])
    return int(lower.rows(x, axis, lower.constant(index, torch.int64)))


@lowers(
    "gather.default",
    "take.default",
    "take_along_dim.default",
    "flip.default",
    "rot90.default",
    "diagonal.default",
    "unfold.default",
    "as_strided.default",
    "pixel_shuffle.default",
    "pixel_unshuffle.default",
    "channel_shuffle.default",
    "repeat_interleave.self_Tensor",
    "reflection_pad1d.default",
    "reflection_pad2d.default",
    "replication_pad1d.default",
    "replication_pad2d.default",
)
def _moved(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    """Any op that only moves elements: what it does to the numbers of the elements is the index."""
    x = lower.operand(node.args[0])
    shape = lower.shape(x)
    args, kwargs = fx.map_arg((tuple(node.args[1:]), dict(node.kwargs)), lower.take)
    index = lower.prelude.call(_numbers_moved, node.target, shape, lower.device, *args, **kwargs)
    return lower.emit("rows", lower.view(x, (prod(shape),)), lower.constant(index, torch.int64), frozen=-1)


@lowers("where.self")
def _where(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _chosen(lower, a.condition, lower.operand(a.self), lower.operand(a.other))


@lowers("where.ScalarOther")
def _where_scalar_other(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _chosen(lower, a.condition, lower.operand(a.self), lower.number(a.other))


@lowers("where.ScalarSelf")
def _where_scalar_self(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _chosen(lower, a.condition, lower.number(a.self), lower.operand(a.other))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    value = lower.operand(a.value) if isinstance(a.value, fx.Node) else lower.number(a.value)
    return _chosen(lower, a.mask, value, lower.operand(a.self))


@lowers("tril.default", "triu.default")
def _triangle(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    side = torch.tril if "tril" in str(node.target) else torch.triu
    shape = lower.shape(x)[-2:]
    mask = lower.prelude.call(_triangle_mask, side, shape, int(a.diagonal), lower.device)
    return lower.emit("where", lower.constant(mask, torch.bool), x, lower.number(0.0))


def _chosen(lower: Lowering, mask: fx.Node, a: int, b: int) -> int:
    return lower.emit("where", lower.constant(lower.take(mask), torch.bool), a, b)


def _wrapped(index: Tensor, size: int) -> Tensor:
    """Indices from the end counted from the start."""
    return torch.where(index < 0, index + size, index)


def _numbers_moved(
    op: Callable[..., Tensor], shape: Sequence[int], device: torch.device, *args: Any, **kwargs: Any
) -> Tensor:
    # In float64, which every op takes and which holds all integers below 2^53.
    numbers = torch.arange(prod(shape), dtype=torch.float64, device=device).view(shape)
    return op(numbers, *args, **kwargs).long()


def _triangle_mask(
    side: Callable[..., Tensor], shape: Sequence[int], diagonal: int, device: torch.device
) -> Tensor:
    return side(torch.ones(shape, dtype=torch.bool, device=device), diagonal)

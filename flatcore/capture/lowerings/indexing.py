"""Elements picked by an index or a mask that does not depend on the parameters."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor, fx

from ..lower import Lowering, NoRuleError, lowers


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
        raise NoRuleError
    x = lower.operand(a.self)
    if len(given) > 1:
        return _by_numbers(lower, node)
    ((axis, i),) = given
    index = lower.prelude.call(_wrapped, lower.take(i), lower.shape(x)[axis])
    return lower.rows(x, axis, lower.constant(index, torch.int64))


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
    return _by_numbers(lower, node)


def _by_numbers(lower: Lowering, node: fx.Node) -> int:
    """Any op that only moves elements: what it does to the numbers of the elements is the index."""
    x = lower.operand(node.args[0])
    count = prod(lower.shape(x))
    args, kwargs = fx.map_arg((tuple(node.args[1:]), dict(node.kwargs)), lower.take)
    # In float64, which every op takes and which holds all integers below 2^53.
    numbers = lower.prelude.call(torch.arange, count, dtype=torch.float64, device=lower.device)
    numbers = lower.prelude.call(torch.reshape, numbers, lower.shape(x))
    index = lower.prelude.call(node.target, numbers, *args, **kwargs)  # type: ignore[arg-type]
    return lower.emit("rows", lower.view(x, (count,)), lower.constant(index, torch.int64), frozen=-1)


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
    ones = lower.prelude.call(torch.ones, lower.shape(x)[-2:], dtype=torch.bool, device=lower.device)
    mask = lower.prelude.call(node.target, ones, a.diagonal)  # type: ignore[arg-type]
    return lower.emit("where", lower.constant(mask, torch.bool), x, lower.number(0.0))


def _chosen(lower: Lowering, mask: fx.Node, a: int, b: int) -> int:
    active = lower.is_active(mask)
    choice = lower.operand(mask) if active else lower.constant(lower.take(mask), torch.bool)
    return lower.emit("where", choice, a, b)


def _wrapped(index: Tensor, size: int) -> Tensor:
    """Indices from the end counted from the start."""
    return torch.where(index < 0, index + size, index)

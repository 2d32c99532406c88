"""Parts of a tensor and tensors put together: slices, splits, concatenation, padding, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from ..lower import Lowering, NoRuleError, lowers


@lowers("slice.Tensor")
def _slice(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    start, length = _range(lower.shape(x)[a.dim], a)
    return lower.slice(x, a.dim, start, length, a.step)


@lowers("narrow.default")
def _narrow(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    return lower.slice(x, a.dim, a.start % max(lower.shape(x)[a.dim], 1), a.length)


@lowers("select.int")
def _select(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    picked = lower.slice(x, a.dim, a.index % lower.shape(x)[a.dim], 1)
    return lower.view(picked, node.meta["val"].shape)


@lowers(
    "split.Tensor",
    "split.sizes",
    "split_with_sizes.default",
    "chunk.default",
    "tensor_split.sections",
    "tensor_split.indices",
    "unsafe_chunk.default",
    "unsafe_split.Tensor",
)
def _split(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, ...]:
    x, parts, start = lower.operand(a.self), [], 0
    for value in node.meta["val"]:
        length = value.shape[a.dim]
        parts.append(lower.slice(x, a.dim, start, length))
        start += length
    return tuple(parts)


@lowers("unbind.int")
def _unbind(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, ...]:
    x = lower.operand(a.self)
    shape = node.meta["val"][0].shape
    return tuple(lower.view(lower.slice(x, a.dim, i, 1), shape) for i in range(lower.shape(x)[a.dim]))


@lowers("cat.default", "concat.default", "concatenate.default")
def _cat(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    parts = [lower.operand(x) for x in a.tensors]
    # torch lets an empty vector stand between tensors of any rank.
    return lower.cat((x for x in parts if lower.shape(x) != (0,)), a.dim)


@lowers("stack.default")
def _stack(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    shape = list(node.meta["val"].shape)
    shape[a.dim] = 1
    return lower.cat((lower.view(lower.operand(x), shape) for x in a.tensors), a.dim)


@lowers("slice_scatter.default")
def _slice_scatter(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    start, length = _range(lower.shape(x)[a.dim], a)
    if a.step != 1:
        raise NoRuleError
    return _overwritten(lower, x, lower.operand(a.src), a.dim, start, length)


@lowers("select_scatter.default")
def _select_scatter(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    shape = list(lower.shape(x))
    start = a.index % shape[a.dim]
    shape[a.dim] = 1
    return _overwritten(lower, x, lower.view(lower.operand(a.src), shape), a.dim, start, 1)


@lowers("constant_pad_nd.default")
def _constant_pad(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _padded(lower, lower.operand(a.self), a.pad, float(a.value))


@lowers("pad.default")
def _pad(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    if a.mode == "constant":
        return _padded(lower, x, a.pad, float(a.value or 0.0))
    for axis, (before, after) in enumerate(zip(a.pad[::2], a.pad[1::2], strict=True), start=1):
        if before or after:
            length = lower.shape(x)[-axis]
            x = lower.rows(x, -axis, lower.index(_border, length, before, after, a.mode))
    return x


@lowers("roll.default")
def _roll(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    shape = lower.shape(x)
    if not a.dims:
        x = lower.view(x, (prod(shape),))
    for shift, dim in zip(a.shifts, a.dims or [0], strict=True):
        length = lower.shape(x)[dim]
        back = -shift % length if length else 0
        if back:
            x = lower.cat((lower.slice(x, dim, back, length - back), lower.slice(x, dim, 0, back)), dim)
    return lower.view(x, shape)


@lowers("repeat.default", "tile.default")
def _repeat(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, repeats = lower.operand(a.self), list(getattr(a, "repeats", None) or a.dims)
    rank = max(len(repeats), lower.rank(x))
    sizes = [1] * (rank - lower.rank(x)) + list(lower.shape(x))
    repeats = [1] * (rank - len(repeats)) + repeats
    apart = lower.view(x, [n for size in sizes for n in (1, size)])
    pairs = zip(repeats, sizes, strict=True)
    return lower.view(lower.expand(apart, [n for pair in pairs for n in pair]), node.meta["val"].shape)


@lowers("repeat_interleave.self_int")
def _repeat_interleave(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    if a.dim is None:
        x = lower.view(x, (prod(lower.shape(x)),))
    shape = lower.shape(x)
    dim = (a.dim or 0) % len(shape)
    apart = lower.view(x, (*shape[: dim + 1], 1, *shape[dim + 1 :]))
    copies = lower.expand(apart, (*shape[: dim + 1], a.repeats, *shape[dim + 1 :]))
    return lower.view(copies, node.meta["val"].shape)


@lowers("glu.default")
def _glu(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    half = lower.shape(x)[a.dim] // 2
    gate = lower.unary("sigmoid", lower.slice(x, a.dim, half, half))
    return lower.emit("mul", lower.slice(x, a.dim, 0, half), gate)


def _range(size: int, a: SimpleNamespace) -> tuple[int, int]:
    """First element and number of elements of x[start:end:step] on an axis of `size`."""
    positions = range(size)[slice(a.start, a.end, a.step)]
    return (positions.start if len(positions) else 0), len(positions)


def _overwritten(lower: Lowering, x: int, part: int, dim: int, start: int, length: int) -> int:
    size = lower.shape(x)[dim]
    parts = [
        *([lower.slice(x, dim, 0, start)] if start else []),
        part,
        *([lower.slice(x, dim, start + length, size - start - length)] if start + length < size else []),
    ]
    return lower.cat(parts, dim)


def _padded(lower: Lowering, x: int, pads: Sequence[int], value: float) -> int:
    return lower.emit("pad", x, pads=tuple(int(pad) for pad in pads), value=value)


def _border(length: int, before: int, after: int, mode: str, device: Any) -> torch.Tensor:
    """Which elements a padding that continues the tensor reads."""
    places = torch.arange(-before, length + after, device=device)
    if mode == "replicate":
        return places.clamp(0, length - 1)
    if mode == "circular":
        return places % length
    assert mode == "reflect", mode
    return (length - 1) - ((length - 1) - places.abs()).abs()

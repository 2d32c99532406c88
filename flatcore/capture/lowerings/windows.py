"""Windows of images laid out as columns, and columns added up to images: one axis after the other."""

from __future__ import annotations

from functools import reduce
from types import SimpleNamespace

from torch import fx

from ..lower import Lowering, NoRuleError, lowers, pair


@lowers("im2col.default")
def _columns(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    kernel, dilation, padding, stride = map(pair, (a.kernel_size, a.dilation, a.padding, a.stride))
    if padding != (0, 0):
        pads = (padding[1], padding[1], padding[0], padding[0])
        x = lower.emit("pad", x, pads=pads, value=0.0)
    x = _windows(lower, x, lower.rank(x) - 2, kernel[0], dilation[0], stride[0])
    x = _windows(lower, x, lower.rank(x) - 1, kernel[1], dilation[1], stride[1])
    *front, rows, height, columns, width = range(lower.rank(x))
    return lower.view(lower.permute(x, [*front, rows, columns, height, width]), node.meta["val"].shape)


def _count(size: int, kernel: int, dilation: int, stride: int) -> int:
    """How many windows an axis has."""
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def _windows(lower: Lowering, x: int, dim: int, kernel: int, dilation: int, stride: int) -> int:
    """Axis `dim` as two: the places in a window, and the windows."""
    shape = lower.shape(x)
    count = _count(shape[dim], kernel, dilation, stride)
    if stride == kernel and dilation == 1:
        apart = lower.slice(x, dim, 0, count * kernel)
        return _swapped(lower, lower.view(apart, (*shape[:dim], count, kernel, *shape[dim + 1 :])), dim)
    one = (*shape[:dim], 1, count, *shape[dim + 1 :])
    places = (lower.slice(x, dim, i * dilation, count, stride) for i in range(kernel))
    return lower.cat((lower.view(place, one) for place in places), dim)


@lowers("col2im.default")
def _image(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    kernel, dilation, padding, stride = map(pair, (a.kernel_size, a.dilation, a.padding, a.stride))
    *front, channels, height, width = node.meta["val"].shape
    sizes = (height + 2 * padding[0], width + 2 * padding[1])
    counts = map(_count, sizes, kernel, dilation, stride)
    x = lower.view(x, (*front, channels, *kernel, *counts))
    rank = lower.rank(x)
    x = lower.permute(x, [*range(rank - 4), rank - 4, rank - 2, rank - 3, rank - 1])
    x = _added_up(lower, x, rank - 2, dilation[1], stride[1], padding[1], width)
    return _added_up(lower, x, rank - 4, dilation[0], stride[0], padding[0], height)


def _added_up(lower: Lowering, x: int, dim: int, dilation: int, stride: int, padding: int, size: int) -> int:
    """What `_windows` reads, in the end: axes `dim`, of the places in a window, and `dim + 1`, of the windows, as one
    of `size` elements, `padding` left out on either side."""
    *front, kernel, count = lower.shape(x)[: dim + 2]
    behind = lower.shape(x)[dim + 2 :]
    if stride == kernel and dilation == 1:
        side_by_side = lower.view(_swapped(lower, x, dim), (*front, kernel * count, *behind))
        places = [_placed(lower, side_by_side, dim, -padding, size)]
    else:
        if stride > 1:  # zeros between the windows
            x = lower.view(x, (*front, kernel, count, 1, *behind))
            x = lower.emit("pad", x, pads=(*(0, 0) * len(behind), 0, stride - 1), value=0.0)
        x = lower.view(x, (*front, kernel, count * stride, *behind))
        apart = (lower.slice(x, dim, i, 1) for i in range(kernel))
        rows = (lower.view(place, (*front, count * stride, *behind)) for place in apart)
        places = [_placed(lower, row, dim, i * dilation - padding, size) for i, row in enumerate(rows)]
    inside = [place for place in places if place is not None]
    if not inside:
        raise NoRuleError
    return reduce(lambda total, place: lower.emit("add", total, place, alpha=1.0), inside)


def _placed(lower: Lowering, x: int, dim: int, start: int, size: int) -> int | None:
    """x from `start` on along an axis of `size` elements that else are zero; None where all of it lies outside."""
    length = lower.shape(x)[dim]
    first, last = max(0, -start), min(length, size - start)
    if first >= last:
        return None
    x = lower.slice(x, dim, first, last - first)
    pads = (*(0, 0) * (lower.rank(x) - 1 - dim), start + first, size - start - last)
    return lower.emit("pad", x, pads=pads, value=0.0) if any(pads) else x


def _swapped(lower: Lowering, x: int, dim: int) -> int:
    """The same with axes `dim` and `dim + 1` in each other's place."""
    return lower.permute(x, [*range(dim), dim + 1, dim, *range(dim + 2, lower.rank(x))])

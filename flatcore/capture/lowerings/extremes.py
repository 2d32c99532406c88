"""The greatest and the least elements along axes.

Of several equal ones, torch differentiates the first where it is asked for an index too (`max(dim)`), and all of them
in equal parts otherwise (`amax`, `max()`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, prod
from types import SimpleNamespace

import torch
from torch import fx

from ..lower import Lowering, NoRuleError, lowers


@lowers("max.dim", "min.dim")
def _first(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, None]:
    sign = -1.0 if "min" in str(node.target) else 1.0
    x = lower.affine(lower.operand(a.self), sign)
    greatest = _pooled(lower, _rows(lower, x, [a.dim]))
    return lower.view(lower.affine(greatest, sign), node.meta["val"][0].shape), None


@lowers("amax.default", "amin.default", "max.default", "min.default")
def _all_in_equal_parts(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    """The first one, and the mean of what the others are apart from it: nothing, but its derivative."""
    sign = -1.0 if "min" in str(node.target) else 1.0
    x = lower.affine(lower.operand(a.self), sign)
    rows = _rows(lower, x, getattr(a, "dim", None) or range(lower.rank(x)))
    greatest = _pooled(lower, rows)
    if lower.shape(rows)[1] > 1:
        # Of a row of -inf alone nothing is subtracted, for the difference would be NaN.
        finite = lower.unary("step", lower.affine(greatest, shift=torch.finfo(lower.dtype).max))
        base = lower.emit("where", finite, greatest, lower.number(0.0))
        below = lower.emit("add", base, rows, alpha=-1.0)
        less = lower.unary("step", below)
        equal = lower.affine(lower.sum(less, [1], True), -1.0, lower.shape(rows)[1])
        share = lower.unary("reciprocal", lower.unary("clamp", equal, 1.0, inf))
        apart = lower.sum(lower.emit("where", less, lower.number(0.0), below), [1], True)
        greatest = lower.emit("add", greatest, lower.emit("mul", apart, share), alpha=-1.0)
    return lower.view(lower.affine(greatest, sign), node.meta["val"].shape)


def _rows(lower: Lowering, x: int, dims: Iterable[int]) -> int:
    """x as (before, elements to compare, behind)."""
    shape = lower.shape(x)
    axes = sorted(dim % lower.rank(x) for dim in dims) if shape else []  # a number has none, whatever is said
    if 0 in shape:
        raise NoRuleError
    if axes and axes != list(range(axes[0], axes[-1] + 1)):
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        x = lower.permute(x, [*kept, *axes])
        axes = list(range(len(kept), len(shape)))
        shape = lower.shape(x)
    first, last = (axes[0], axes[-1] + 1) if axes else (0, 0)
    return lower.view(x, (prod(shape[:first]), prod(shape[first:last]), prod(shape[last:])))


def _pooled(lower: Lowering, rows: int) -> int:
    """The greatest along axis 1 of three, kept; the first of several. A window over an image of one column, whose
    channels are the last axis and lie in memory as the engine wants them."""
    before, size, behind = lower.shape(rows)
    if size == 1:
        return rows
    image = lower.view(lower.permute(rows, (0, 2, 1)), (before, behind, size, 1))
    window = {"kernel": (size, 1), "stride": (size, 1), "padding": (0, 0), "dilation": (1, 1)}
    greatest = lower.emit("max_pool2d", image, **window, ceil_mode=False)
    return lower.view(greatest, (before, 1, behind))

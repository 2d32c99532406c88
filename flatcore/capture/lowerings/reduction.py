"""Sums, means and norms over axes."""

from __future__ import annotations

from math import isqrt, prod
from types import SimpleNamespace

import torch
from torch import Tensor, fx

from ..lower import Lowering, NoRuleError, lowers


def _axes(lower: Lowering, x: int, a: SimpleNamespace) -> list[int]:
    dims = getattr(a, "dim", None)
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    return listed or list(range(lower.rank(x)))  # torch: no axis named means all of them


@lowers("sum.default", "sum.dim_IntList")
def _sum(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    return lower.sum(x, _axes(lower, x, a), getattr(a, "keepdim", False))


@lowers("mean.default", "mean.dim")
def _mean(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    axes = _axes(lower, x, a)
    count = prod(lower.shape(x)[axis] for axis in axes) if lower.rank(x) else 1
    if count == 0:
        raise lower.error("the mean of no elements")
    return lower.sum(x, axes, getattr(a, "keepdim", False), 1.0 / count)


@lowers("linalg_vector_norm.default", "norm.Scalar", "norm.ScalarOpt_dim")
def _norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, given = lower.operand(a.self), getattr(a, "ord", getattr(a, "p", None))
    order = 2 if given is None else given
    if order == 1:
        return lower.sum(lower.unary("abs", x), _axes(lower, x, a), getattr(a, "keepdim", False))
    if order != 2:
        raise NoRuleError
    return lower.unary(
        "sqrt", lower.sum(lower.unary("square", x), _axes(lower, x, a), getattr(a, "keepdim", False))
    )


@lowers("var.correction", "std.correction", "var_mean.correction", "std_mean.correction")
def _variance(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int | tuple[int, int]:
    x = lower.operand(a.self)
    axes = _axes(lower, x, a)
    count = prod(lower.shape(x)[axis] for axis in axes)
    degrees = count - (1 if a.correction is None else a.correction)
    if degrees <= 0:
        raise lower.error(f"the variance of {count} elements")
    mean = lower.sum(x, axes, True, 1.0 / count)
    deviation = lower.emit("add", x, mean, alpha=-1.0)
    spread = lower.sum(lower.unary("square", deviation), axes, a.keepdim, 1.0 / degrees)
    if "std" in str(node.target):
        spread = lower.unary("sqrt", spread)
    if "mean" not in str(node.target):
        return spread
    return spread, lower.view(mean, lower.shape(spread))


@lowers("cumsum.default")
def _cumulative_sum(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    if lower.rank(x) == 0:
        return x
    return lower.from_last(_sums_up_to(lower, lower.to_last(x, a.dim)), a.dim)


# Elements that one triangle of ones sums; more go in pieces, so that n elements take n^1.5 additions, not n².
_ONE_TRIANGLE = 256


def _sums_up_to(lower: Lowering, x: int) -> int:
    """Cumulative sums along the last axis: those within each piece, and the sums of the pieces before it."""
    *front, size = lower.shape(x)
    if size <= _ONE_TRIANGLE:
        return _times_triangle(lower, x, size)
    piece = isqrt(size - 1) + 1
    pieces = -(-size // piece)
    if pieces * piece > size:
        x = lower.emit("pad", x, pads=(0, pieces * piece - size), value=0.0)
    within = _times_triangle(lower, lower.view(x, (*front, pieces, piece)), piece)
    totals = lower.slice(within, -1, piece - 1, 1)
    before = lower.view(
        _times_triangle(lower, lower.view(totals, (*front, pieces)), pieces, -1), (*front, pieces, 1)
    )
    sums = lower.view(lower.emit("add", within, before, alpha=1.0), (*front, pieces * piece))
    return lower.slice(sums, -1, 0, size)


def _times_triangle(lower: Lowering, x: int, size: int, diagonal: int = 0) -> int:
    ones = lower.prelude.call(_lower_triangle, size, diagonal, lower.dtype, lower.device)
    return lower.emit("linear", x, lower.constant(ones), None, transposed=False)


def _lower_triangle(size: int, diagonal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=dtype, device=device).tril(diagonal)

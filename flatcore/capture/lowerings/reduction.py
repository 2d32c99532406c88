"""Sums, means and norms over axes."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

from torch import fx

from ..lower import Lowering, lowers


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


@lowers("linalg_vector_norm.default")
def _norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    if a.ord != 2:
        raise lower.error(f"only the Euclidean norm has a rule, got order {a.ord}")
    x = lower.operand(a.self)
    return lower.unary("sqrt", lower.sum(lower.unary("square", x), _axes(lower, x, a), a.keepdim))

"""Comparisons of values that depend on the parameters, and what is chosen by them.

Such a mask is a value of zeros and ones, `step` of a difference, with derivative zero.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import fx

from ..lower import Lowering, Mask, NoRuleError, lowers


@lowers("gt.Scalar", "gt.Tensor")
def _gt(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Mask:
    return Mask(_positive(lower, a.self, a.other, 1.0))


@lowers("lt.Scalar", "lt.Tensor")
def _lt(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Mask:
    return Mask(_positive(lower, a.self, a.other, -1.0))


@lowers("ge.Scalar", "ge.Tensor")
def _ge(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Mask:
    return Mask(_inverted(lower, _positive(lower, a.self, a.other, -1.0)))


@lowers("le.Scalar", "le.Tensor")
def _le(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Mask:
    return Mask(_inverted(lower, _positive(lower, a.self, a.other, 1.0)))


@lowers("logical_not.default", "bitwise_not.default")
def _not(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Mask:
    return Mask(_inverted(lower, _mask(lower, a.self)))


@lowers("logical_and.default", "bitwise_and.Tensor")
def _and(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Mask:
    return Mask(lower.emit("mul", _mask(lower, a.self), _mask(lower, a.other)))


@lowers("sign.default", "sgn.default")
def _sign(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    negative = lower.unary("step", lower.affine(x, -1.0))
    return lower.emit("add", lower.unary("step", x), negative, alpha=-1.0)


@lowers("maximum.default", "clamp_min.Tensor")
def _maximum(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, y = lower.operand(a.self), lower.operand(a.other if hasattr(a, "other") else a.min)
    return lower.emit("where", _step_of_difference(lower, x, y), x, y)


@lowers("minimum.default", "clamp_max.Tensor")
def _minimum(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, y = lower.operand(a.self), lower.operand(a.other if hasattr(a, "other") else a.max)
    return lower.emit("where", _step_of_difference(lower, y, x), x, y)


@lowers("threshold.default")
def _threshold(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    above = lower.unary("step", lower.affine(x, shift=-float(a.threshold)))
    return lower.emit("where", above, x, lower.number(a.value))


def _positive(lower: Lowering, x: Any, y: Any, sign: float) -> int:
    """One where sign * (x - y) is positive, else zero."""
    a = lower.operand(x)
    if not isinstance(y, fx.Node):
        return lower.unary("step", lower.affine(a, sign, -sign * float(y)))
    b = lower.operand(y)
    return _step_of_difference(lower, a, b) if sign > 0 else _step_of_difference(lower, b, a)


def _step_of_difference(lower: Lowering, x: int, y: int) -> int:
    return lower.unary("step", lower.emit("add", x, y, alpha=-1.0))


def _inverted(lower: Lowering, mask: int) -> int:
    return lower.affine(mask, -1.0, 1.0)


def _mask(lower: Lowering, node: fx.Node) -> int:
    if lower.is_active(node) and not isinstance(lower.result(node), Mask):
        raise NoRuleError
    return lower.operand(node)

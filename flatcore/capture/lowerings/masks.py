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


@lowers("maximum.default")
def _maximum(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, y = lower.operand(a.self), lower.operand(a.other)
    return _chosen(lower, _step_of_difference(lower, x, y), _step_of_difference(lower, y, x), x, y)


@lowers("minimum.default")
def _minimum(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, y = lower.operand(a.self), lower.operand(a.other)
    return _chosen(lower, _step_of_difference(lower, y, x), _step_of_difference(lower, x, y), x, y)


def _chosen(lower: Lowering, first: int, second: int, x: int, y: int) -> int:
    """x or y; where they are equal both in equal parts, halved before they are added lest the sum overflows."""
    both = lower.emit("add", lower.affine(x, 0.5), y, alpha=0.5)
    return lower.emit("where", first, x, lower.emit("where", second, y, both))


@lowers("clamp_min.Tensor")
def _clamp_min(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, least = lower.operand(a.self), lower.operand(a.min)
    return lower.emit("where", _step_of_difference(lower, least, x), least, x)


@lowers("clamp_max.Tensor")
def _clamp_max(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, most = lower.operand(a.self), lower.operand(a.max)
    return lower.emit("where", _step_of_difference(lower, x, most), most, x)


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

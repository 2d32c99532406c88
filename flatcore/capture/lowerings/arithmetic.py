"""Sums, differences, products and quotients of tensors and numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from ..lower import Lowering, lowers


def _combine(lower: Lowering, a: Any, b: Any, scale: float, weight: float) -> int:
    """scale * a + weight * b; one of the two may be a number."""
    if not isinstance(b, fx.Node):
        return lower.affine(lower.operand(a), scale, weight * float(b))
    if not isinstance(a, fx.Node):
        return lower.affine(lower.operand(b), weight, scale * float(a))
    return lower.emit("add", lower.affine(lower.operand(a), scale), lower.operand(b), alpha=float(weight))


@lowers("add.Tensor", "add.Scalar")
def _add(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _combine(lower, a.self, a.other, 1.0, float(a.alpha))


@lowers("sub.Tensor", "sub.Scalar")
def _sub(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _combine(lower, a.self, a.other, 1.0, -float(a.alpha))


@lowers("rsub.Tensor", "rsub.Scalar")
def _rsub(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _combine(lower, a.other, a.self, 1.0, -float(a.alpha))


@lowers("neg.default")
def _neg(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.affine(lower.operand(a.self), -1.0)


@lowers("mul.Tensor", "mul.Scalar")
def _mul(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    if not isinstance(a.other, fx.Node):
        return lower.affine(lower.operand(a.self), float(a.other))
    if a.self is a.other:
        return lower.unary("square", lower.operand(a.self))
    return lower.emit("mul", lower.operand(a.self), lower.operand(a.other))


@lowers("div.Tensor", "div.Scalar", "true_divide.Tensor", "true_divide.Scalar")
def _div(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    if not isinstance(a.other, fx.Node):
        return lower.affine(lower.operand(a.self), 1.0 / float(a.other))
    if lower.is_active(a.other):
        inverse = lower.unary("reciprocal", lower.operand(a.other))
    else:
        inverse = lower.constant(lower.prelude.call(torch.reciprocal, lower.take_real(a.other)))
    return lower.emit("mul", lower.operand(a.self), inverse)


@lowers("addcmul.default")
def _addcmul(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    product = lower.emit("mul", lower.operand(a.tensor1), lower.operand(a.tensor2))
    return lower.emit("add", lower.operand(a.self), product, alpha=float(a.value))


@lowers("lerp.Scalar")
def _interpolate(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _combine(lower, a.self, a.end, 1.0 - float(a.weight), float(a.weight))

"""Losses. Every cross-entropy becomes `cross_entropy` with target masses that the prelude builds."""

from __future__ import annotations

from math import inf, prod
from operator import getitem
from types import SimpleNamespace

import torch
from torch import Tensor, fx

from ..lower import LogSoftmax, Lowering, lowers

# The numbering of torch's Reduction.
_NONE, _MEAN, _SUM = 0, 1, 2


def class_mass(
    target: Tensor, weight: Tensor | None, classes: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(mass, divisor, index) of class indices: each row's class and its weight, none for an ignored one.

    The divisor is what a mean divides by: the sum of the masses.
    """
    valid = target != ignore_index
    index = target.masked_fill(~valid, 0)
    class_weight = (
        torch.ones(classes, dtype=dtype, device=target.device) if weight is None else weight.to(dtype)
    )
    # index_select, unlike a comparison, refuses an index outside the classes.
    mass = class_weight.index_select(0, index.reshape(-1)).reshape(index.shape) * valid
    return mass, mass.sum(), index


def spread_mass(
    target: Tensor,
    weight: Tensor | None,
    classes: int,
    ignore_index: int,
    smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Target masses (*target.shape, classes) of class indices, and the divisor.

    Smoothing spreads its share evenly over the classes, each with its weight (Szegedy et al., 2016, section 7,
    and torch's weighting of it).
    """
    own, divisor, index = class_mass(target, weight, classes, ignore_index, dtype)
    mass = torch.zeros(*target.shape, classes, dtype=dtype, device=target.device)
    mass = mass.scatter(-1, index.unsqueeze(-1), ((1 - smoothing) * own).unsqueeze(-1))
    if smoothing:
        valid = (target != ignore_index).to(dtype).unsqueeze(-1)
        mass = mass + (smoothing / classes) * valid * (1 if weight is None else weight.to(dtype))
    return mass, divisor


def probability_mass(
    target: Tensor, weight: Tensor | None, axis: int, smoothing: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Target masses (classes on the last axis) of class probabilities; a mean divides by their number."""
    mass = target.to(dtype).movedim(axis, -1)
    classes = mass.shape[-1]
    if smoothing:
        mass = mass * (1 - smoothing) + smoothing / classes
    rows = torch.full((), mass.numel() // classes, dtype=dtype, device=target.device)
    return mass if weight is None else mass * weight.to(dtype), rows


@lowers("cross_entropy_loss.default")
def _cross_entropy(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    logits = lower.operand(a.self)
    axis = 0 if lower.rank(logits) == 1 else 1
    smoothing = float(a.label_smoothing)
    if tuple(a.target.meta["val"].shape) == lower.shape(logits):
        target, weight = lower.take(a.target), _take(lower, a.weight)
        both = lower.prelude.call(probability_mass, target, weight, axis, smoothing, lower.dtype)
    elif smoothing:
        both = _spread_mass(lower, a, lower.shape(logits)[axis], smoothing)
    else:
        return _against_classes(lower, logits, axis, a)
    mass, divisor = _mass(lower, both, a.reduction)
    losses = lower.emit("cross_entropy", lower.to_last(logits, axis), lower.constant(mass), None)
    return _total(lower, losses, divisor, a.reduction)


@lowers("log_softmax.int", "_log_softmax.default")
def _log_softmax(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> LogSoftmax:
    x = lower.operand(a.self)
    return LogSoftmax(x, int(a.dim) % max(lower.rank(x), 1))


@lowers("nll_loss_nd.default", "nll_loss.default", "nll_loss2d.default")
def _nll(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    """Behind log_softmax over the classes a cross-entropy; else -sum of mass times what comes."""
    source = lower.result(a.self)
    axis = 0 if a.self.meta["val"].dim() == 1 else 1
    if isinstance(source, LogSoftmax) and source.dim == axis:
        return _against_classes(lower, source.logits, axis, a)
    both = _spread_mass(lower, a, a.self.meta["val"].shape[axis], 0.0)
    rows = lower.to_last(lower.operand(a.self), axis)
    mass, divisor = _mass(lower, both, a.reduction)
    losses = lower.sum(lower.emit("mul", rows, lower.constant(mass)), [-1], scale=-1.0)
    return _total(lower, losses, divisor, a.reduction)


def _take(lower: Lowering, argument: fx.Node | None) -> fx.Node | None:
    return None if argument is None else lower.take(argument)


def _spread_mass(lower: Lowering, a: SimpleNamespace, classes: int, smoothing: float) -> fx.Node:
    target, weight = lower.take(a.target), _take(lower, a.weight)
    return lower.prelude.call(
        spread_mass, target, weight, classes, int(a.ignore_index), smoothing, lower.dtype
    )


def _against_classes(lower: Lowering, logits: int, axis: int, a: SimpleNamespace) -> int:
    """The cross-entropy of `logits` against class indices."""
    target, weight, classes = lower.take(a.target), _take(lower, a.weight), lower.shape(logits)[axis]
    parts = lower.prelude.call(class_mass, target, weight, classes, int(a.ignore_index), lower.dtype)
    mass, divisor = _mass(lower, parts, a.reduction)
    index = lower.constant(lower.prelude.call(getitem, parts, 2), torch.int64)
    losses = lower.emit("cross_entropy", lower.to_last(logits, axis), lower.constant(mass), index)
    return _total(lower, losses, divisor, a.reduction)


def _mass(lower: Lowering, parts: fx.Node, reduction: int) -> tuple[fx.Node, fx.Node]:
    """(mass, divisor), with the mass divided already where the loss is a mean."""
    mass, divisor = (lower.prelude.call(getitem, parts, i) for i in (0, 1))
    return (lower.prelude.call(torch.div, mass, divisor) if reduction == _MEAN else mass), divisor


def _total(lower: Lowering, losses: int, divisor: fx.Node, reduction: int) -> int:
    if reduction == _NONE:
        return losses
    total = lower.sum(losses, range(lower.rank(losses)))
    if reduction == _MEAN:
        lower.normalisers[total] = divisor
    return total


@lowers("mse_loss.default")
def _mse(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _reduced(lower, lower.unary("square", _residual(lower, a)), a.reduction)


@lowers("l1_loss.default")
def _l1(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _reduced(lower, lower.unary("abs", _residual(lower, a)), a.reduction)


@lowers("smooth_l1_loss.default")
def _smooth_l1(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    residual = _residual(lower, a)
    each = lower.unary("smooth_l1", residual, a.beta) if a.beta > 0 else lower.unary("abs", residual)
    return _reduced(lower, each, a.reduction)


@lowers("huber_loss.default")
def _huber(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _reduced(lower, lower.unary("huber", _residual(lower, a), a.delta), a.reduction)


@lowers("binary_cross_entropy_with_logits.default")
def _binary_cross_entropy(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    """With target y and weight p of the positives: (1 - y) x + (1 + (p - 1) y) softplus(-x)."""
    x, y = lower.operand(a.self), lower.take_real(a.target)
    softplus = lower.unary("softplus", lower.affine(x, -1.0), 1.0, inf)
    if a.pos_weight is not None:
        excess = lower.prelude.call(torch.sub, lower.take_real(a.pos_weight), 1)
        factor = lower.prelude.call(torch.add, lower.prelude.call(torch.mul, excess, y), 1)
        softplus = lower.emit("mul", softplus, lower.constant(factor))
    negatives = lower.emit("mul", x, lower.constant(lower.prelude.call(torch.rsub, y, 1)))
    each = lower.emit("add", negatives, softplus, alpha=1.0)
    if a.weight is not None:
        each = lower.emit("mul", each, lower.constant(lower.take(a.weight)))
    return _reduced(lower, each, a.reduction)


def _residual(lower: Lowering, a: SimpleNamespace) -> int:
    return lower.emit("add", lower.operand(a.self), lower.operand(a.target), alpha=-1.0)


def _reduced(lower: Lowering, each: int, reduction: int) -> int:
    if reduction == _NONE:
        return each
    scale = 1.0 / prod(lower.shape(each)) if reduction == _MEAN else 1.0
    return lower.sum(each, range(lower.rank(each)), scale=scale)

"""Climbing the loss of one batch within a ball around the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from flatcore import checks
from flatcore.objective import Objective, WeightedBatch

__all__ = ["auto_pgd", "batch_gradient", "flat_parameters"]


def flat_parameters(objective: Objective) -> Tensor:
    """The selected parameters as one vector (P,)."""
    return torch.cat([value.reshape(-1) for value in objective.snapshot().values.values()])


def batch_gradient(objective: Objective, batch: WeightedBatch, row: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient (P,) of one batch at a flat parameter vector."""
    leaf = row.detach().clone().requires_grad_()
    with torch.enable_grad():
        parts = objective.layout.split(leaf)
        loss = checks.evaluate(objective.evaluate, batch.batch, parts, batch.index, twice=False).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient


def auto_pgd(
    objective: Objective,
    batch: WeightedBatch,
    w: Tensor,
    scale: Tensor | None,
    rho: float,
    norm: str,
    steps: int,
) -> float:
    """The largest rise of the batch's loss seen within |e|_norm <= rho, parameters w + scale * e.

    Auto-PGD (Croce and Hein, ICML 2020) with the constants of its authors: momentum 0.75, first step 2 rho, halved at
    checkpoints 0.22, 0.22 + 0.19, ... of the steps where fewer than 0.75 of the steps since rose, or where neither step
    nor best value changed; then on from the best point. Starts at e = 0.
    """
    e = torch.zeros_like(w)
    base, slope = _value(objective, batch, w, scale, e)
    best, best_e, best_slope, values = base, e, slope, [base]
    old, step = e, 2 * rho
    interval, least, shorter = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    since, reduced, best_then = 0, True, base
    for i in range(steps):
        momentum, old = e - old, e
        share = 0.75 if i else 1.0
        target = _project(e + step * _steepest(slope, norm), rho, norm)
        e = _project(e + share * (target - e) + (1 - share) * momentum, rho, norm)
        value, slope = _value(objective, batch, w, scale, e)
        values.append(value)
        if value > best:
            best, best_e, best_slope = value, e, slope
        since += 1
        if since == interval:
            rises = sum(b > a for a, b in zip(values[-1 - interval :], values[-interval:], strict=False))
            stuck = not reduced and best <= best_then
            reduced, best_then = rises <= 0.75 * interval or stuck, best
            if reduced:
                step, e, slope = step / 2, best_e, best_slope
            since, interval = 0, max(interval - shorter, least)
    return best - base


def _value(
    objective: Objective, batch: WeightedBatch, w: Tensor, scale: Tensor | None, e: Tensor
) -> tuple[float, Tensor]:
    """The batch's loss at e, and its gradient in e."""
    value, gradient = batch_gradient(objective, batch, w + (e if scale is None else scale * e))
    return value, gradient if scale is None else gradient * scale


def _steepest(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    length = gradient.norm()
    return gradient / length if length > 0 else gradient


def _project(e: Tensor, rho: float, norm: str) -> Tensor:
    if norm == "linf":
        return e.clamp(-rho, rho)
    length = float(e.norm())
    return e * (rho / length) if length > rho else e

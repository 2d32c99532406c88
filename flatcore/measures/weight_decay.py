"""The Tikhonov coefficient that an optimizer's weight decay is, and where it is none."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from flatcore.linear import check_positive
from flatcore.objective import Objective

__all__ = ["checked_damping"]

# These add weight_decay * parameter to the gradient, which is that of (weight_decay / 2) |parameter|².
_PENALISING = ["SGD", "Adam", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Adamax", "ASGD"]


def checked_damping(objective: Objective, damping: Any, optimizer: Any) -> float:
    """lambda, as given or as the optimizer's weight decay, for a penalty (lambda / 2) |theta|² beside the
    objective."""
    if (damping is None) == (optimizer is None):
        got = "neither" if damping is None else "both"
        raise ValueError(
            f"damping: expected either damping= or optimizer=, got {got}; give e.g. damping=1e-3"
        )
    if optimizer is None:
        return check_positive("damping", damping, 1e-3)
    return _from_optimizer(objective, optimizer)


def _from_optimizer(objective: Objective, optimizer: Any) -> float:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    name = type(optimizer).__name__
    if name == "AdamW" or any(group.get("decoupled_weight_decay") for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: expected weight decay that is a penalty on the loss, got {name}'s decoupled one, which "
            "shrinks the parameters by lr * weight_decay whatever the gradient's scaling, so that no damping belongs "
            "to it; give damping="
        )
    if name not in _PENALISING or type(optimizer).__module__.partition(".")[0] != "torch":
        raise ValueError(
            f"optimizer: expected one of torch's that add weight_decay * parameter to the gradient "
            f"({', '.join(_PENALISING)}), got {name}; give damping="
        )
    if _is_sum(objective):
        raise ValueError(
            "optimizer: expected an objective that is a mean, got a loss with reduction='sum', of which is not known "
            "whether it was also the training's; give damping=weight_decay if it was, examples * weight_decay if not"
        )
    found: dict[int, float] = {}
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise ValueError(
                f"optimizer: expected one that minimises, got {name} with maximize=True; give damping="
            )
        found |= {id(p): float(group["weight_decay"]) for p in group["params"]}
    missing = [n for n, p in objective.parameters.items() if id(p) not in found]
    if missing:
        raise ValueError(
            f"optimizer: expected one of the objective's parameters, got none for {missing[0]!r}"
        )
    values = {n: found[id(p)] for n, p in objective.parameters.items()}
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if values[least] != values[most]:
        raise ValueError(
            f"optimizer: expected one weight decay for all selected parameters, got {values[most]:g} for {most!r} and "
            f"{values[least]:g} for {least!r}; select parameters of one group with params=, or give damping="
        )
    if values[most] <= 0:
        raise ValueError(
            "optimizer: expected a positive weight decay, got 0, with which every rank is that of A; "
            "give damping="
        )
    return values[most]


def _is_sum(objective: Objective) -> bool:
    loss: Any = objective.loss_function
    if getattr(loss, "reduction", "mean") == "sum":
        return True
    batch = next(objective.batches())
    with torch.no_grad():
        call = objective.evaluate(batch.batch, objective.snapshot().values).call
    return call is not None and call.reduction == "sum"

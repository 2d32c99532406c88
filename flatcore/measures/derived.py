"""Objectives made from another one: other parameters, or another loss, on the same model and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatcore.capture.batch import split_batch
from flatcore.objective import ModelLoss, Objective

__all__ = ["check_objective", "normalize_logits", "restricted"]


def check_objective(objective: Any) -> Objective:
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective: expected a flatcore.Objective, got {type(objective).__name__}; make one with "
            "Objective(model, loss, data)"
        )
    return objective


def restricted(objective: Objective, names: Sequence[str]) -> Objective:
    """The same loss as a function of these of its parameters alone; itself where these are all."""
    if list(names) == list(objective.layout.shapes):
        return objective
    return _derived(objective, objective.loss_function, names)


def normalize_logits(objective: Objective, kind: str = "std") -> Objective:
    """The objective whose loss sees normalised logits, so that it does not change with their scale.

    "std": f / sqrt(mean_k (f_k - mean f)²), the logits divided by their standard deviation over the classes, as
    published with normalized sharpness (Tsuzuku, Sato and Sugiyama, ICML 2020; known to us from reimplementations).
    "norm": (f - mean f) / |f - mean f|_2, as in Andriushchenko et al. (ICML 2023): sqrt(classes) times smaller.

    The model's output, for a Gauss-Newton matrix, are the normalised logits: in these a cross-entropy is convex, in the
    logits themselves it no longer is.

    The classes are axis 1 of the output, or its only axis. Where all logits are equal there is no such scale, and the
    loss is not finite. Raises ValueError for a ModelLoss, where the logits are not known, and for an output that is
    not one tensor.
    """
    objective = check_objective(objective)
    if kind not in ("std", "norm"):
        raise ValueError(f"kind: expected 'std' or 'norm', got {kind!r}")
    loss = objective.loss_function
    if isinstance(loss, ModelLoss):
        raise ValueError(
            "loss: expected loss(output, target), whose output are the logits to normalise, got a ModelLoss; "
            "normalise inside its function"
        )
    return _derived(objective, _normalized(loss, kind == "norm"), list(objective.layout.shapes))


def _normalized(loss: Callable[..., Tensor], to_norm: bool) -> ModelLoss:
    def of_normalized(model: nn.Module, batch: Any) -> Tensor:
        args, kwargs, target = split_batch(batch)
        output = model(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.dim():
            raise TypeError(f"expected one tensor of logits to normalise, got {type(output).__name__}")
        axis = min(1, output.dim() - 1)
        centred = output - output.mean(dim=axis, keepdim=True)
        squares = centred.square()
        if to_norm:
            return loss(centred / squares.sum(dim=axis, keepdim=True).sqrt(), target)
        return loss(output / squares.mean(dim=axis, keepdim=True).sqrt(), target)

    return ModelLoss(of_normalized)


def _derived(objective: Objective, loss: Any, names: Sequence[str]) -> Objective:
    with torch.inference_mode(False):
        return Objective(
            objective.model,
            loss,
            objective.data.again,
            params=list(names),
            memory=objective.budget.total,
            allow_train_mode=objective.allow_train_mode,
        )

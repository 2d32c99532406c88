"""How well a model fits some data: the mean loss, and the accuracy where the data are labelled with classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatcore.capture.batch import split_batch
from flatcore.evaluate import ModelLoss, once_differentiable, plain_torch
from flatcore.objective import Objective


@dataclass(frozen=True)
class Fit:
    """`loss`: mean over the examples. `accuracy`: share of labels that are the largest score, None without classes."""

    loss: float
    accuracy: float | None
    examples: int


def fit(objective: Objective, data: Any = None) -> Fit:
    """The fit to `data`, in any form an Objective takes, or to the objective's own data. Costs two forward passes."""
    if data is not None:
        names = list(objective.layout.shapes)
        objective = Objective(
            objective.model,
            objective.loss_function,
            data,
            names,
            memory=objective.budget.total,
            allow_train_mode=objective.allow_train_mode,
        )
    return Fit(objective.loss(), _accuracy(objective), objective.examples)


def _accuracy(objective: Objective) -> float | None:
    if isinstance(objective.loss_function, ModelLoss):
        return None
    correct = labels = 0
    with plain_torch(objective.layout.device), torch.no_grad():
        for batch in objective.batches():
            target = split_batch(batch.batch)[2]
            run = partial(objective.evaluate, batch.batch, objective.parameters)
            outputs = once_differentiable(run).outputs
            if len(outputs) != 1 or not _are_classes(outputs[0], target):
                return None
            correct += int((outputs[0].argmax(dim=1) == target).sum())
            labels += len(target)
    return correct / labels


def _are_classes(scores: Tensor, target: Any) -> bool:
    integers = isinstance(target, Tensor) and not (target.is_floating_point() or target.is_complex())
    return integers and target.dtype != torch.bool and scores.dim() == 2 and target.shape == scores.shape[:1]

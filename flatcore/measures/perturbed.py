"""The loss, the errors and the gradient at other parameters than the model's, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcore import checks
from flatcore.capture.batch import split_batch
from flatcore.errors import warn
from flatcore.evaluate import Evaluation, ModelLoss
from flatcore.objective import Objective, WeightedBatch

__all__ = ["Errors", "evaluate_rows", "finite_status", "loss_and_gradient"]

ErrorRule = Callable[[Any, Any], Tensor]
_CHUNK = 16
# Multiply-adds, about, up to which one call for 16 sets of parameters is faster than 16 calls. Measured on one core:
# 9 times faster on a tiny net, twice on 1 437 digits through 64-48-48-10, slower from 512 x 300 000 on; with
# convolutions, whose weights make a grouped one, it turns earlier.
_VECTORISED, _VECTORISED_CONVOLUTIONS = 1e7, 2e6


class Errors:
    """What is averaged: the objective's loss, or the mistakes of each example.

    Calling it with a batch and its evaluation gives (sum, count); for the loss the count is 1 and the sum is weighted
    as the objective weighs batches.
    """

    def __init__(self, objective: Objective, error: ErrorRule | Literal["loss"] | None) -> None:
        if error is not None and error != "loss" and not callable(error):
            raise TypeError(
                "error: expected None for the argmax rule, 'loss', or a callable(output, target) that gives one number "
                f"an example, got {error!r}"
            )
        self._objective, self._error = objective, error
        self.name = "loss" if error == "loss" else "0-1 error" if error is None else "error"

    def __call__(self, batch: WeightedBatch, evaluation: Evaluation) -> tuple[Tensor, float]:
        if self._error == "loss":
            return evaluation.loss * batch.weight, 0.0
        if self._error is None:
            wrong, count = _mistakes(evaluation)
            return wrong, float(count)
        each = _one_each(self._error(*self._output_and_target(batch, evaluation)))
        return each.to(evaluation.loss.dtype).sum(), float(each.numel())

    def _output_and_target(self, batch: WeightedBatch, evaluation: Evaluation) -> tuple[Any, Any]:
        if not isinstance(self._objective.loss_function, ModelLoss):
            outputs = evaluation.outputs
            return outputs[0] if len(outputs) == 1 else outputs, split_batch(batch.batch)[2]
        if evaluation.call is None:
            raise ValueError(
                "error: expected a loss of torch.nn.functional in the ModelLoss to take output and target from, got "
                "another one; local_energy takes error='loss'"
            )
        return evaluation.call.arguments["input"], evaluation.call.arguments["target"]


def _one_each(wrong: Any) -> Tensor:
    if not isinstance(wrong, Tensor) or not wrong.dim():
        got = f"shape {tuple(wrong.shape)}" if isinstance(wrong, Tensor) else type(wrong).__name__
        raise ValueError(
            f"error: expected a callable that gives a tensor with one number an example, got {got}"
        )
    return wrong.detach()


def _mistakes(evaluation: Evaluation) -> tuple[Tensor, int]:
    """How many targets are not the class of the largest score (binary: of its sign), and of how many not ignored."""
    call = evaluation.call
    if call is not None and call.function in (F.cross_entropy, F.nll_loss):
        scores, target = call.arguments["input"], call.arguments["target"]
        axis = 1 if scores.dim() > 1 else 0
        best = scores.argmax(dim=axis)
        if target.is_floating_point():
            return (best != target.argmax(dim=axis)).sum(), best.numel()
        counted = target != call.arguments["ignore_index"]
        return ((best != target) & counted).sum(), int(counted.sum())
    if call is not None and call.function is F.binary_cross_entropy_with_logits:
        scores, target = call.arguments["input"], call.arguments["target"]
        return ((scores > 0) != (target > 0.5)).sum(), scores.numel()
    raise ValueError(
        "error: expected a cross-entropy for the argmax rule, got another loss; give a callable(output, target) with "
        "one number an example, or to local_energy error='loss'"
    )


def evaluate_rows(
    objective: Objective, errors: Errors, batch: WeightedBatch, rows: Iterator[Tensor]
) -> Iterator[tuple[float, float]]:
    """(sum, count) of one batch at each of the flat parameter vectors; in chunks where that is faster."""
    largest = _VECTORISED
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in objective.model.modules()):
        largest = _VECTORISED_CONVOLUTIONS
    together = batch.examples * objective.layout.size <= largest

    def one(row: Tensor) -> tuple[Tensor, float]:
        evaluation = objective.evaluate(batch.batch, objective.layout.split(row))
        return errors(batch, evaluation)

    def plain(row: Tensor) -> tuple[float, float]:
        result = checks.evaluate(
            objective.evaluate, batch.batch, objective.layout.split(row), batch.index, twice=False
        )
        total, count = errors(batch, result)
        return float(total), count

    counts: list[float] = []

    def several(row: Tensor) -> Tensor:
        total, count = one(row)
        counts.append(count)
        return total

    pending: list[Tensor] = []
    for row in rows:
        if not together:
            yield plain(row)
            continue
        pending.append(row)
        if len(pending) == _CHUNK:
            together = yield from _chunk(pending, several, plain, counts)
            pending = []
    yield from map(plain, pending)


def _chunk(
    rows: list[Tensor],
    several: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], tuple[float, float]],
    counts: list[float],
) -> Any:
    """All rows in one call, or one by one where the model does not take that; returns whether it did."""
    try:
        totals = torch.func.vmap(several)(torch.stack(rows)).tolist()
    except Exception:
        yield from map(plain, rows)
        return False
    yield from ((total, counts[-1]) for total in totals)
    return True


def finite_status(samples: Tensor, measure: str, of: str, advice: str) -> str:
    """ "converged" where all samples are finite; else a sentence, told as a warning too."""
    bad = int((~torch.isfinite(samples)).sum())
    if not bad:
        return "converged"
    status = f"{bad} of {samples.numel()} samples of the {of} are not finite"
    warn(f"{measure}: {status}; {advice}")
    return status


def loss_and_gradient(objective: Objective, row: Tensor, only: int | None = None) -> tuple[float, Tensor]:
    """The objective at flat parameters, and its gradient (P,); of batch number ``only`` alone, as if it were all."""
    total, gradient = 0.0, torch.zeros_like(row)
    layout = objective.layout
    for batch in objective.batches():
        if only is not None and batch.index != only:
            continue
        weight = batch.weight if only is None else 1.0
        leaf = row.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = objective.evaluate(batch.batch, layout.split(leaf)).loss
            (g,) = torch.autograd.grad(loss, leaf)
        total += weight * float(loss.detach())
        gradient.add_(g, alpha=weight)
    return total, gradient

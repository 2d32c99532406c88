"""Losses that are negative log likelihoods: their coefficient in the objective, and labels drawn from the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatcore.capture.batch import TARGET_KEYS
from flatcore.evaluate import Evaluation, LossCall, ModelLoss, plain_torch
from flatcore.objective import Objective

__all__ = ["coefficient", "counted_examples", "curvature_at_outputs", "with_sampled_targets"]

_ENTROPIES = (F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits)


def coefficient(objective: Objective, noise_variance: float) -> float:
    """kappa where the objective is kappa times the sum of the targets' negative log likelihoods.

    For a mean cross-entropy 1 / (number of targets), for the squared error (c/2) sum |f - y|² with normal errors of
    that variance c * noise_variance. With H = kappa sum F_t and independent labels from the model, gradients have
    (1/n) C = kappa H: so the gap (1/n) Tr((H + lambda I)^-1 C) is kappa rank_lambda(H).
    """
    values = objective.snapshot().values
    found = []
    with plain_torch(objective.layout.device):
        for batch in objective.batches():
            evaluation = objective.evaluate(batch.batch, values)
            call = evaluation.call
            if call is not None and call.function in _ENTROPIES:
                found.append(batch.weight * _entropy_coefficient(call))
            else:
                found.append(batch.weight * _squared_coefficient(evaluation) * noise_variance)
    if max(found) - min(found) > 1e-4 * max(found):
        raise ValueError(
            f"calibrated: expected targets of one weight, got weights from {min(found):.3g} to {max(found):.3g}; use "
            "calibrated=False"
        )
    return sum(found) / len(found)


def _entropy_coefficient(call: LossCall) -> float:
    arguments = call.arguments
    odd = [k for k in ("weight", "pos_weight") if arguments.get(k) is not None]
    odd += ["label_smoothing"] if arguments.get("label_smoothing") else []
    if odd or (
        call.function is not F.binary_cross_entropy_with_logits and arguments["target"].is_floating_point()
    ):
        raise ValueError(
            f"calibrated: expected the negative log likelihood of labels, got a cross-entropy with "
            f"{odd[0] if odd else 'probabilities as targets'}; use calibrated=False"
        )
    if call.reduction == "sum":
        return 1.0
    return 1 / (call.normaliser if call.normaliser is not None else arguments["input"].numel())


def counted_examples(evaluation: Evaluation, examples: int) -> Tensor:
    """Which examples (examples,) have a target that is neither ignored nor of a class without weight, on the CPU."""
    call = evaluation.call
    if call is not None and call.function in (F.cross_entropy, F.nll_loss):
        target, weight = call.arguments["target"], call.arguments["weight"]
        if not target.is_floating_point() and target.numel() % examples == 0:
            counted = target != call.arguments["ignore_index"]
            if weight is not None:
                counted = counted & (weight[torch.where(counted, target, 0)] != 0)
            found: Tensor = counted.reshape(examples, -1).any(dim=1).cpu()
            return found
    return torch.ones(examples, dtype=torch.bool)


def _squared_coefficient(evaluation: Evaluation) -> float:
    if len(evaluation.outputs) == 1:
        z = evaluation.outputs[0].detach()
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
        loose = 1e-10 if z.dtype == torch.float64 else 1e-4
        curvatures = [curvature_at_outputs(evaluation, at, signs) for at in (z, z + signs)]
        if all(c is not None for c in curvatures):
            both = torch.stack([signs * c for c in curvatures if c is not None]).double()
            c = float(both.mean())
            if c > 0 and bool(((both - c).abs() <= loose * c).all()):
                return c
    raise ValueError(
        "calibrated: expected a cross-entropy or a squared error, whose Gauss-Newton matrix is the Fisher matrix, got "
        "another loss; use calibrated=False"
    )


def curvature_at_outputs(evaluation: Evaluation, at: Tensor, direction: Tensor) -> Tensor | None:
    """The second derivative of one batch's loss by its single output, at ``at``, times ``direction``; None if
    zero."""
    at = at.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(evaluation.loss_of((at,)), at, create_graph=True)
    if not g.requires_grad:
        return None
    product: Tensor = torch.autograd.grad(g, at, direction)[0]
    return product


def with_sampled_targets(
    objective: Objective, noise_variance: float, generator: torch.Generator
) -> Objective:
    """The objective with every target drawn from the model: classes by their probabilities, or outputs plus normal
    noise."""
    if isinstance(objective.loss_function, ModelLoss):
        raise ValueError(
            "gradients: expected a loss(output, target) to draw targets for, got a ModelLoss; give an Objective"
        )
    values = objective.snapshot().values
    batches = []
    with plain_torch(objective.layout.device):
        for batch in objective.batches():
            evaluation = objective.evaluate(batch.batch, values)
            batches.append(_replaced(batch.batch, _sampled(evaluation, noise_variance, generator)))
    return Objective(
        objective.model,
        objective.loss_function,
        batches,
        list(objective.layout.shapes),
        memory=objective.budget.total,
        allow_train_mode=objective.allow_train_mode,
    )


def _sampled(evaluation: Evaluation, noise_variance: float, generator: torch.Generator) -> Tensor:
    call = evaluation.call
    if call is None or call.function not in _ENTROPIES:
        _squared_coefficient(evaluation)
        z = evaluation.outputs[0].detach()
        noise = torch.randn(z.shape, dtype=torch.float64, generator=generator).to(z)
        sampled: Tensor = z + noise_variance**0.5 * noise
        return sampled
    _entropy_coefficient(call)
    z, target = call.arguments["input"].detach().cpu(), call.arguments["target"]
    if call.function is F.binary_cross_entropy_with_logits:
        drawn = torch.bernoulli(torch.sigmoid(z.double()), generator=generator)
        return torch.as_tensor(drawn, dtype=target.dtype, device=target.device)
    if z.dim() == 1:
        z = z[None]
    shares = torch.softmax(z.double(), 1).movedim(1, -1).reshape(-1, z.shape[1])
    drawn = torch.multinomial(shares, 1, generator=generator).reshape(target.shape).to(target)
    return torch.where(target == call.arguments["ignore_index"], target, drawn)


def _replaced(batch: Any, target: Tensor) -> Any:
    if isinstance(batch, Mapping):
        (key,) = [k for k in TARGET_KEYS if k in batch]
        return {**batch, key: target}
    return (*batch[:-1], target)

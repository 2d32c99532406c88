"""Random signed sums of the examples' gradients, from one backward pass each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatcore import checks
from flatcore.evaluate import plain_torch, rows_mix
from flatcore.measures.noise import noise_generator
from flatcore.objective import Objective, Snapshot, WeightedBatch

__all__ = ["sign_sums"]


def sign_sums(objective: Objective, seed: int, first: int, count: int) -> Tensor:
    """u_k = (1/sqrt(n)) sum_i s_ki (g_i - g), numbers first to first + count - 1, (P, count) float64: E u uᵀ = C.

    g_i is n times what example i contributes to the objective, g their mean, s_ki random signs. Examples are equal
    consecutive groups of rows of the model's one output, and must not interact.
    """
    checks.check_batch_statistics(objective.model)
    snapshot, n = objective.snapshot(), objective.examples
    size, device = objective.layout.size, objective.layout.device
    sums = torch.zeros(count, size, dtype=torch.float64, device=device)
    mean = torch.zeros(size, dtype=torch.float64, device=device)
    totals = torch.zeros(count, dtype=torch.float64)
    generators = [noise_generator(seed, first + k, torch.device("cpu")) for k in range(count)]
    with plain_torch(objective.layout.device):
        for batch in objective.batches():
            gradient = _contributions(objective, batch, snapshot)
            mean += gradient(torch.ones(batch.examples))
            for k, generator in enumerate(generators):
                signs = torch.randint(0, 2, (batch.examples,), generator=generator) * 2.0 - 1
                totals[k] += float(signs.sum())
                sums[k] += gradient(signs)
    result: Tensor = n**0.5 * sums - (totals / n**0.5).to(device)[:, None] * mean
    return result.T


def _contributions(objective: Objective, batch: WeightedBatch, at: Snapshot) -> Callable[[Tensor], Tensor]:
    """signs -> the signed sum of what each example of the batch contributes to the objective's gradient, float64."""
    leaves = [v.detach().requires_grad_() for v in at.values.values()]
    evaluation = objective.evaluate(batch.batch, dict(zip(at.values, leaves, strict=True)))
    if len(evaluation.outputs) != 1 or evaluation.outputs[0].shape[0] % batch.examples:
        raise ValueError(
            "objective: expected one output whose rows are the examples to tell their gradients apart, got "
            f"{[tuple(z.shape) for z in evaluation.outputs]} for {batch.examples} examples; use method='exact'"
        )
    z = evaluation.outputs[0]
    if batch.index == 0 and batch.examples > 1:
        values = at.values
        if rows_mix(lambda b: objective.evaluate(b, values).outputs, batch.batch, batch.examples):
            raise ValueError(
                "model: expected examples that do not interact, got outputs that depend on other rows"
            )
    (slope,) = torch.autograd.grad(evaluation.loss, z, retain_graph=True)
    group = z.shape[0] // batch.examples

    def gradient(signs: Tensor) -> Tensor:
        rows = signs.repeat_interleave(group).to(slope).view(-1, *[1] * (slope.dim() - 1))
        parts = torch.autograd.grad(z, leaves, slope * rows, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, parts, strict=True)]
        whole: Tensor = torch.cat([g.reshape(-1) for g in flat]).double()
        return batch.weight * whole

    return gradient

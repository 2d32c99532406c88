"""The covariance of the examples' gradients: vectors that have it, from one backward pass each, and the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flatcore import checks
from flatcore.evaluate import plain_torch, rows_mix
from flatcore.measures.ascent import flat_parameters
from flatcore.measures.likelihood import counted_examples, with_sampled_targets
from flatcore.measures.noise import noise_generator
from flatcore.measures.perturbed import loss_and_gradient
from flatcore.objective import Objective, Snapshot, WeightedBatch
from flatcore.operators import GradientCovariance

__all__ = ["DataGradients", "GradientNoise", "SampledGradients", "count_examples", "sign_sums"]

_DRAWS = 8  # of targets, for matrices


class GradientNoise(Protocol):
    """C, by matrices whose mean it is, or by vectors u with E u uᵀ = C. ``name``: whose gradients' ``moment`` it is."""

    @property
    def name(self) -> str: ...

    @property
    def moment(self) -> str: ...

    def matrices(self) -> Iterator[Tensor]: ...

    def vectors(self, seed: int, first: int, count: int) -> Tensor: ...


@dataclass(frozen=True)
class DataGradients:
    """C = (1/n) sum_i g_i g_iᵀ - g gᵀ over the n examples of the objective that count."""

    objective: Objective
    name: str
    moment: str = "centred covariance"

    def matrices(self) -> Iterator[Tensor]:
        mean = _gradient(self.objective)
        yield _second_moment(self.objective) - torch.outer(mean, mean)

    def vectors(self, seed: int, first: int, count: int) -> Tensor:
        return sign_sums(self.objective, seed, first, count)


@dataclass(frozen=True)
class SampledGradients:
    """C = E (1/n) sum_i g_i g_iᵀ over targets drawn from the model, for which E g_i = 0: nothing is centred, which
    would take off 1/n of it. Each matrix, and each vector, is from targets of its own."""

    objective: Objective
    noise_variance: float
    seed: int
    name: str = "targets drawn from the model"
    moment: str = "second moment"

    def matrices(self) -> Iterator[Tensor]:
        for draw in range(_DRAWS):
            yield _second_moment(self._drawn(draw))

    def vectors(self, seed: int, first: int, count: int) -> Tensor:
        # Independent gradients of mean zero need no random signs.
        root = count_examples(self.objective) ** 0.5
        return torch.stack([root * _gradient(self._drawn(first + k)) for k in range(count)], dim=1)

    def _drawn(self, draw: int) -> Objective:
        generator = noise_generator(self.seed, draw, torch.device("cpu"))
        return with_sampled_targets(self.objective, self.noise_variance, generator)


def count_examples(objective: Objective) -> int:
    """The examples with a target that is not ignored and has a weight."""
    values = objective.snapshot().values
    with plain_torch(objective.layout.device), torch.no_grad():
        return sum(
            int(counted_examples(objective.evaluate(batch.batch, values), batch.examples).sum())
            for batch in objective.batches()
        )


def _gradient(objective: Objective) -> Tensor:
    with plain_torch(objective.layout.device):
        return loss_and_gradient(objective, flat_parameters(objective))[1].double()


def _second_moment(objective: Objective) -> Tensor:
    """(1/n) sum_i g_i g_iᵀ, g_i n times what example i contributes, over the n examples that count."""
    matrix = GradientCovariance(objective, centered=False).to_dense().double()
    return matrix * (count_examples(objective) / objective.examples)


def sign_sums(objective: Objective, seed: int, first: int, count: int) -> Tensor:
    """u_k = (1/sqrt(n)) sum_i s_ki (g_i - g), numbers first to first + count - 1, (P, count) float64: E u uᵀ = C.

    g_i is n times what example i contributes to the objective, g their mean, s_ki random signs. Examples are equal
    consecutive groups of rows of the model's one output, and must not interact; those without weight do not count.
    """
    checks.check_batch_statistics(objective.model)
    snapshot = objective.snapshot()
    size, device = objective.layout.size, objective.layout.device
    sums = torch.zeros(count, size, dtype=torch.float64, device=device)
    mean = torch.zeros(size, dtype=torch.float64, device=device)
    totals, n = torch.zeros(count, dtype=torch.float64), 0
    generators = [noise_generator(seed, first + k, torch.device("cpu")) for k in range(count)]
    with plain_torch(objective.layout.device):
        for batch in objective.batches():
            gradient, counted = _contributions(objective, batch, snapshot)
            n += int(counted.sum())
            mean += gradient(torch.ones(batch.examples))
            for k, generator in enumerate(generators):
                signs = torch.zeros(batch.examples)
                # Examples that do not count take no signs from those that do.
                drawn = torch.randint(0, 2, (int(counted.sum()),), generator=generator)
                signs[counted] = drawn * 2.0 - 1
                totals[k] += float(signs.sum())
                sums[k] += gradient(signs)
    result: Tensor = n**0.5 * sums - (totals / n**0.5).to(device)[:, None] * mean
    return result.T


def _contributions(
    objective: Objective, batch: WeightedBatch, at: Snapshot
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """signs -> the signed sum of what each example of the batch contributes to the objective's gradient, float64; and
    which examples count."""
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

    return gradient, counted_examples(evaluation, batch.examples)

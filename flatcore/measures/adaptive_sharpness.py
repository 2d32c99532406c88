"""Sharpness in a ball whose axes are the weights' own sizes: on average, and at worst."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flatcore.environment import exclusive
from flatcore.evaluate import plain_torch
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.ascent import auto_pgd, flat_parameters
from flatcore.measures.derived import check_objective
from flatcore.measures.modes import outside_inference_mode
from flatcore.measures.noise import noise_generator
from flatcore.measures.perturbed import Errors, evaluate_rows, finite_status
from flatcore.measures.result import Measure
from flatcore.objective import Objective
from flatcore.sampling import student

__all__ = ["adaptive_sharpness_average", "adaptive_sharpness_worst"]


@outside_inference_mode
@exclusive
def adaptive_sharpness_average(
    objective: Objective,
    rho: float,
    *,
    norm: str = "l2",
    adaptive: bool = True,
    draws: int = 20,
    seed: int = 0,
) -> Measure:
    """E_B E_d [L_B(w + d) - L_B(w)], with d_i ~ N(0, (rho c_i)²), or for "linf" uniform in +-rho c_i.

    c_i = |w_i|, or 1 without ``adaptive``: the average-case sharpness of Andriushchenko, Croce, Müller, Hein and
    Flammarion, "A Modern Look at the Relationship between Sharpness and Generalization", ICML 2023, with their 20
    draws. rho is by coordinate, without a factor 1 / sqrt(P). Every selected parameter is perturbed, biases and
    normalisation layers' too; every batch has draws of its own. `normalize_logits(objective, "norm")` for their
    normalised logits.

    stderr: of the mean over draws, widened for few. Units of the loss. Cost: draws + 1 forward passes. For small rho it
    is (rho²/2) sum_i c_i² H_ii, for "linf" a third of that; in float32 a rise below 1e-7 of the loss is rounding.
    Invariant to scaling neurons, and whatever multiplies parameters one by one, if ``adaptive``, else to rotations of
    the parameters ("l2"). Not invariant to: the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    rho, norm = check_positive("rho", rho, 0.1), _checked_norm(norm)
    count, seed = check_count("draws", draws, 1), check_seed(seed)
    w = flat_parameters(objective)
    scale = w.abs() if adaptive else torch.ones_like(w)
    loss, total = Errors(objective, "loss"), torch.zeros(count, dtype=torch.float64)
    with plain_torch(objective.layout.device), torch.no_grad():
        for batch in objective.batches():

            def rows(number: int = batch.index) -> Iterator[Tensor]:
                yield w
                for draw in range(count):
                    generator = noise_generator(seed, number * count + draw, w.device)
                    yield w + rho * scale * _noise(w, norm, generator)

            base, *rises = (value for value, _ in evaluate_rows(objective, loss, batch, rows()))
            total += torch.tensor(rises, dtype=torch.float64) - base
    ball = "N(0, (rho c)²)" if norm == "l2" else "U(-rho c, rho c)"
    return Measure(
        value=float(total.mean()),
        stderr=student(count) * float(total.std()) / math.sqrt(count) if count > 1 else math.nan,
        by_layer=None,
        definition=f"E_B E_d [L_B(w + d) - L_B(w)], d ~ {ball}, c = {'|w|' if adaptive else '1'}",
        matvecs=0,
        name="adaptive sharpness, average" if adaptive else "sharpness, average",
        passes=count + 1,
        method=f"{count} draws",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=finite_status(total, "adaptive_sharpness_average", "loss", "take smaller rho"),
        details={"rho": rho, "norm": norm},
    )


@outside_inference_mode
@exclusive
def adaptive_sharpness_worst(
    objective: Objective, rho: float, *, norm: str = "l2", adaptive: bool = True, steps: int = 20
) -> Measure:
    """E_B max_{|d / c|_p <= rho} [L_B(w + d) - L_B(w)], p = 2 or infinity, the maximum as Auto-PGD finds it.

    c_i = |w_i|, or 1 without ``adaptive``: the worst-case sharpness of Andriushchenko, Croce, Müller, Hein and
    Flammarion, ICML 2023, who take 8 batches of 128 training images and 20 steps. B are the objective's batches, each
    with a maximum of its own, so the value depends on how the data are cut. Every selected parameter moves.

    A lower bound of the maximum: the best point seen, 0 at least. stderr is nan, as nothing tells how far the maximum
    is. Units of the loss. Cost: steps + 1 gradients of the data. For small rho: rho |c * grad L_B| (for "linf" its sum
    of absolute values), where that is zero (rho²/2) lambda_max(diag(c) H diag(c)) for "l2".
    Invariant as the average is. Not invariant to: the temperature of the logits, the batches.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    rho, norm, steps = check_positive("rho", rho, 0.1), _checked_norm(norm), check_count("steps", steps, 1)
    w = flat_parameters(objective)
    scale = w.abs() if adaptive else None
    with plain_torch(objective.layout.device):
        rises = {
            batch.index: (batch.weight, auto_pgd(objective, batch, w, scale, rho, norm, steps))
            for batch in objective.batches()
        }
    return Measure(
        value=math.fsum(weight * rise for weight, rise in rises.values()),
        stderr=math.nan,
        by_layer=None,
        definition=f"E_B max_d [L_B(w + d) - L_B(w)], |d / c|_{norm[1:]} <= rho, c = {'|w|' if adaptive else '1'}",
        matvecs=0,
        name="adaptive sharpness, worst" if adaptive else "sharpness, worst",
        passes=steps + 1,
        method=f"Auto-PGD, {steps} steps",
        seconds=time.perf_counter() - began,
        details={"rho": rho, "norm": norm, "by_batch": [rise for _, rise in rises.values()]},
    )


def _noise(like: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "generator": generator}
    if norm == "l2":
        return torch.randn(like.shape, **options)
    return 2 * torch.rand(like.shape, **options) - 1


def _checked_norm(norm: str) -> str:
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm: expected 'l2' or 'linf', got {norm!r}")
    return norm

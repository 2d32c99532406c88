"""The loss seen through a Gaussian filter."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from flatcore.environment import exclusive
from flatcore.evaluate import plain_torch
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.ascent import flat_parameters
from flatcore.measures.derived import check_objective
from flatcore.measures.modes import outside_inference_mode
from flatcore.measures.noise import noise_generator
from flatcore.measures.perturbed import Errors, evaluate_rows, finite_status
from flatcore.measures.result import Measure
from flatcore.objective import Objective
from flatcore.sampling import student

__all__ = ["lpf"]


@outside_inference_mode
@exclusive
def lpf(objective: Objective, sigma: float = 0.01, *, draws: int = 100, seed: int = 0) -> Measure:
    """E L(w + d), d ~ N(0, sigma² I): the loss after a low-pass filter, not its rise (``details["loss"]`` is L(w)).

    Bisla, Wang and Choromanska, "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning Optimization
    Landscape", AISTATS 2022, with their sigma and draws. Their comparison of nets first brings each filter to
    norm one, which this does not: give such a model.

    stderr: of the mean over draws, widened for few. Units of the loss. Cost: draws + 1 forward passes. For small sigma
    L + (sigma²/2) Tr H, exactly so for a quadratic loss. Invariant to rotations of the parameters. Not invariant to:
    scaling neurons or layers, the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    sigma, count, seed = (
        check_positive("sigma", sigma, 0.01),
        check_count("draws", draws, 1),
        check_seed(seed),
    )
    w = flat_parameters(objective)
    total = torch.zeros(count, dtype=torch.float64)

    def rows() -> Iterator[Tensor]:
        for draw in range(count):
            generator = noise_generator(seed, draw, w.device)
            yield w + sigma * torch.randn(w.shape, dtype=w.dtype, device=w.device, generator=generator)

    with plain_torch(objective.layout.device), torch.no_grad():
        for batch in objective.batches():
            values = evaluate_rows(objective, Errors(objective, "loss"), batch, rows())
            total += torch.tensor([value for value, _ in values], dtype=torch.float64)
    return Measure(
        value=float(total.mean()),
        stderr=student(count) * float(total.std()) / math.sqrt(count) if count > 1 else math.nan,
        by_layer=None,
        definition="E L(w + d), d ~ N(0, sigma² I)",
        matvecs=0,
        name="LPF",
        passes=count + 1,
        method=f"{count} draws",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=finite_status(total, "lpf", "loss", "take smaller sigma"),
        details={"sigma": sigma, "loss": objective.loss()},
    )

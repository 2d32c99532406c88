"""The rise of the loss after one step of SAM, or of its adaptive form."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from flatcore.environment import exclusive
from flatcore.evaluate import plain_torch
from flatcore.linear import check_positive
from flatcore.measures.ascent import batch_gradient, flat_parameters
from flatcore.measures.derived import check_objective
from flatcore.measures.perturbed import Errors, evaluate_rows, finite_status
from flatcore.measures.result import Measure
from flatcore.objective import Objective, WeightedBatch

__all__ = ["asam_sharpness", "sam_sharpness"]


def sam_sharpness(objective: Objective, rho: float = 0.05, *, by_batch: bool = False) -> Measure:
    """L(w + e) - L(w) after the step e = rho g / |g|, g = grad L.

    Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization", ICLR 2021: one step towards max over
    |e|_2 <= rho, which `adaptive_sharpness_worst(objective, rho, adaptive=False)` pursues further. ``by_batch``: the
    mean over the objective's batches, each with a step of its own (their m-sharpness), which is larger.

    Units of the loss. Cost: a gradient and a forward pass. For small rho rho |g| + (rho²/2) gᵀ H g / |g|²; 0 at a
    critical point, where g shows no direction (the maximum there is (rho²/2) lambda_max). Invariant to rotations of the
    parameters. Not invariant to: scaling neurons or layers, the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    return _one_step(objective, check_positive("rho", rho, 0.05), None, by_batch)


def asam_sharpness(
    objective: Objective, rho: float = 0.5, *, eta: float = 0.01, by_batch: bool = False
) -> Measure:
    """L(w + e) - L(w) after the step e = rho T² g / |T g|, g = grad L, T = |w| + eta for weights and 1 else.

    Kwon, Kim, Park and Choi, "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021: one step towards max over
    |T⁻¹ e|_2 <= rho. As in the authors' code, what has "weight" in its name is a weight, gains of normalisation layers
    too. ``by_batch``: the mean over the objective's batches, each with a step of its own.

    Units of the loss. Cost: a gradient and a forward pass. For small rho rho |T g|. Invariant, for eta = 0 and without
    biases, to scaling neurons; eta breaks that for small weights. Not invariant to: the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    rho = check_positive("rho", rho, 0.5)
    if not (isinstance(eta, int | float) and eta >= 0 and math.isfinite(eta)):
        raise ValueError(f"eta: expected a finite number that is not negative, got {eta!r}")
    return _one_step(objective, rho, float(eta), by_batch)


@exclusive
def _one_step(objective: Objective, rho: float, eta: float | None, by_batch: bool) -> Measure:
    began = time.perf_counter()
    objective = check_objective(objective)
    w = flat_parameters(objective)
    T = None if eta is None else _scales(objective, eta)
    rises: list[float] = []
    with plain_torch(objective.layout.device):
        if by_batch:
            for batch in objective.batches():
                base, g = batch_gradient(objective, batch, w)
                rises.append(_weighted(objective, batch, w + _step(g, T, rho)) - batch.weight * base)
        else:
            total, g = 0.0, torch.zeros_like(w)
            for batch in objective.batches():
                base, part = batch_gradient(objective, batch, w)
                total += batch.weight * base
                g.add_(part, alpha=batch.weight)
            there = w + _step(g, T, rho)
            rises = [_weighted(objective, batch, there) for batch in objective.batches()] + [-total]
    value, name = math.fsum(rises), "sam_sharpness" if eta is None else "asam_sharpness"
    step = "rho g / |g|" if eta is None else "rho T² g / |T g|, T = |w| + eta for weights, 1 else"
    return Measure(
        value=value,
        stderr=0.0,
        by_layer=None,
        definition=f"{'E_B [L_B(w + e) - L_B(w)]' if by_batch else 'L(w + e) - L(w)'}, e = {step}",
        matvecs=0,
        name="SAM sharpness" if eta is None else "ASAM sharpness",
        passes=2,
        method="one step",
        seconds=time.perf_counter() - began,
        status=finite_status(torch.tensor([value]), name, "loss after the step", "take smaller rho"),
        details={"rho": rho},
    )


def _scales(objective: Objective, eta: float) -> Tensor:
    parts = objective.snapshot().values.items()
    return torch.cat([(p.abs() + eta if "weight" in n else torch.ones_like(p)).reshape(-1) for n, p in parts])


def _step(g: Tensor, T: Tensor | None, rho: float) -> Tensor:
    scaled = g if T is None else T * g
    length = scaled.norm()
    if not length > 0:
        return torch.zeros_like(g)
    step: Tensor = rho * (scaled if T is None else T * scaled) / length
    return step


def _weighted(objective: Objective, batch: WeightedBatch, row: Tensor) -> float:
    with torch.no_grad():
        ((value, _),) = evaluate_rows(objective, Errors(objective, "loss"), batch, iter([row]))
    return value

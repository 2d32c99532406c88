"""Local energy: how the training error rises when the parameters are perturbed at random."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flatcore.environment import exclusive
from flatcore.evaluate import plain_torch
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.modes import outside_inference_mode
from flatcore.measures.noise import noise_generator
from flatcore.measures.perturbed import ErrorRule, Errors, evaluate_rows, finite_status
from flatcore.measures.result import Measure
from flatcore.objective import Objective

__all__ = ["local_energy"]

_SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


@outside_inference_mode
@exclusive
def local_energy(
    objective: Objective,
    sigma: float | Sequence[float] = _SIGMAS,
    error: ErrorRule | Literal["loss"] | None = None,
    draws: int = 50,
    seed: int = 0,
    noise: Literal["multiplicative", "additive"] = "multiplicative",
    antithetic: bool = True,
) -> Measure:
    """delta E(w, sigma) = E_z E(w + sigma z * w) - E(w), z ~ N(0, I) elementwise: a curve over sigma.

    Source: Pittorino, Lucibello, Feinauer, Perugini, Baldassi, Demyanenko and Zecchina, "Entropic gradient descent
    algorithms and wide flat minima", ICLR 2021; E is the fraction of errors on the training data. noise "additive" is
    E(w + sigma z), which their script takes by default.

    error: None counts an example as wrong where another class has the largest score (for cross-entropies; ignored
        targets do not count); "loss" is the objective itself; or a callable(output, target) giving one number an
        example.
    sigma: one or several, positive, without unit for multiplicative noise, in the parameters' unit for additive.
    draws: samples of z, the same ones for every sigma, so that the points of the curve are correlated and the curve
        smooth. With ``antithetic`` each draw is the mean over z and -z, whose first-order terms cancel, and costs two
        passes. All selected parameters are perturbed, biases and normalisation layers' too; buffers stay.

    ``value`` (S,) and ``stderr`` (S,), float64: the mean over draws and its standard error (nan for one draw,
    0 where no draw changed an error).
    ``details``: ``sigma``, ``base`` = E(w), ``samples`` (S, draws), ``error``. Units of E. Cost: draws * (2 with
    antithetic) * S forward passes, several at a time where that is faster, which changes the last digits at most.

    Invariant to rescaling neurons (and anything that multiplies parameters elementwise) for multiplicative noise: the
    same seed gives the same numbers up to rounding. Additive noise is not. For the loss and small sigma it is
    (sigma²/2) sum_i H_ii w_i² + O(sigma⁴), additive (sigma²/2) Tr H, exactly so for a quadratic loss. Not invariant,
    with "loss", to the scale of the logits. Raises ValueError or TypeError for bad arguments, and for error=None
    where the loss is no cross-entropy.
    """
    began = time.perf_counter()
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected a flatcore.Objective, got {type(objective).__name__}")
    sigmas = _checked_sigmas(sigma)
    draws, seed = check_count("draws", draws, 1), check_seed(seed)
    if noise not in ("multiplicative", "additive"):
        raise ValueError(f"noise: expected 'multiplicative' or 'additive', got {noise!r}")
    errors = Errors(objective, error)
    values = objective.snapshot().values
    w = torch.cat([v.reshape(-1) for v in values.values()])
    signs = (1, -1) if antithetic else (1,)
    sums = torch.zeros(len(sigmas), draws, len(signs), dtype=torch.float64)
    base = count = 0.0
    with plain_torch(objective.layout.device), torch.no_grad():
        for batch in objective.batches():
            rows = _rows(w, sigmas, draws, signs, seed, noise)
            results = evaluate_rows(objective, errors, batch, rows)
            for place in range(sums.numel()):
                total, number = next(results)
                # Rows come draw by draw, so that z is made once.
                draw, rest = divmod(place, len(sigmas) * len(signs))
                sums[rest // len(signs), draw, rest % len(signs)] += total
            here, number = next(evaluate_rows(objective, errors, batch, iter([w])))
            base, count = base + here, count + number
    count = count or 1.0
    samples = sums.mean(dim=2) / count - base / count
    stderr = samples.std(dim=1) / math.sqrt(draws) if draws > 1 else torch.full_like(samples[:, 0], math.nan)
    status = finite_status(samples, "local_energy", errors.name, "take smaller sigma")
    how = "w + sigma z * w" if noise == "multiplicative" else "w + sigma z"
    return Measure(
        value=samples.mean(dim=1),
        stderr=stderr,
        by_layer=None,
        definition=f"E_z E({how}) - E(w), E the {errors.name} on the objective's data, z standard normal",
        matvecs=0,
        name="local energy",
        passes=sums.numel() + 1,
        method=f"{noise} noise, {draws} {'antithetic pairs' if antithetic else 'draws'}",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=status,
        details={
            "sigma": torch.tensor(sigmas, dtype=torch.float64),
            "base": base / count,
            "samples": samples,
            "error": errors.name,
        },
    )


def _checked_sigmas(sigma: Any) -> list[float]:
    if isinstance(sigma, Tensor):
        sigma = sigma.tolist()
    try:
        given = [sigma] if not hasattr(sigma, "__iter__") else list(sigma)
    except TypeError:
        given = []
    if not given or isinstance(sigma, str):
        raise ValueError(f"sigma: expected a positive number or several, got {sigma!r}; give e.g. (0.1, 0.2)")
    return [check_positive("sigma", s, 0.1) for s in given]


def _rows(
    w: Tensor, sigmas: list[float], draws: int, signs: tuple[int, ...], seed: int, noise: str
) -> Iterator[Tensor]:
    for draw in range(draws):
        generator = noise_generator(seed, draw, w.device)
        z = torch.randn(w.shape, dtype=w.dtype, device=w.device, generator=generator)
        direction = z * w if noise == "multiplicative" else z
        for sigma in sigmas:
            for sign in signs:
                yield torch.add(w, direction, alpha=sign * sigma)

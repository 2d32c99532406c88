"""The largest Gaussian noise that costs no more than a tenth of the accuracy, and PAC-Bayes numbers made of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flatcore.environment import exclusive
from flatcore.errors import warn
from flatcore.evaluate import plain_torch
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.ascent import flat_parameters
from flatcore.measures.derived import check_objective
from flatcore.measures.layers import layers_if_any
from flatcore.measures.noise import noise_generator
from flatcore.measures.perturbed import ErrorRule, Errors, evaluate_rows
from flatcore.measures.result import Measure
from flatcore.objective import Objective

__all__ = ["pac_bayes_sigma"]

_MAGNITUDE_FLOOR = 1e-3


@exclusive
def pac_bayes_sigma(
    objective: Objective,
    *,
    drop: float = 0.1,
    magnitude: bool = False,
    error: ErrorRule | None = None,
    draws: int = 10,
    steps: int = 15,
    tolerance: float = 0.01,
    largest: float = 2.0,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Measure:
    """The standard deviation sigma of noise u for which |E accuracy(w + u) - accuracy(w)| is ``drop``.

    Jiang, Neyshabur, Mobahi, Krishnan and Bengio, "Fantastic Generalization Measures and Where to Find Them", ICLR
    2020, after Neyshabur et al., NIPS 2017, in the form of Dziugaite et al., NeurIPS 2020: bisection of [0, largest],
    up to ``steps`` halvings, until the change of accuracy is within ``tolerance`` of drop. u ~ N(0, sigma²) for every
    selected parameter, or N(0, sigma² w² + 0.001²) with ``magnitude``; the same draws serve every sigma.

    sigma is a standard deviation. The widely copied implementation passes sigma² to `torch.normal`, which takes
    standard deviations: its sigma is the square root of this one (with magnitude there is no such relation).

    error: of an example, as in `local_energy`; None: another class than the target has the largest score.
    initial: parameters before training, by name, for the bounds that measure the distance from them.

    ``details``: "flatness" 1 / sigma²; "bound", sqrt((|W|² / (4 sigma²) + ln(n / sigma) + 10) / n) over n examples, W
    the selected weights of linear layers and convolutions, where there are any; "bound_initial", with |W - W_0|² for
    |W|², where ``initial`` is given; without ``magnitude``, for which these bounds are not meant. "change": the change
    of accuracy at sigma.
    stderr: nan, as sigma is where a search ended. Where ``largest`` changes less, that is sigma, with a
    FlatcoreWarning.

    Cost: draws * steps + 1 forward passes at most. Invariant to scaling neurons with magnitude, up to its floor
    0.001; to rotations of the parameters without. Invariant to the temperature of the logits as far as the accuracy
    is: multiplying the last layer's weights changes sigma without magnitude. Batch normalisation stays as it is
    (published values fold it into the weights first).
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    drop, tolerance = check_positive("drop", drop, 0.1), check_positive("tolerance", tolerance, 0.01)
    upper, lower = check_positive("largest", largest, 2.0), 0.0
    count, steps, seed = check_count("draws", draws, 1), check_count("steps", steps, 1), check_seed(seed)
    if isinstance(error, str):
        raise ValueError(f"error: expected None or a callable that tells errors, got {error!r}; leave it out")
    errors = Errors(objective, error)
    w = flat_parameters(objective)

    def mean_error(sigma: float) -> float:
        def rows() -> Iterator[Tensor]:
            spread = (sigma**2 * w.square() + _MAGNITUDE_FLOOR**2).sqrt() if magnitude else sigma
            for draw in range(count if sigma else 1):
                generator = noise_generator(seed, draw, w.device)
                noise = torch.randn(w.shape, dtype=w.dtype, device=w.device, generator=generator)
                yield w + spread * noise if sigma else w

        wrong = examples = 0.0
        for batch in objective.batches():
            for total, number in evaluate_rows(objective, errors, batch, rows()):
                wrong, examples = wrong + total, examples + number
        return wrong / examples

    with plain_torch(objective.layout.device), torch.no_grad():
        base, sigma, change, tried = mean_error(0.0), upper, math.nan, 0
        for tried in range(1, steps + 1):  # noqa: B007
            sigma = (lower + upper) / 2
            change = abs(mean_error(sigma) - base)
            if abs(change - drop) < tolerance:
                break
            if change > drop:
                upper = sigma
            else:
                lower = sigma
    status = "converged"
    if not abs(change - drop) < tolerance:
        status = f"the accuracy changes by {change:.3g} at sigma = {sigma:.3g}, not by {drop:g}; raise largest or steps"
        warn(f"pac_bayes_sigma: {status}")
    details: dict[str, float] = {"flatness": 1 / sigma**2, "change": change}
    weights = [layer.weight for layer in layers_if_any(objective)]
    if weights and not magnitude:
        n = objective.examples
        details["bound"] = _bound(objective, weights, None, sigma, n)
        if initial is not None:
            details["bound_initial"] = _bound(objective, weights, initial, sigma, n)
    noise = "N(0, sigma² w² + 0.001²)" if magnitude else "N(0, sigma²)"
    return Measure(
        value=sigma,
        stderr=math.nan,
        by_layer=None,
        definition=f"sigma with |E accuracy(w + u) - accuracy(w)| = {drop:g}, u ~ {noise}",
        matvecs=0,
        name="PAC-Bayes sigma",
        passes=count * tried + 1,
        method=f"bisection, {count} draws",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=status,
        details=details,
    )


def _bound(
    objective: Objective, weights: list[str], initial: Mapping[str, Tensor] | None, sigma: float, n: int
) -> float:
    values, square = objective.snapshot().values, 0.0
    for name in weights:
        w = values[name].double()
        if initial is not None:
            if name not in initial or initial[name].shape != w.shape:
                raise ValueError(
                    f"initial: expected a tensor of shape {tuple(w.shape)} for {name!r}, got "
                    f"{tuple(initial[name].shape) if name in initial else 'none'}"
                )
            w = w - initial[name].detach().to(w)
        square += float(w.square().sum())
    return math.sqrt((square / (4 * sigma**2) + math.log(n / sigma) + 10) / n)

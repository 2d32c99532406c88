"""Every measure by name, with arguments that suit most nets and one line that says what it means."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flatcore.measures import spectrum
from flatcore.measures.adaptive_sharpness import adaptive_sharpness_average, adaptive_sharpness_worst
from flatcore.measures.fisher_rao import fisher_rao
from flatcore.measures.generalization_gap import generalization_gap
from flatcore.measures.layer_scales import minimum_sharpness, quotient_sharpness
from flatcore.measures.local_energy import local_energy
from flatcore.measures.local_entropy import local_entropy
from flatcore.measures.lpf import lpf
from flatcore.measures.normalized_sharpness import normalized_sharpness
from flatcore.measures.pac_bayes import pac_bayes_sigma
from flatcore.measures.path_norm import path_norm
from flatcore.measures.relative_flatness import relative_flatness
from flatcore.measures.result import Measure
from flatcore.measures.sam import asam_sharpness, sam_sharpness
from flatcore.measures.soft_rank import soft_rank
from flatcore.measures.width import width
from flatcore.objective import Objective

__all__ = ["CATALOGUE", "Entry", "by_name", "chosen"]

_RTOL = 0.05
_DAMPING = 1e-3
_CHEAP = 256  # products, half of what a report's density takes


@dataclass(frozen=True)
class Entry:
    """``call(objective, seed)`` gives the measure. ``cheap``: at most some hundred products."""

    label: str
    meaning: str
    call: Callable[[Objective, int], Measure]
    cheap: bool = False


def _last_layer(objective: Objective, seed: int) -> Measure:
    """The last layer's, which the papers take; ``by_layer`` has all."""
    found = relative_flatness(objective, rtol=_RTOL, max_matvecs=_CHEAP, seed=seed)
    last = list((found.by_layer or {}).values())[-1]
    return replace(found, value=last.value, stderr=last.stderr)


def _local_energy(objective: Objective, seed: int) -> Measure:
    """At the largest sigma; the curve stands in the details."""
    found = local_energy(objective, draws=20, seed=seed)
    curve = {"curve": found.value, "curve_stderr": found.stderr}
    last, error = float(found.value[-1]), float(found.stderr[-1])
    return replace(found, value=last, stderr=error, details={**found.details, **curve})


CATALOGUE: dict[str, Entry] = {
    "normalized_sharpness": Entry(
        "normalized sharpness",
        "curvature of each weight against the weight, at the best scales; blind to the scale of neurons",
        lambda o, seed: normalized_sharpness(o, curvature="ggn", rtol=_RTOL, max_matvecs=_CHEAP, seed=seed),
        cheap=True,
    ),
    "relative_flatness": Entry(
        "relative flatness, last layer",
        "how much the loss minds changes of the last layer's input features",
        _last_layer,
        cheap=True,
    ),
    "fisher_rao": Entry(
        "Fisher-Rao norm",
        "squared length of the parameters in the Fisher metric; blind to the scale of neurons",
        lambda o, seed: fisher_rao(o),
        cheap=True,
    ),
    "width": Entry(
        "width",
        "deep linear nets: largest eigenvalue over the least that any net with the same map has",
        lambda o, seed: width(o),
        cheap=True,
    ),
    "trace": Entry(
        "trace",
        "sum of all eigenvalues of H",
        lambda o, seed: spectrum.trace(o, rtol=_RTOL, seed=seed),
    ),
    "lambda_max": Entry(
        "largest eigenvalue",
        "steepest curvature of the loss",
        lambda o, seed: spectrum.lambda_max(o, seed=seed),
    ),
    "condition_number": Entry(
        "condition number",
        "largest over smallest eigenvalue of H",
        lambda o, seed: spectrum.condition_number(o, seed=seed),
    ),
    "effective_dimension": Entry(
        "effective dimension, z = 0.001",
        "directions with a curvature above z, softly counted, of the Gauss-Newton matrix",
        lambda o, seed: spectrum.effective_dimension(o, _DAMPING, rtol=_RTOL, seed=seed),
    ),
    "log_volume": Entry(
        "log volume, epsilon = damping = 0.001",
        "logarithm of the volume in which the loss rises by less than epsilon",
        lambda o, seed: spectrum.log_volume(o, _DAMPING, _DAMPING, rtol=_RTOL, seed=seed),
    ),
    "participation_ratio": Entry(
        "participation ratio",
        "how many eigenvalues carry the trace of H",
        lambda o, seed: spectrum.participation_ratio(o, rtol=_RTOL, seed=seed),
    ),
    "soft_rank": Entry(
        "soft rank, damping 0.001",
        "directions that the data determine against this weight decay",
        lambda o, seed: soft_rank(o, _DAMPING, rtol=_RTOL, seed=seed),
    ),
    "generalization_gap": Entry(
        "generalisation gap, damping 0.001",
        "Takeuchi's estimate of test loss minus training loss, from the training gradients",
        lambda o, seed: generalization_gap(o, _DAMPING, seed=seed),
    ),
    "quotient_sharpness": Entry(
        "quotient sharpness",
        "largest eigenvalue in units of each layer's norm; blind to the scale of layers",
        lambda o, seed: quotient_sharpness(o, seed=seed),
    ),
    "minimum_sharpness": Entry(
        "minimum sharpness",
        "least trace of the Gauss-Newton matrix, which rounding and noise leave positive, over all scalings of layers",
        lambda o, seed: minimum_sharpness(o, curvature="ggn", rtol=_RTOL, seed=seed),
    ),
    "adaptive_sharpness_average": Entry(
        "average adaptive sharpness, rho = 0.1",
        "mean rise of the loss under noise of a tenth of each weight",
        lambda o, seed: adaptive_sharpness_average(o, 0.1, seed=seed),
    ),
    "adaptive_sharpness_worst": Entry(
        "worst adaptive sharpness, rho = 0.1",
        "greatest rise of the loss within a ball measured in units of each weight",
        lambda o, seed: adaptive_sharpness_worst(o, 0.1),
    ),
    "sam_sharpness": Entry(
        "SAM sharpness, rho = 0.05",
        "rise of the loss after the step that SAM takes",
        lambda o, seed: sam_sharpness(o),
    ),
    "asam_sharpness": Entry(
        "ASAM sharpness, rho = 0.5",
        "rise of the loss after the step that ASAM takes",
        lambda o, seed: asam_sharpness(o),
    ),
    "lpf": Entry(
        "LPF, sigma = 0.01",
        "mean loss under Gaussian noise on all parameters",
        lambda o, seed: lpf(o, seed=seed),
    ),
    "pac_bayes_sigma": Entry(
        "PAC-Bayes sigma",
        "noise that costs a tenth of the accuracy: larger is flatter",
        lambda o, seed: pac_bayes_sigma(o, seed=seed),
    ),
    "path_norm": Entry(
        "path norm",
        "sum over all paths of the products of squared weights; blind to the scale of neurons",
        lambda o, seed: path_norm(o),
    ),
    "local_energy": Entry(
        "local energy, sigma = 0.5",
        "rise of the share of training errors under noise of sigma times each weight",
        _local_energy,
    ),
    "local_entropy": Entry(
        "local entropy, gamma = 1, beta = 1000",
        "free energy of the loss in a Gaussian neighbourhood, less the loss",
        lambda o, seed: local_entropy(o, 1.0, 1000.0, seed=seed),
    ),
}


def chosen(argument: str, names: Any) -> list[str]:
    """Names of the catalogue: those of an iterable, or of one string, "all", "cheap" or "none". Raises ValueError."""
    if isinstance(names, str):
        if names == "none":
            return []
        if names in ("all", "cheap"):
            return [name for name, entry in CATALOGUE.items() if entry.cheap or names == "all"]
        names = [names]
    if not isinstance(names, Iterable):
        raise TypeError(
            f'{argument}: expected "all", "cheap", "none" or names of measures, got {type(names).__name__}'
        )
    found = list(names)
    for name in found:
        if not (isinstance(name, str) and name in CATALOGUE):
            near = difflib.get_close_matches(str(name), CATALOGUE, n=1)
            if name == "edge_of_stability":
                raise ValueError(
                    f"{argument}: edge_of_stability needs a step size; call it, or track with an optimizer"
                )
            advice = f"did you mean {near[0]!r}?" if near else f"the measures are {', '.join(CATALOGUE)}"
            raise ValueError(f"{argument}: {name!r} is no measure by name; {advice}")
    return list(dict.fromkeys(found))


def by_name(measures: Any, seed: int) -> dict[str, Callable[[Objective], Any]]:
    """name -> function of the objective, from names, functions of it, or a mapping to such functions."""
    if isinstance(measures, Mapping):
        found = dict(measures)
    else:
        given = [measures] if isinstance(measures, str) or callable(measures) else measures
        if not isinstance(given, Iterable):
            raise TypeError(f"measures: expected names or functions, got {type(measures).__name__}")
        found = {m if isinstance(m, str) else getattr(m, "__name__", ""): m for m in given}
    functions: dict[str, Callable[[Objective], Any]] = {}
    for name, function in found.items():
        if isinstance(function, str):
            for key in chosen("measures", function):
                functions[key] = partial(_from_catalogue, key, seed)
        elif not callable(function):
            raise TypeError(f"measures: expected names or functions, got {type(function).__name__}")
        elif not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f'measures: expected a function with a name, got {name!r}; give {{"name": function}}'
            )
        else:
            functions[name] = _of_objective_alone(name, function)
    return functions


def _from_catalogue(name: str, seed: int, objective: Objective) -> Any:
    return CATALOGUE[name].call(objective, seed)


def _of_objective_alone(name: str, function: Callable[..., Any]) -> Callable[[Objective], Any]:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise TypeError(
            f"measures: expected {name} to take the objective alone; give a function that fills in the rest"
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    return function

"""Relative flatness: the curvature of a layer against its weights, for changes of its input features."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

from torch import Tensor

from flatcore.environment import full_precision
from flatcore.errors import warn
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.derived import check_objective, restricted
from flatcore.measures.example_flatness import by_example
from flatcore.measures.features import deviations, in_order_of_use
from flatcore.measures.flatness_values import Found, exact, greatest, probed, quadratic_forms
from flatcore.measures.last_layer import LastLayer
from flatcore.measures.layers import Layer, find_layer, find_layers
from flatcore.measures.modes import outside_inference_mode
from flatcore.measures.neurons import Neurons
from flatcore.measures.result import Measure
from flatcore.objective import Objective
from flatcore.operators import Hessian

__all__ = ["relative_flatness"]

_FORMS = {
    "2021": "sum_ss' <w_s, w_s'> Tr H_ss'",
    "max": "sum_s |w_s|² lambda_max(H_ss)",
    "simplified": "|W|_F² Tr H_l",
    "2019": "|W|_F² Tr H_l / number of weights",
    "2019-max": "|W|_F² lambda_max(H_l)",
}
_METHODS = ("auto", "closed", "exact", "examples", "probes")
_EXACT_AT_ONCE = 64  # quadratic forms up to which "auto" does not estimate
_EXACT_AT_MOST = 4096  # up to which it may change over to "exact"
_MAX_MATVECS = 2000


@outside_inference_mode
def relative_flatness(
    objective: Objective,
    layer: str = "all",
    *,
    standardize: bool = True,
    form: str = "2021",
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    seed: int = 0,
) -> Measure:
    """kappa = sum_ss' <w_s, w_s'> Tr H_ss', w_s the rows of a layer's weight, H_ss' the blocks of the loss's Hessian.

    Petzka, Kamp, Adilova, Sminchisescu and Boley, "Relative Flatness and Generalization", NeurIPS 2021 (arXiv
    2001.00939). H_ss' holds d²L / dw_s dw_s', inputs by inputs. It is the second derivative of the loss along W A,
    averaged over A with independent entries of variance 1, so for random orthogonal O
    E L(phi + d O phi) - L(phi) = d² kappa / (2 inputs) + O(d³): how much the loss minds features that move.

    Args:
        layer: module path of a linear layer or convolution; the papers take the last linear one. "all": each by
            itself, in ``by_layer``, in the order in which the model calls them; the value is then their sum, which no
            paper defines.
        standardize: in features divided by their standard deviation over the data, and weights multiplied by it, as
            the authors' experiments do. A deviation of 0 (to rounding) multiplies and does not divide.
        form: "2021", as above; "max", sum_s |w_s|² lambda_max(H_ss), of the same paper; "simplified", |W|² Tr H_l
            (Adilova et al., TAG-ML at ICML 2023, arXiv 2307.02337); "2019", |W|² Tr H_l over the number of weights, and
            "2019-max", |W|² lambda_max(H_l) (Petzka et al., arXiv 1912.00058). H_l: the layer's Hessian.
        method: of the first, third and fourth form. "closed": for the last linear layer under a cross-entropy,
            E[|phi|² Var_{s ~ p} w_s], exactly, from one pass forward. "exact": a quadratic form for each weight.
            "examples": means of <W A, H[W A]> over random signs A of each example's own, which leaves little noise,
            where examples do not interact and the model has a program. "probes": A shared by all examples. "auto":
            closed where the layer and the loss are seen to be of that form, else the cheapest of the others.
        rtol, max_matvecs, seed: of the probes ("examples" takes two at least, and "auto" otherwise not). For
            eigenvalues, rtol is the relative residual.

    A convolution is the matrix of its outputs by (inputs · places in the kernel), its features standardised by channel;
    groups are matrices of their own. A weight that stands in several places has the Hessian of all of them.
    No term for weight decay is added, unlike in the authors' code: put a penalty into the loss to have it in H.

    stderr: of the mean over probes; 0 where it is exact; for eigenvalues, the bound from their residuals. Of "all", one
    probe serves all layers: each has signs of its own, and only v_lᵀ (H v)_l counts, in which what other layers add has
    mean 0. rtol holds for the sum then; single layers can be less certain.

    Cost: closed one pass forward; exact one quadratic form (half a product) for each of min(outputs, inputs) · inputs;
    examples one sweep of activations, less than a product, for each probe, few of which are needed; probes a quadratic
    form each, of the layer's weight alone, for "all" a product each. ``matvecs`` counts each of these as one.
    Eigenvalues: products of all neurons' Lanczos recurrences, which advance together (`flatcore.block_spectra`).
    standardize: a pass forward more for layers that are not closed, and for examples a copy of the model.
    L is the mean loss: with a sum over n examples, n times this (for all forms).
    Invariant to (form "2021"): scaling the layer against the one before or behind it; scaling single outputs where the
    next layer undoes it; rotations of the features (unless standardised). Scaling single inputs changes it unless
    standardised. "simplified" and "2019" are invariant to the scale of the layer and to rotations of the features.
    Not invariant to: the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments and where method="closed" does not apply.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    if form not in _FORMS:
        raise ValueError(f"form: expected one of {', '.join(map(repr, _FORMS))}, got {form!r}")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if method != "auto" and form.endswith("max"):
        raise ValueError(
            f"method: form={form!r} takes eigenvalues, for which there is 'auto' alone, got {method!r}"
        )
    rtol, seed = check_positive("rtol", rtol, 0.01), check_seed(seed)
    budget = _MAX_MATVECS if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
    layers = find_layers(objective) if layer == "all" else [find_layer(objective, layer)]
    if method == "closed" and layer == "all":
        raise ValueError("method: 'closed' is for the last layer alone, got layer='all'; name the layer")
    weights = objective.snapshot().values
    layers = in_order_of_use(objective, layers)
    with full_precision():
        closed = _closed(objective, layers[-1], weights, standardize, form, method)
        rest = [one for one in layers if one.path not in closed]
        spread = deviations(objective, rest) if standardize else {}
        if standardize and len(spread) < len(rest):
            silent = [one.path for one in rest if one.path not in spread]
            _tell_silent(silent, layer == "all" and len(layers) > len(silent))
            rest = [one for one in rest if one.path in spread]
            layers = [one for one in layers if one.path not in silent]
        neurons = {one.path: Neurons.of(one, weights[one.weight], spread.get(one.path)) for one in rest}
        found, methods = _found(objective, neurons, form, method, rtol, budget, seed)
    if found.status != "converged":
        warn(f"relative_flatness: {found.status}")
    by_layer = {}
    for one in layers:
        value, stderr = closed[one.path] if one.path in closed else found.values[one.path]
        share = 1 / weights[one.weight].numel() if form == "2019" else 1.0
        kind = "closed" if one.path in closed else methods[one.path]
        by_layer[one.path] = Measure(
            share * value,
            share * stderr,
            None,
            _FORMS[form],
            0,
            name="relative flatness",
            method=kind,
            seed=seed,
        )
    only = next(iter(by_layer.values())) if len(by_layer) == 1 else None
    return Measure(
        value=math.fsum(m.value for m in by_layer.values()),
        stderr=only.stderr if only else _joint(by_layer, found, form),
        by_layer=by_layer,
        definition=_FORMS[form] + (", standardised features" if standardize else ""),
        matvecs=found.matvecs,
        name="relative flatness",
        passes=bool(standardize and rest) + bool(closed),
        method=" and ".join(sorted({m.method for m in by_layer.values()})),
        seed=seed,
        seconds=time.perf_counter() - began,
        status=found.status,
    )


def _tell_silent(paths: list[str], may_go_on: bool) -> None:
    """Of layers whose inputs are not seen, since the model takes their weights without calling them, or not at all."""
    text = f"{paths[0]!r} is not called by the model, so its features are not known; pass standardize=False"
    if not may_go_on:
        raise ValueError(f"layer: expected a layer that the model calls, but {text}")
    others = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    warn(f"relative_flatness: left out: {text}{others}")


def _closed(
    objective: Objective,
    layer: Layer,
    weights: Mapping[str, Tensor],
    standardize: bool,
    form: str,
    method: str,
) -> dict[str, tuple[float, float]]:
    """Of this layer, where the form closes."""
    if form.endswith("max") or method not in ("auto", "closed"):
        return {}
    plain = Neurons.of(layer, weights[layer.weight], None).weight[0]
    found = LastLayer.flatness(objective, layer, plain, standardize=standardize, simplified=form != "2021")
    if found is not None:
        return {layer.path: (found, 0.0)}
    if method == "closed":
        raise ValueError(
            f"method: the closed form is that of a last linear layer under torch's cross_entropy, got {layer.path!r}, "
            "whose outputs are not the loss's logits, or whose weight has other uses; pass method='auto'"
        )
    return {}


def _found(
    objective: Objective,
    neurons: Mapping[str, Neurons],
    form: str,
    method: str,
    rtol: float,
    budget: int,
    seed: int,
) -> tuple[Found, dict[str, str]]:
    """Values of the layers by quadratic forms or eigenvalues, and how each was got."""
    if not neurons:
        return Found({}, 0.0, 0), {}
    forms = quadratic_forms(neurons, form)
    small = method == "auto" and forms <= min(_EXACT_AT_ONCE, budget)
    instead = forms if method == "auto" and forms <= min(_EXACT_AT_MOST, budget) else None
    if method in ("auto", "examples") and not small and not form.endswith("max"):
        sampled = by_example(objective, neurons, form, rtol, budget, seed, instead)
        if isinstance(sampled, Found) and (method == "auto" or len(sampled.values) == len(neurons)):
            own = {path: one for path, one in neurons.items() if path in sampled.values}
            rest = {path: one for path, one in neurons.items() if path not in own}
            left = budget - sampled.matvecs
            shared, methods = _found(objective, rest, form, "probes", rtol, left, seed)
            how = "exact" if sampled.cheaper_exact else "examples"
            return _both(_or_exact(sampled, objective, own, form), shared), methods | dict.fromkeys(own, how)
        if method == "examples":
            reason = sampled if isinstance(sampled, str) else "not of every layer's weight"
            raise ValueError(
                f"method: there are no probes of each example's own: {reason}; pass method='auto'"
            )
    if len(neurons) == 1:  # nothing in front of the layer then needs derivatives
        objective = restricted(objective, [one.layer.weight for one in neurons.values()])
    hessian = Hessian(objective)
    if form.endswith("max"):
        found, how = greatest(hessian, neurons, form, rtol, seed), "lanczos"
    elif method == "exact" or small:
        found, how = exact(hessian, neurons, form), "exact"
    else:
        found = probed(hessian, neurons, form, rtol, budget, seed, instead)
        how = "exact" if found.cheaper_exact else "probes"
    return _or_exact(found, objective, neurons, form), dict.fromkeys(neurons, how)


def _both(one: Found, other: Found) -> Found:
    told = [found.status for found in (one, other) if found.status != "converged"]
    status = " and ".join(told) or "converged"
    stderr = math.hypot(one.stderr, other.stderr)
    return Found(one.values | other.values, stderr, one.matvecs + other.matvecs, status)


def _or_exact(found: Found, objective: Objective, neurons: Mapping[str, Neurons], form: str) -> Found:
    """All quadratic forms where an estimate has shown them to be the cheaper way."""
    if not found.cheaper_exact:
        return found
    if len(neurons) == 1:
        objective = restricted(objective, [one.layer.weight for one in neurons.values()])
    whole = exact(Hessian(objective), neurons, form)
    return dataclasses.replace(whole, matvecs=whole.matvecs + found.matvecs)


def _joint(by_layer: Mapping[str, Measure], found: Found, form: str) -> float:
    """Standard error of the sum. With shares of its own, each layer counts at its own deviation, all as if together."""
    return math.fsum(m.stderr for m in by_layer.values()) if form == "2019" else found.stderr

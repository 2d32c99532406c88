"""Normalized sharpness: the curvature of every weight against the weight itself, at the scales that suit best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flatcore.environment import full_precision
from flatcore.errors import warn
from flatcore.linear import check_count, check_positive
from flatcore.measures.derived import check_objective, normalize_logits
from flatcore.measures.layers import Layer, find_layers
from flatcore.measures.result import Measure
from flatcore.measures.scales import least_over_scales
from flatcore.objective import Objective
from flatcore.operators import GGN, Hessian
from flatcore.results import Estimate
from flatcore.trace import diagonal as diagonal_of

__all__ = ["normalized_sharpness", "normalized_sharpness_bound"]

_DEFINITION = "sum_l min_{r, c > 0} sum_ij [h_ij (r_i c_j)² + W_ij² / (r_i c_j)²], h_ij = d²L / dW_ij²"
_ICML = "sum_l min_{c > 0} sum_i sqrt(sum_j h_ij c_j² · sum_j W_ij² / c_j²), h_ij = d²L / dW_ij²"
_TOLD_ABOVE = 0.01  # the share of clipped mass that is worth a warning


def normalized_sharpness(
    objective: Objective,
    *,
    form: str = "arxiv",
    curvature: str = "hessian",
    normalize: bool = False,
    diagonal: Estimate | Tensor | None = None,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    seed: int = 0,
) -> Measure:
    """Sum over weight matrices W of min over r, c > 0 of sum_ij [h_ij (r_i c_j)² + W_ij² / (r_i c_j)²].

    h_ij = d²L / dW_ij². Tsuzuku, Sato and Sugiyama, "Normalized Flat Minima", ICML 2020 (arXiv 1901.04653). A
    posterior with a variance (r_i c_j)² for every weight costs sharpness and divergence; these are its least sum, up
    to 1/2 (`normalized_sharpness_bound`). The problem is convex and solved to a relative 1e-12.

    Args:
        form: "arxiv", as above; "icml", sum_i sqrt(A_i B_i) with the row scales eliminated: exactly half of it.
            (The two published forms as reimplementations have them; one that sums inside the root is another number.)
        curvature: "hessian", with negative h_ij taken as zero; "ggn", negative by estimation errors only. In a
            net that is linear but for ReLUs and the like, with a convex loss, the two diagonals are one.
        normalize: the logits divided by their standard deviation over classes before the loss (`normalize_logits`).
            Much of the Hessian's diagonal is negative then; the Gauss-Newton matrix counts the division to the model.
        diagonal: of that curvature, (P,), where it is known: a tensor, or what `flatcore.diagonal` gave.
        method, rtol, max_matvecs, seed: of `flatcore.diagonal`, else.

    Layers: linear and convolution, with selected weights (`find_layers`); biases, normalisation and embeddings do not
    count. Of a convolution, one scale per output and per input channel: h and W² are summed over the kernel first,
    and clipped then. Groups are matrices of their own.

    Where a row or column has no curvature or no weight (a dead neuron, a pixel that is always dark) the infimum of
    its terms is 0, and no finite scales attain it; likewise for other patterns of zeros. `by_layer`: path -> Measure,
    whose `details` hold "attained"; "clipped", the share of negative entries in sum |h_ij|; "scales" r_i c_j, like W,
    0 where left out. More than 1 % clipped is told as a FlatcoreWarning.

    stderr: first order, by d value / d h_ij = (r_i c_j)², times sqrt(2): what estimates of different entries
    from the same random signs can have in common is no more. Noise in h lowers a minimum in the second order, and
    clipped noise raises it. 0 for an exact diagonal, nan for one given as a tensor.

    Cost: that of the diagonal, at most P products. L is the mean loss: with a sum over n examples, sqrt(n) times this.
    Invariant to: W -> D_r W D_c with diagonal D, that is scaling a neuron's inputs by c and its outputs by 1/c where
    the net is positively homogeneous, scaling whole layers, and any weights in front of a batch normalisation;
    permutations of neurons. Not invariant to: rotations, the temperature of the logits (but see normalize).
    Raises TypeError or ValueError, one sentence, for bad arguments and where no layer's weight is selected.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    if form not in ("arxiv", "icml"):
        raise ValueError(f"form: expected 'arxiv' or 'icml', got {form!r}")
    if curvature not in ("hessian", "ggn"):
        raise ValueError(f"curvature: expected 'hessian' or 'ggn', got {curvature!r}")
    layers = find_layers(objective)
    if normalize:
        objective = normalize_logits(objective)
    if diagonal is None:
        A = Hessian(objective) if curvature == "hessian" else GGN(objective)
        diagonal = diagonal_of(A, method=method, rtol=rtol, max_matvecs=max_matvecs, seed=seed)
    value, stderr, known = _entries(diagonal, objective)
    factor = 0.5 if form == "icml" else 1.0
    definition = _ICML if form == "icml" else _DEFINITION
    weights = objective.snapshot().values
    with full_precision():
        by_layer = {
            layer.path: _layer(
                layer, weights[layer.weight], value[layer.weight], stderr[layer.weight], factor, definition
            )
            for layer in layers
        }
    mass = sum(m.details["mass"] for m in by_layer.values())
    clipped = sum(m.details["clipped"] * m.details["mass"] for m in by_layer.values()) / mass if mass else 0.0
    status = known.status if known is not None else "converged"
    unconverged = [path for path, m in by_layer.items() if m.status != "converged"]
    if unconverged:
        status = f"the scales of {unconverged[0]!r} have not converged, so the value is an upper bound"
    elif clipped > _TOLD_ABOVE:
        advice = (
            'pass curvature="ggn" for one without' if curvature == "hessian" else "a smaller rtol leaves less"
        )
        told = f"normalized_sharpness: {clipped:.1%} of the diagonal's mass is negative and was taken as zero; {advice}"
        warn(told)
    return Measure(
        value=sum(m.value for m in by_layer.values()),
        stderr=math.sqrt(sum(m.stderr**2 for m in by_layer.values())),
        by_layer=by_layer,
        definition=definition,
        matvecs=known.matvecs if known is not None else 0,
        name="normalized sharpness",
        method=known.method if known is not None else "given diagonal",
        seed=known.seed if known is not None else None,
        seconds=time.perf_counter() - began,
        status=status,
        details={"clipped": clipped, "attained": all(m.details["attained"] for m in by_layer.values())},
    )


def normalized_sharpness_bound(
    loss: float, sharpness: float, examples: int, *, weight: float | None = None, delta: float = 0.05
) -> float:
    """L + w / (2 n) + ln(1 / delta) / w + NS / (2 sqrt(w)): the PAC-Bayes bound behind normalized sharpness.

    For a prior and a posterior with the same variances s² around 0 and the weights, expected sharpness plus divergence
    over w is sum_ij [h_ij s_ij² / 2 + W_ij² / (2 w s_ij²)] to second order; its least value over s_ij = r_i c_j is
    NS / (2 sqrt(w)), with NS in the form "arxiv". ``weight``: w, by default sqrt(n). The term w / (2 n) is that for
    losses which are sub-Gaussian with factor 1 (Germain et al., NIPS 2016).

    A value to compare nets by, not a certificate: the prior's variances come from the data, and the expansion ends.
    Raises ValueError for arguments outside their ranges.
    """
    n = check_count("examples", examples, 1)
    w = check_positive("weight", math.sqrt(n) if weight is None else weight, 100.0)
    if not (isinstance(delta, int | float) and 0 < delta < 1):
        raise ValueError(f"delta: expected a probability between 0 and 1, got {delta!r}")
    if not (sharpness >= 0 and math.isfinite(sharpness)):
        raise ValueError(f"sharpness: expected a finite number that is not negative, got {sharpness}")
    return float(loss) + w / (2 * n) + math.log(1 / delta) / w + float(sharpness) / (2 * math.sqrt(w))


def _entries(
    diagonal: Any, objective: Objective
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Estimate | None]:
    """Entries and their standard errors by parameter, float64."""
    known = diagonal if isinstance(diagonal, Estimate) else None
    value = known.value if known is not None else diagonal
    if not isinstance(value, Tensor) or value.shape != (objective.layout.size,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"diagonal: expected the {objective.layout.size} entries of the selected parameters as a tensor or an "
            f"Estimate of flatcore.diagonal, got {got}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError("diagonal: expected finite entries, got nan or inf")
    stderr = known.stderr if known is not None else torch.full_like(value, math.nan)
    layout = objective.layout
    return (
        layout.split(value.to(layout.device).double()),
        layout.split(stderr.to(layout.device).double()),
        known,
    )


def _layer(
    layer: Layer, weight: Tensor, diagonal: Tensor, stderr: Tensor, factor: float, definition: str
) -> Measure:
    signed = layer.matrices(diagonal).sum(-1)
    h, w = signed.clamp(min=0), layer.matrices(weight.double().square()).sum(-1)
    errors = layer.matrices(stderr.square()).sum(-1)
    parts = [least_over_scales(*group) for group in zip(h, w, strict=True)]
    squares = torch.stack([part.scales for part in parts])
    mass = float(signed.abs().sum())
    spread = math.sqrt(2 * float((squares.square() * errors)[squares > 0].sum()))
    kernel = squares.sqrt().unsqueeze(-1).expand(layer.matrices(weight).shape)
    converged = all(part.converged for part in parts)
    return Measure(
        value=factor * sum(part.value for part in parts),
        stderr=factor * spread,
        by_layer=None,
        definition=definition,
        matvecs=0,
        name="normalized sharpness",
        status="converged" if converged else f"the scales have not converged after {parts[0].sweeps} sweeps",
        details={
            "attained": all(part.attained for part in parts),
            "clipped": float((h - signed).sum()) / mass if mass else 0.0,
            "mass": mass,
            "scales": layer.from_matrices(kernel, weight),
        },
    )

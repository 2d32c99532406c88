"""Measures that no scaling of whole layers changes: quotient sharpness and minimum sharpness."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from flatcore.errors import warn
from flatcore.measures.derived import check_objective
from flatcore.measures.extremes import extremes
from flatcore.measures.features import in_order_of_use
from flatcore.measures.layers import find_layers
from flatcore.measures.result import Measure
from flatcore.measures.scaled_hessian import ScaledHessian
from flatcore.objective import Objective
from flatcore.operators import GGN, Hessian
from flatcore.trace import trace

__all__ = ["minimum_sharpness", "quotient_sharpness"]

_MAX_SWEEPS = 10_000


def quotient_sharpness(objective: Objective, *, tol: float = 1e-3, seed: int = 0) -> Measure:
    """lambda_max(N^1/2 H N^1/2), N = |W_l|_F² on the entries of layer l: curvature at relative changes of layers.

    Rangamani, Nguyen, Kumar, Phan, Chin and Tran, "A Scale Invariant Flatness Measure for Deep Network Minima", ICASSP
    2021 (arXiv 1902.02434). Each selected parameter tensor has its own norm; one whose norm is zero does not count.

    stderr: the bound from the residual. Units of the loss. Cost: that of `lambda_max`. Invariant to scaling whole
    layers where biases scale along; to rotations within a layer. Not invariant to: scaling single neurons, the
    temperature of the logits. Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    hessian = Hessian(objective)
    norms = torch.cat([v.norm().expand(v.numel()) for v in objective.snapshot().values.values()])
    found = extremes(ScaledHessian(hessian, norms), tol, seed, "LA")
    return Measure(
        value=found.values[0],
        stderr=found.residuals[0],
        by_layer=None,
        definition="lambda_max(N^1/2 H N^1/2), N = |W_l|_F² I on layer l",
        matvecs=found.matvecs,
        name="quotient sharpness",
        method="lanczos",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=found.status,
    )


def minimum_sharpness(objective: Objective, *, curvature: str = "hessian", **options: Any) -> Measure:
    """min Tr H over all scalings of a chain of layers that leave its function: W_l -> a_l W_l with prod a_l = 1.

    Ibayashi, Hamaguchi and Imaizumi, "Minimum sharpness: Scale-invariant parameter-robustness of neural networks",
    arXiv 2106.12612. With traces t_l over weights and b_l over biases, which scale as the activations before them do,

        min_a sum_l t_l / a_l² + b_l / (a_1 ... a_l)²,    without biases m (t_1 ... t_m)^(1/m).

    Convex in the logarithms, solved to a relative 1e-12. The layers are taken to be a chain in the order in which the
    model calls them, with positively homogeneous activations: what branches (residual nets) has no such scalings.
    Selected parameters of other modules and shared weights are refused, and so are traces that are negative (for which
    see curvature="ggn").

    ``options`` (method, rtol, ...) and cost are those of `flatcore.trace`; stderr: first order, as if the layers'
    traces erred together, an upper bound. ``by_layer``: t_l and "bias" b_l, "scale" a_l. Units of Tr H. Invariant to
    scaling whole layers. Not invariant to: scaling single neurons, the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    if curvature not in ("hessian", "ggn"):
        raise ValueError(f"curvature: expected 'hessian' or 'ggn', got {curvature!r}")
    layers = in_order_of_use(objective, find_layers(objective))
    for layer in layers:
        if layer.uses > 1:
            raise ValueError(
                f"objective: expected layers that can be scaled one by one, got {layer.path!r}, whose weight is used "
                f"{layer.uses} times"
            )
    ours = {name for layer in layers for name in (layer.weight, layer.bias)}
    others = [name for name in objective.layout.shapes if name not in ours]
    if others:
        raise ValueError(
            f"objective: expected a chain of linear layers and convolutions, got a parameter {others[0]!r} of another "
            "module; leave it out with params="
        )
    found = trace(Hessian(objective) if curvature == "hessian" else GGN(objective), **options)
    parts = found.by_parameter or {}
    t = [float(parts[layer.weight].value) for layer in layers]
    b = [float(parts[layer.bias].value) if layer.bias else 0.0 for layer in layers]
    for layer, here, bias in zip(layers, t, b, strict=True):
        if here <= 0 or bias < 0:
            raise ValueError(
                f"objective: expected positive traces for every layer, got {here:.3g} for {layer.path!r} (bias: "
                f"{bias:.3g}), so there is no minimum; pass curvature='ggn' or a smaller rtol"
            )
    y, converged = _least(t, b)
    scales = [math.sqrt(here / before) for here, before in zip(y, [1.0, *y[:-1]], strict=True)]
    products = [math.sqrt(here) for here in y]
    by_layer, error = {}, 0.0
    for layer, here, bias, a, product in zip(layers, t, b, scales, products, strict=True):
        own = parts[layer.weight].stderr / a**2
        own += parts[layer.bias].stderr / product**2 if layer.bias else 0.0
        value = here / a**2 + bias / product**2
        details = {"trace": here, "bias": bias, "scale": a}
        by_layer[layer.path] = Measure(
            value, own, None, "t_l / a_l² + b_l / (a_1 ... a_l)²", 0, details=details
        )
        error += own
    status = found.status
    if not converged:
        status = f"the scales have not converged after {_MAX_SWEEPS} sweeps, so the value is an upper bound"
        warn(f"minimum_sharpness: {status}")
    return Measure(
        value=math.fsum(m.value for m in by_layer.values()),
        stderr=error,
        by_layer=by_layer,
        definition="min_a sum_l t_l / a_l² + b_l / (a_1 ... a_l)², prod_l a_l = 1",
        matvecs=found.matvecs,
        name="minimum sharpness",
        method=found.method,
        seed=found.seed,
        seconds=time.perf_counter() - began,
        status=status,
    )


def _least(t: list[float], b: list[float]) -> tuple[list[float], bool]:
    """y_l = (a_1 ... a_l)² that minimise sum_l t_l y_{l-1} / y_l + b_l / y_l with y_0 = y_m = 1.

    Without the b_l the logarithms solve a chain of equal terms, from which Newton's method starts: in x = log y the sum
    is convex, its Hessian tridiagonal, and a step is halved until it descends.
    """
    m = len(t)
    if m == 1:
        return [1.0], True
    T, B = torch.tensor(t, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    x = (T.log() - T.log().mean()).cumsum(0)[:-1]

    def terms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends = torch.cat([x.new_zeros(1), x, x.new_zeros(1)])
        return T * (ends[:-1] - ends[1:]).exp(), B * (-ends[1:]).exp()

    for _ in range(_MAX_SWEEPS):
        p, q = terms(x)
        gradient = p[1:] - p[:-1] - q[:-1]
        hessian = torch.diag(p[1:] + p[:-1] + q[:-1]) - torch.diag(p[1:-1], 1) - torch.diag(p[1:-1], -1)
        step = torch.linalg.solve(hessian, -gradient)
        decrease = float(-(gradient @ step))
        value = float(p.sum() + q.sum())
        if decrease <= 1e-24 * value:
            return [*x.exp().tolist(), 1.0], True
        share = 1.0
        while share > 1e-12 and float(sum(part.sum() for part in terms(x + share * step))) > value:
            share /= 2
        x = x + share * step
        if decrease <= 1e-13 * value:
            return [*x.exp().tolist(), 1.0], True
    return [*x.exp().tolist(), 1.0], False

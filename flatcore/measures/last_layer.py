"""Relative flatness of a last linear layer under cross-entropy: a closed form, from one pass forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from flatcore.evaluate import Evaluation, LossCall
from flatcore.measures.features import Call, Moments, evaluated, feature_rows
from flatcore.measures.layers import Layer
from flatcore.objective import Objective, WeightedBatch

__all__ = ["LastLayer", "row_masses"]


class _NotThisFormError(Exception):
    pass


class LastLayer:
    """Sums over the data from which relative flatness follows, for standardised features too.

    With logits z = W phi + b, p = softmax(z) and the loss sum_n mass_n l(z_n), the Hessian of the layer is
    sum_n mass_n (diag p_n - p_n p_nᵀ) ⊗ phi_n phi_nᵀ, so that with phi_t / s_t for phi_t and s_t w_t for w_t

        kappa = sum_tu (s_u² / s_t²) M_tu,   M_tu = sum_n mass_n phi_nt² Var_{c ~ p_n} W_cu,
        Tr H  = sum_t  T_t / s_t²,           T_t  = sum_n mass_n phi_nt² (1 - |p_n|²).

    Sums are taken in float64 in one pass, in which the features' moments come along.
    """

    def __init__(self, layer: Layer, weight: Tensor) -> None:
        m = weight.shape[1]
        zeros = torch.zeros(m, dtype=torch.float64, device=weight.device)
        self._weight, self._layer = weight, layer
        self._gains, self._traces = zeros.new_zeros(m, m), zeros.clone()
        self._moments = Moments()

    @staticmethod
    def of(objective: Objective, layer: Layer, weight: Tensor) -> LastLayer | None:
        """``weight``: (outputs, inputs), float64. None where the layer and the loss are not of that form."""
        if layer.uses > 1 or layer.groups > 1 or weight.dim() != 2:
            return None
        self = LastLayer(layer, weight)
        try:
            evaluated(objective, [layer], self._see, differentiable=layer.weight)
        except _NotThisFormError:
            return None
        return self

    def flatness(self, standardize: bool) -> tuple[float, float]:
        """kappa, and |W|² times the trace of the layer's Hessian."""
        if not standardize:
            return float(self._gains.sum()), float(self._weight.square().sum() * self._traces.sum())
        deviations = self._moments.deviations
        inverse = torch.where(deviations > 0, 1 / deviations, 1.0).square()
        square = (self._weight * deviations).square().sum()
        return float(inverse @ self._gains @ deviations.square()), float(square * (inverse @ self._traces))

    def _see(self, batch: WeightedBatch, result: Evaluation, calls: Mapping[str, list[Call]]) -> None:
        if len(calls[self._layer.path]) != 1:
            raise _NotThisFormError
        features, logits = calls[self._layer.path][0]
        call = result.call
        if call is None or call.function is not F.cross_entropy or features.requires_grad:
            raise _NotThisFormError
        scores = call.arguments["input"]
        same_rows = (
            scores.dim() == 2 and scores.shape[1] == logits.shape[-1] and scores.numel() == logits.numel()
        )
        if not (same_rows and scores.data_ptr() == logits.data_ptr() and scores.is_contiguous()):
            raise _NotThisFormError
        rows, z = feature_rows(self._layer, features.detach()).double(), scores.detach().double()
        bias = self._layer.module._parameters.get("bias")
        expected = rows @ self._weight.T + (0 if bias is None else bias.detach().double())
        eps = torch.finfo(scores.dtype).eps
        if bool(((z - expected).abs() > 1000 * eps * (1 + expected.abs().max())).any()):
            raise _NotThisFormError  # a hook, or a module that does more than its kind
        mass = batch.weight * row_masses(call)
        self._moments.add(rows)
        squares = mass[:, None] * rows.square()
        variances, spread = _spread(z.softmax(1), self._weight)
        self._gains += squares.T @ variances
        self._traces += squares.T @ spread


def _spread(p: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Var_{c ~ p_n} W_cu (rows, inputs), and 1 - |p_n|² (rows,).

    Both are small where one class has nearly all of p, and would be differences of large numbers there. Taken from the
    other classes' p and the differences to that one's weights, they are as accurate as these.
    """
    top = p.argmax(1, keepdim=True)
    q = p.scatter(1, top, 0.0)
    rest, W_top = q.sum(1, keepdim=True), W[top[:, 0]]
    qW = q @ W
    variances = q @ W.square() - 2 * W_top * qW + rest * W_top.square() - (qW - rest * W_top).square()
    spread = (q * (1 - q)).sum(1) + (rest * p.gather(1, top))[:, 0]
    return variances.clamp(min=0), spread


def row_masses(call: LossCall) -> Tensor:
    """What each row's sum of target probabilities counts in the loss: (rows,) float64."""
    scores, target, weight = (call.arguments[name] for name in ("input", "target", "weight"))
    smoothing, classes = call.arguments["label_smoothing"], scores.shape[1]
    if call.reduction not in ("mean", "sum"):
        raise _NotThisFormError
    w = torch.ones(classes, dtype=torch.float64, device=scores.device) if weight is None else weight.double()
    if target.is_floating_point():
        smoothed = target.double() * (1 - smoothing) + smoothing / classes
        mass, divisor = smoothed @ w, float(len(scores))
    else:
        counted = target != call.arguments["ignore_index"]
        own = w[target.where(counted, 0)]
        mass = ((1 - smoothing) * own + smoothing * w.mean()) * counted
        divisor = float((own * counted).sum())
    by_row: Tensor = mass / (divisor if call.reduction == "mean" else 1.0)
    return by_row

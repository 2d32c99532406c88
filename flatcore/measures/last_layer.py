"""Relative flatness of a last linear layer under cross-entropy: a closed form, from one pass forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcore.evaluate import Evaluation, LossCall
from flatcore.measures.features import Call, Moments, evaluated, feature_rows
from flatcore.measures.layers import Layer
from flatcore.objective import Objective, WeightedBatch

__all__ = ["LastLayer", "gives", "row_masses"]

_CACHED = 2**16  # features and logits worked on at once, so that what is made of them stays in a cache


class _NotThisFormError(Exception):
    pass


class LastLayer:
    """Relative flatness of one layer, in either form, from sums over the data in one pass.

    With logits z = W phi + b, p = softmax(z) and the loss sum_n mass_n l(z_n), the Hessian of the layer is
    sum_n mass_n (diag p_n - p_n p_nᵀ) ⊗ phi_n phi_nᵀ. Sums are taken in float64.
    """

    def __init__(self, layer: Layer, weight: Tensor, sums: _Sums) -> None:
        self._weight, self._layer, self._sums = weight, layer, sums

    @staticmethod
    def flatness(
        objective: Objective, layer: Layer, weight: Tensor, *, standardize: bool, simplified: bool
    ) -> float | None:
        """``weight``: (outputs, inputs), float64. None where the layer and the loss are not of that form.

        ``simplified``: |W|² times the trace of the layer's Hessian instead of kappa.
        """
        if layer.uses > 1 or layer.groups > 1 or weight.dim() != 2:
            return None
        sums = _Standardized(weight, simplified) if standardize else _Plain(weight, simplified)
        self = LastLayer(layer, weight, sums)
        try:
            evaluated(objective, [layer], self._see, differentiable=layer.weight)
        except _NotThisFormError:
            return None
        return sums.value()

    def _see(self, batch: WeightedBatch, result: Evaluation, calls: Mapping[str, list[Call]]) -> None:
        if len(calls[self._layer.path]) != 1:
            raise _NotThisFormError
        own, call = calls[self._layer.path][0], result.call
        if call is None or call.function is not F.cross_entropy or own.given.requires_grad:
            raise _NotThisFormError
        scores, logits = call.arguments["input"], own.output
        same_rows = (
            scores.dim() == 2 and scores.shape[1] == logits.shape[-1] and scores.numel() == logits.numel()
        )
        if not (same_rows and scores.data_ptr() == logits.data_ptr() and scores.is_contiguous()):
            raise _NotThisFormError
        rows, scores = feature_rows(self._layer, own.given.detach()), scores.detach()
        if own.changed or not gives(self._layer, self._weight, rows, scores):
            raise _NotThisFormError  # written over since, or a module that does more than its kind
        self._sums.add(rows, scores, batch.weight * row_masses(call))


def gives(layer: Layer, weight: Tensor, rows: Tensor, scores: Tensor) -> bool:
    """Are these scores of the layer W phi + b, by its definition or but for rounding?"""
    if _is_linear(layer.module):
        return True
    bias = layer.module._parameters.get("bias")
    expected = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.detach())
    bound = 1000 * torch.finfo(scores.dtype).eps * (1 + expected.abs().max())
    return bool(((scores - expected).abs() <= bound).all())


def _is_linear(module: nn.Module) -> bool:
    """Is its output x Wᵀ + b by definition? (The hooks that may replace it come after the one that noted it.)"""
    return type(module) is nn.Linear and "forward" not in vars(module)


class _Sums(Protocol):
    def add(self, rows: Tensor, scores: Tensor, mass: Tensor) -> None: ...
    def value(self) -> float: ...


class _Plain:
    """sum_n mass_n |phi_n|² p_nᵀ D p_n with D_cd = |w_c - w_d|² / 2, or |W|² off the diagonal in the simplified form.

    For p_nᵀ D p_n is sum_u Var_{c ~ p_n} W_cu, and |W|² (1 - |p_n|²). All its terms are positive. |phi_n|² is taken in
    the model's precision: it is no less accurate than phi_n.
    """

    def __init__(self, weight: Tensor, simplified: bool) -> None:
        self._weight, self._simplified, self._sum = weight, simplified, 0.0
        self._pairs: Tensor | None = None
        d, m = weight.shape
        if d > m:
            return  # D, d by d, may be large, of a vocabulary say, and is the longer way
        if simplified:
            self._pairs = weight.square().sum() * (1 - torch.eye(d).to(weight))
        else:
            exactly = "donot_use_mm_for_euclid_dist"
            self._pairs = torch.cdist(weight, weight, compute_mode=exactly).square() / 2

    def add(self, rows: Tensor, scores: Tensor, mass: Tensor) -> None:
        if self._pairs is None:
            variances, spread = _spread(scores.double().softmax(1), self._weight)
            by_row = self._weight.square().sum() * spread if self._simplified else variances.sum(1)
        else:  # classes first: a softmax over the last of few classes takes five times as long
            p = scores.T.to(torch.float64, memory_format=torch.contiguous_format).softmax(0)
            by_row = ((self._pairs @ p) * p).sum(0)
        norms = torch.linalg.vector_norm(rows, dim=1).double()
        self._sum += float((mass * norms.square()) @ by_row)

    def value(self) -> float:
        return self._sum


class _Standardized:
    """With phi_t / s_t for phi_t and s_t w_t for w_t, where the deviations s are known at the end alone:

    kappa = sum_tu (s_u² / s_t²) M_tu,             M_tu = sum_n mass_n phi_nt² Var_{c ~ p_n} W_cu,
    simplified = |W diag(s)|² sum_t  T_t / s_t²,   T_t  = sum_n mass_n phi_nt² (1 - |p_n|²).
    """

    def __init__(self, weight: Tensor, simplified: bool) -> None:
        d, m = weight.shape
        self._weight, self._simplified = weight, simplified
        self._sums = weight.new_zeros(m) if simplified else weight.new_zeros(m, m)
        self._moments = Moments()
        self._at_once = max(1, _CACHED // (d + m))

    def add(self, rows: Tensor, scores: Tensor, mass: Tensor) -> None:
        parts = (whole.split(self._at_once) for whole in (rows, scores, mass))
        for phi, z, weights in zip(*parts, strict=True):
            self._moments.add(phi)
            phi = phi.double()
            variances, spread = _spread(z.double().softmax(1), self._weight)
            self._sums += (weights[:, None] * phi.square()).T @ (spread if self._simplified else variances)

    def value(self) -> float:
        s = self._moments.deviations
        inverse = torch.where(s > 0, 1 / s, 1.0).square()
        if self._simplified:
            return float((self._weight * s).square().sum() * (inverse @ self._sums))
        return float(inverse @ self._sums @ s.square())


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

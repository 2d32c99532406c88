"""Identities that tie measures to each other and to the Hessian of a net."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measured import batch, close, cross_entropy, dense_hessian, mlp, rescaled
from reference import Reference
from torch import Tensor, nn
from untouched import one_thread  # noqa: F401

import flatcore as fc
from flatcore import measures

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


def layers_of(objective: fc.Objective) -> dict[str, slice]:
    return {
        n.removesuffix(".weight"): s for n, s in objective.parameter_slices.items() if n.endswith("weight")
    }


def test_blocks_of_a_layer_are_those_of_the_gauss_newton_matrix() -> None:
    """In nets of ReLUs; blocks between layers differ, so there is something to tell apart."""
    data, model = batch(30, 5, 3), mlp(5, 7, 6, 3)
    objective = cross_entropy(model, data)
    H, G = fc.Hessian(objective).to_dense(), Reference(model, F.cross_entropy, data, "output_target").ggn()
    for s in objective.parameter_slices.values():
        assert (H[s, s] - G[s, s]).norm() <= EXACT * G[s, s].norm()
    assert (H - G).norm() > 0.1 * G.norm()


def test_sum_of_curvature_in_units_of_the_weights() -> None:
    """sum_i H_ii w_i² does not change where neurons are scaled; the trace does."""
    data, model = batch(30, 5, 3), mlp(5, 7, 6, 3)
    sums, traces = [], []
    for net in (model, rescaled(model, largest=6)):
        objective = cross_entropy(net, data)
        diagonal = fc.diagonal(fc.Hessian(objective), method="exact").value
        w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        sums.append(float(diagonal @ w.square()))
        traces.append(float(diagonal.sum()))
    assert close(*sums, 1e-9) and not close(*traces, 0.5)


def test_order() -> None:
    """2 sum |W| sqrt(h) <= normalized sharpness <= 2 |W| sqrt(Tr H_l), and relative flatness <= |W|² Tr H_l."""
    data, model = batch(30, 5, 3), mlp(5, 7, 6, 3)
    objective = cross_entropy(model, data)
    h = dense_hessian(objective, data).diagonal().clamp(min=0)
    sharpness = measures.normalized_sharpness(objective, method="exact")
    flatness = measures.relative_flatness(objective, standardize=False, method="exact")
    for path, place in layers_of(objective).items():
        weight, own = model.get_submodule(path).weight.detach().reshape(-1), h[place]
        trace = float(own.sum())
        below, above = 2 * float((weight.abs() * own.sqrt()).sum()), 2 * float(weight.norm()) * trace**0.5
        assert below <= sharpness.by_layer[path].value <= above
        assert 0 <= flatness.by_layer[path].value <= float(weight.square().sum()) * trace


def test_weights_in_front_of_batch_statistics() -> None:
    """Their scale is undone by the normalisation: <w, grad> = 0, H w = -grad in their block, and wᵀ H w = 0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, eps=1e-14), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    data = batch(30, 5, 3)
    objective = fc.Objective(model, F.cross_entropy, data, params=["0.weight"], allow_train_mode=True)
    w = model[0].weight.detach().reshape(-1)

    def loss(v: Tensor) -> Tensor:
        z = F.batch_norm(
            data[0] @ v.view(6, 5).T, None, None, model[1].weight, model[1].bias, training=True, eps=1e-14
        )
        return F.cross_entropy(model[3](torch.tanh(z)), data[1])

    g = torch.func.grad(loss)(w).detach()
    Hw = fc.Hessian(objective) @ w
    assert abs(float(w @ g)) <= EXACT * float(w.norm() * g.norm())
    assert (Hw + g).norm() <= EXACT * g.norm()
    assert abs(float(w @ Hw)) <= EXACT * float(w.norm() * Hw.norm())


def test_small_steps() -> None:
    """SAM: rho |g| + rho² gᵀ H g / (2 |g|²) + O(rho³), on a net that is no quadratic."""
    data, model = batch(30, 5, 3), mlp(5, 7, 3, activation=nn.Tanh)
    objective = cross_entropy(model, data)
    g = torch.cat(
        [
            p.reshape(-1)
            for p in torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters()))
        ]
    )
    second = float(g @ dense_hessian(objective, data) @ g / (g @ g)) / 2
    errors = [
        measures.sam_sharpness(objective, rho).value - rho * float(g.norm()) - rho**2 * second
        for rho in (0.02, 0.01)
    ]
    assert 7.5 < errors[0] / errors[1] < 8.5

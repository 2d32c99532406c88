"""Normalized sharpness: closed forms, invariances, and what it is not invariant to."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from measured import EPS, batch, close, cross_entropy, dense_hessian, mlp, rescaled
from torch import Tensor, nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning
from flatcore.measures.scales import least_over_scales

pytestmark = pytest.mark.usefixtures("one_thread")

# The minimum is taken to 1e-12; sums of positive numbers and their roots lose a few hundred units at most.
SOLVED = 1e-12 + 500 * EPS


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_quasi_newton(h: Tensor, w: Tensor) -> float:
    """The same convex problem by a general minimiser."""
    a = torch.zeros(h.shape[0], 1, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(h.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [a, b], max_iter=2000, tolerance_grad=1e-15, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (h * (a + b).exp() + w * (-a - b).exp()).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return float(closure().detach())


class TestScales:
    @pytest.mark.parametrize(("d", "m"), [(3, 5), (30, 20), (1, 1), (40, 3)])
    def test_the_least_sum_is_that_of_a_general_minimiser(self, d: int, m: int) -> None:
        h, w = random(d, m, seed=d) ** 4, random(d, m, seed=m + 100) ** 2
        found = least_over_scales(h, w)
        assert found.converged and found.attained
        # L-BFGS stops where rounding of the sum hides a descent: a gradient of sqrt(eps), squared in the value.
        assert close(found.value, by_quasi_newton(h, w), 1e-11)
        assert close(found.value, float((h * found.scales + w / found.scales).sum()), SOLVED)

    def test_rank_one(self) -> None:
        alpha, beta, gamma, delta = (random(n, seed=n) + 0.01 for n in (7, 4, 7, 4))
        found = least_over_scales(torch.outer(alpha, beta), torch.outer(gamma, delta))
        exact = 2 * float((alpha * gamma).sqrt().sum() * (beta * delta).sqrt().sum())
        assert close(found.value, exact, SOLVED)

    @pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
    def test_a_single_row_or_column_has_a_scale_for_each_weight(self, shape: tuple[int, int]) -> None:
        h, w = random(*shape, seed=1), random(*shape, seed=2)
        assert close(least_over_scales(h, w).value, 2 * float((h * w).sqrt().sum()), SOLVED)

    @pytest.mark.parametrize("seed", range(5))
    def test_lies_between_one_scale_per_weight_and_one_per_matrix(self, seed: int) -> None:
        h, w = random(6, 8, seed=seed) ** 3, random(6, 8, seed=seed + 50) ** 2
        value = least_over_scales(h, w).value
        assert 2 * float((h * w).sqrt().sum()) <= value <= 2 * math.sqrt(float(h.sum() * w.sum()))

    def test_invariant_to_row_and_column_scales(self) -> None:
        h, w = random(6, 8, seed=1), random(6, 8, seed=2)
        factors = (40 * (random(6, 1, seed=3) - 0.5)).exp2() * (40 * (random(8, seed=4) - 0.5)).exp2()
        assert close(
            least_over_scales(h / factors**2, w * factors**2).value, least_over_scales(h, w).value, SOLVED
        )

    def test_dead_rows_and_columns_count_nothing(self) -> None:
        h, w = random(6, 8, seed=1), random(6, 8, seed=2)
        h[2], w[:, 5] = 0, 0
        rows, columns = [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 6, 7]
        found = least_over_scales(h, w)
        assert not found.attained
        assert (found.scales[2] == 0).all() and (found.scales[:, 5] == 0).all()
        assert close(found.value, least_over_scales(h[rows][:, columns], w[rows][:, columns]).value, SOLVED)

    def test_nothing_alive(self) -> None:
        found = least_over_scales(torch.zeros(2, 3, dtype=torch.float64), random(2, 3, seed=0))
        assert found.value == 0 and found.converged and not found.attained

    def test_zero_in_both_is_no_reason_not_to_attain(self) -> None:
        h, w = random(4, 4, seed=1), random(4, 4, seed=2)
        h[1], w[1] = 0, 0
        assert least_over_scales(h, w).attained

    def test_triangular_patterns_leave_their_diagonal(self) -> None:
        """log r = (-t, 0), log c = (t, 0) takes both terms off the diagonal to zero as t grows."""
        h = torch.tensor([[1.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
        w = torch.tensor([[9.0, 0.0], [5.0, 1.0]], dtype=torch.float64)
        found = least_over_scales(h, w)
        assert close(found.value, 2 * math.sqrt(9) + 2 * math.sqrt(4), SOLVED) and not found.attained

    @pytest.mark.parametrize("seed", range(12))
    def test_sparse_patterns(self, seed: int) -> None:
        """Along unattained directions L-BFGS approaches the infimum from above."""
        density = (0.15, 0.3, 0.6)[seed % 3]
        h = random(9, 7, seed=seed) * (random(9, 7, seed=seed + 100) < density)
        w = random(9, 7, seed=seed + 200) * (random(9, 7, seed=seed + 300) < density)
        found = least_over_scales(h, w)
        assert found.converged
        assert -SOLVED <= by_quasi_newton(h, w) / found.value - 1 < 1e-9


class TestMeasure:
    def value(self, model: nn.Module, data: tuple[Tensor, Tensor], **options: object) -> float:
        return float(
            measures.normalized_sharpness(cross_entropy(model, data), method="exact", **options).value
        )

    def test_against_the_dense_hessian(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        objective = cross_entropy(model, data)
        with untouched(model, *data):
            found = measures.normalized_sharpness(objective, method="exact")
        diagonal = dense_hessian(objective, data).diagonal()
        slices = objective.parameter_slices
        for path in ("0", "2"):
            weight = model.get_submodule(path).weight.detach()
            h = diagonal[slices[f"{path}.weight"]].view_as(weight)
            assert close(found.by_layer[path].value, by_quasi_newton(h.clamp(min=0), weight**2), 1e-10)
            scales = found.by_layer[path].details["scales"]
            assert scales.shape == weight.shape
            assert close(
                found.by_layer[path].value, float((h * scales**2 + weight**2 / scales**2).sum()), 1e-10
            )
        assert found.value == sum(m.value for m in found.by_layer.values())
        assert found.stderr == 0 and 0 < found.matvecs <= objective.layout.size

    def test_forms_and_given_diagonals(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        objective = cross_entropy(model, data)
        diagonal = fc.diagonal(fc.Hessian(objective), method="exact")
        whole = measures.normalized_sharpness(objective, diagonal=diagonal)
        assert (
            measures.normalized_sharpness(objective, diagonal=diagonal, form="icml").value == whole.value / 2
        )
        given = measures.normalized_sharpness(objective, diagonal=diagonal.value)
        assert given.value == whole.value and math.isnan(given.stderr) and given.matvecs == 0
        # In a net of ReLUs the diagonal of the Hessian is that of the Gauss-Newton matrix.
        ggn = measures.normalized_sharpness(objective, curvature="ggn", method="exact")
        assert close(ggn.value, whole.value, 1e-10)

    def test_loss_and_function(self) -> None:
        """sum_i sqrt(A_i B_i) at the scales found."""
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        objective = cross_entropy(model, data)
        diagonal = fc.diagonal(fc.Hessian(objective), method="exact")
        layer = measures.normalized_sharpness(objective, diagonal=diagonal, form="icml").by_layer["2"]
        weight = model[2].weight.detach()
        squares = layer.details["scales"] ** 2
        columns = squares[0] / squares[0, 0]
        h = diagonal.by_parameter["2.weight"].value.view_as(weight)
        assert close(
            layer.value, float(((h * columns).sum(1) * (weight**2 / columns).sum(1)).sqrt().sum()), 1e-11
        )

    def test_invariant_to_scaling_neurons(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 6, 3)
        other = rescaled(model, largest=10)
        # Curvatures of the copy spread over 2^20, so that its diagonal keeps 16 - 6 digits at least.
        assert close(self.value(model, data), self.value(other, data), 1e-9)
        traces = [
            float(fc.trace(fc.Hessian(cross_entropy(m, data)), method="exact").value) for m in (model, other)
        ]
        assert not close(*traces, 0.5)

    def test_invariant_to_permuting_neurons(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        other, order = copy.deepcopy(model), torch.randperm(7, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            other[0].weight.copy_(model[0].weight[order])
            other[0].bias.copy_(model[0].bias[order])
            other[2].weight.copy_(model[2].weight[:, order])
        assert close(self.value(model, data), self.value(other, data), 1e-11)

    def test_not_invariant_to_rotations(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        rotation = torch.linalg.qr(random(5, 5, seed=0) - 0.5)[0]
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.copy_(model[0].weight @ rotation)
        turned = (data[0] @ rotation, data[1])
        assert torch.allclose(model(data[0]), other(turned[0]))
        assert not close(self.value(model, data), self.value(other, turned), 0.01)

    def test_temperature_counts_unless_the_logits_are_normalised(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[2].weight *= 3
            other[2].bias *= 3
        assert not close(self.value(model, data), self.value(other, data), 0.1)
        values = [self.value(m, data, normalize=True, curvature="ggn") for m in (model, other)]
        assert close(*values, 1e-10)

    def test_weights_before_a_batch_normalisation(self) -> None:
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
        data = batch(30, 5, 3)
        with torch.no_grad():
            model[1].running_mean.copy_(random(6, seed=1))
            model[1].running_var.copy_(random(6, seed=2) + 0.5)
            model[1].eps = 0.0
        other, c = copy.deepcopy(model), random(6, seed=3) * 5 + 0.1
        with torch.no_grad():
            other[0].weight *= c[:, None]
            other[0].bias *= c
            other[1].running_mean *= c
            other[1].running_var *= c**2
        assert close(self.value(model, data), self.value(other, data), 1e-11)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_convolutions_have_a_scale_per_channel(self, groups: int) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=groups),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, groups=groups),
            nn.Flatten(),
            nn.Linear(18, 3),
        ).double()
        x = torch.randn(9, 2, 4, 4, dtype=torch.float64)
        data = (x, torch.arange(9) % 3)
        objective = cross_entropy(model, data)
        found = measures.normalized_sharpness(objective, method="exact")
        h = dense_hessian(objective, data).diagonal()
        slices = objective.parameter_slices
        for path, transposed in (("0", False), ("2", True)):
            weight = model.get_submodule(path).weight.detach()
            total, of_kernel = 0.0, h[slices[f"{path}.weight"]].view_as(weight).sum((2, 3))
            squares = weight.square().sum((2, 3))
            outputs_first = [of_kernel, squares]
            for rows, w in zip(*(t.chunk(groups) for t in outputs_first), strict=True):
                total += by_quasi_newton(rows.T if transposed else rows, w.T if transposed else w)
            assert close(found.by_layer[path].value, total, 1e-10)

    def test_estimated_within_its_error(self) -> None:
        data, model = batch(200, 8, 4), mlp(8, 20, 20, 4)
        objective = cross_entropy(model, data)
        exact = measures.normalized_sharpness(objective, method="exact", curvature="ggn")
        found = measures.normalized_sharpness(
            objective, method="hutchinson", curvature="ggn", rtol=0.1, max_matvecs=4000
        )
        assert 0 < found.stderr < 0.1 * found.value
        assert abs(found.value - exact.value) <= 4 * found.stderr

    def test_clipped_mass_is_told(self) -> None:
        data, model = batch(12, 3, 3), mlp(3, 6, 3, activation=nn.Tanh)
        objective = cross_entropy(model, data)
        with pytest.warns(FlatcoreWarning, match="negative"):
            found = measures.normalized_sharpness(objective, method="exact")
        h = fc.diagonal(fc.Hessian(objective), method="exact").by_parameter
        entries = torch.cat([h["0.weight"].value, h["2.weight"].value])
        share = float(-entries.clamp(max=0).sum() / entries.abs().sum())
        assert share > 0.01 and close(found.details["clipped"], share, 1e-12)
        assert (
            measures.normalized_sharpness(objective, curvature="ggn", method="exact").details["clipped"] == 0
        )

    def test_dead_neurons_are_told(self) -> None:
        data, model = batch(12, 3, 3), mlp(3, 6, 3)
        with torch.no_grad():
            model[0].bias[2] = -100
        found = measures.normalized_sharpness(cross_entropy(model, data), method="exact")
        assert not found.details["attained"]
        assert (found.by_layer["0"].details["scales"][2] == 0).all()
        assert (found.by_layer["2"].details["scales"][:, 2] == 0).all()

    def test_batches_and_selected_layers(self) -> None:
        x, y = batch(30, 5, 3)
        model = mlp(5, 7, 3)
        whole = measures.normalized_sharpness(cross_entropy(model, (x, y)), method="exact")
        parts = [(x[:11], y[:11]), (x[11:], y[11:])]
        last = measures.normalized_sharpness(cross_entropy(model, parts, params=["2.*"]), method="exact")
        assert list(last.by_layer) == ["2"]
        assert close(last.value, whole.by_layer["2"].value, 1e-11)


class TestBound:
    def test_is_the_least_of_sharpness_and_divergence(self) -> None:
        h, weight = random(4, 5, seed=1), random(4, 5, seed=2) - 0.5
        found = least_over_scales(h, weight**2)
        n, w, delta = 1000, 50.0, 0.1
        # s² = scales / sqrt(w): expected sharpness h s² / 2, divergence W² / (2 s²)
        s2 = found.scales / math.sqrt(w)
        terms = float((h * s2 / 2 + weight**2 / s2 / (2 * w)).sum())
        by_hand = 0.2 + w / (2 * n) + math.log(1 / delta) / w + terms
        bound = measures.normalized_sharpness_bound(0.2, found.value, n, weight=w, delta=delta)
        assert close(bound, by_hand, 1e-12)

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((0.1, -1.0, 10), {}, "sharpness"),
            ((0.1, 1.0, 0), {}, "examples"),
            ((0.1, 1.0, 10), {"delta": 0}, "delta"),
            ((0.1, 1.0, 10), {"weight": 0}, "weight"),
        ],
    )
    def test_refuses(
        self, arguments: tuple[float, float, int], options: dict[str, float], message: str
    ) -> None:
        with pytest.raises(ValueError, match=f"^{message}: "):
            measures.normalized_sharpness_bound(*arguments, **options)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"form": "journal"}, "form: expected"),
            ({"curvature": "fisher"}, "curvature: expected"),
            ({"diagonal": torch.ones(3)}, "diagonal: expected"),
            ({"diagonal": torch.full((66,), math.nan)}, "diagonal: expected finite"),
            ({"method": "guess"}, "method: "),
        ],
    )
    def test_arguments(self, options: dict[str, object], message: str) -> None:
        objective = cross_entropy(mlp(5, 7, 3), batch(6, 5, 3))
        with pytest.raises(ValueError, match=f"^{message}"):
            measures.normalized_sharpness(objective, **options)

    def test_objects(self) -> None:
        with pytest.raises(TypeError, match=r"^objective: expected"):
            measures.normalized_sharpness(mlp(3, 2))
        with pytest.raises(ValueError, match="select weights"):
            measures.normalized_sharpness(cross_entropy(mlp(5, 7, 3), batch(6, 5, 3), params=["*.bias"]))
        by_model = fc.Objective(
            mlp(5, 3), fc.ModelLoss(lambda model, b: F.cross_entropy(model(b[0]), b[1])), batch(6, 5, 3)
        )
        with pytest.raises(ValueError, match=r"^loss: expected"):
            measures.normalized_sharpness(by_model, normalize=True)
        with pytest.raises(ValueError, match=r"^kind: expected"):
            measures.normalize_logits(by_model, kind="max")

    def test_normalised_losses(self) -> None:
        model, (x, y) = mlp(5, 3), batch(6, 5, 3)
        objective = cross_entropy(model, (x, y))
        f = model(x).detach()
        std = f / f.std(1, correction=0, keepdim=True)
        norm = F.normalize(f - f.mean(1, keepdim=True), dim=1)
        assert close(measures.normalize_logits(objective).loss(), float(F.cross_entropy(std, y)), 1e-14)
        assert close(
            measures.normalize_logits(objective, "norm").loss(), float(F.cross_entropy(norm, y)), 1e-14
        )

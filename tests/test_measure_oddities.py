"""Measures of odd nets and odd data: the right number, or one sentence."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from measured import batch, blocks, close, cross_entropy, dense_hessian, kappa, mlp
from torch import Tensor, nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning
from flatcore.optim import ReplicatedSGD
from flatcore.report.measures import measured

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


class TestConstantFeatures:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("widths", [(5, 7, 3), (5, 3)])
    def test_rounding_of_a_mean_is_no_deviation(self, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        """The mean of 40 times 0.1 is not 0.1: not to be divided by, as the deviation of 0 that it is."""
        (x, y), model = batch(40, 5, 3), mlp(*widths)
        x[:, 2] = 0.1
        s = x.std(0, correction=0)
        s[2] = 0
        inverse = torch.where(s > 0, 1 / s, 1.0)
        ((W, H),) = blocks(model, (x, y), "0")
        exact = kappa(W * s, H * inverse[:, None, None] * inverse)
        objective = cross_entropy(model.to(dtype), (x.to(dtype), y))
        found = measures.relative_flatness(objective, "0", method="auto" if len(widths) == 2 else "exact")
        # float32: products and sums of some hundred numbers.
        assert close(found.value, exact, EXACT if dtype == torch.float64 else 1e-4)


class Bare(nn.Module):
    """Parameters, but no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(mlp(5, 3)[0].weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


def one_parameter() -> fc.Objective:
    """L = mean (w x)² / 2."""
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    return fc.Objective(model, lambda z, t: 0.5 * (z - t).square().mean(), (x, torch.zeros_like(x)))


class TestOneParameter:
    """H = 5, w² H = 5 w²."""

    def test_curvature(self) -> None:
        objective = one_parameter()
        square = float(objective.parameters["0.weight"].detach() ** 2)
        for measure, exact in (
            (lambda o: measures.trace(o), 5),
            (lambda o: measures.lambda_max(o), 5),
            (lambda o: measures.condition_number(o), 1),
            (lambda o: measures.participation_ratio(o), 1),
            (lambda o: measures.effective_dimension(o, 3.0), 5 / 8),
            (lambda o: measures.log_volume(o, 0.1, 3.0), math.log(2 * math.sqrt(0.2 / 8))),
            (lambda o: measures.soft_rank(o, 3.0), 5 / 8),
            (lambda o: measures.soft_rank(o, 3.0, matrix="hessian"), 5 / 8),
            (lambda o: measures.edge_of_stability(o, 0.1), 5 / 20),
            (lambda o: measures.normalized_sharpness(o), 2 * math.sqrt(5 * square)),
            (lambda o: measures.relative_flatness(o, standardize=False), 5 * square),
            (lambda o: measures.relative_flatness(o, form="max", standardize=False), 5 * square),
            (lambda o: measures.fisher_rao(o), 5 * square),
            (lambda o: measures.quotient_sharpness(o), 5 * square),
            (lambda o: measures.minimum_sharpness(o), 5),
            (lambda o: measures.path_norm(o), square),
        ):
            assert close(measure(objective).value, exact, EXACT)

    def test_gap_by_probes_on_the_hessian(self) -> None:
        """g_i = w x_i²: of 1 and 9 w, so C = 16 w², and the gap is C / (H + lambda) / n."""
        objective = one_parameter()
        exact = 16 * float(objective.parameters["0.weight"].detach() ** 2) / 8 / 2
        for method in ("exact", "probes"):
            found = measures.generalization_gap(objective, 3.0, matrix="hessian", method=method)
            assert abs(found.value - exact) <= 4 * found.stderr + EXACT * exact


class TestNoLayers:
    def test_noise_needs_none(self) -> None:
        """sigma, without the bounds, which are of the weights of layers."""
        model, data = Bare(), batch(60, 5, 3)
        objective = cross_entropy(model, (data[0], model(data[0]).argmax(1)))
        found = measures.pac_bayes_sigma(objective)
        assert found.value > 0 and found.details.keys() == {"flatness", "change"}
        as_layer = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
        as_layer[0].weight = model.w
        same = measures.pac_bayes_sigma(cross_entropy(as_layer, (data[0], model(data[0]).argmax(1))))
        assert found.value == same.value and "bound" in same.details

    def test_the_loss_is_no_error(self) -> None:
        with pytest.raises(ValueError, match=r"^error: expected None or a callable"):
            measures.pac_bayes_sigma(cross_entropy(mlp(5, 3), batch(9, 5, 3)), error="loss")
        regression = fc.Objective(Bare(), lambda z, t: z.mean(), batch(9, 5, 3))
        with pytest.raises(ValueError, match=r"^error: expected a cross-entropy .* give a callable"):
            measures.pac_bayes_sigma(regression)


class TestPathNorm:
    @pytest.mark.parametrize(
        "act",
        [torch.tanh, F.gelu, lambda h: F.layer_norm(h, h.shape[1:]), lambda h: h.softmax(1), torch.sin],
    )
    def test_functions_that_have_no_paths(self, act: Callable[[Tensor], Tensor]) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = mlp(5, 7, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.net[2](act(self.net[0](x)))

        for dtype in (torch.float64, torch.float32):
            x, y = batch(9, 5, 3)
            objective = cross_entropy(Model().to(dtype), (x.to(dtype), y))
            with pytest.raises(ValueError, match=r"^model: expected outputs that are sums over paths"):
                measures.path_norm(objective)

    def test_log_probabilities_have_none(self) -> None:
        model = nn.Sequential(*mlp(5, 7, 3), nn.LogSoftmax(1))
        with pytest.raises(ValueError, match="path norm does not apply"):
            measures.path_norm(fc.Objective(model, F.nll_loss, batch(9, 5, 3)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_deep_nets_with_pooling_have(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        blocks = [m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), *blocks, nn.AvgPool2d(2), nn.Flatten()
        )
        model = nn.Sequential(*model, nn.Linear(16, 30), nn.LeakyReLU(), nn.Linear(30, 3)).to(dtype)
        data = torch.randn(4, 1, 8, 8, dtype=dtype), torch.arange(4) % 3
        assert measures.path_norm(cross_entropy(model, data)).value > 0

    def test_weights_made_by_a_parametrisation(self) -> None:
        model, data = mlp(5, 7, 3), batch(9, 5, 3)
        expected = measures.path_norm(cross_entropy(model, data)).value
        torch.nn.utils.parametrizations.weight_norm(model[0])
        objective = cross_entropy(model, data)
        with untouched(model, *data):
            assert close(measures.path_norm(objective).value, expected, EXACT)

    def test_numbers_that_are_none(self) -> None:
        objective = cross_entropy(mlp(5, 7, 3), batch(9, 5, 3))
        with torch.no_grad():
            objective.model[0].weight[0, 0] = math.nan
        with pytest.raises(ValueError, match=r"^model: expected finite parameters"):
            measures.path_norm(objective)


class HeadFirst(nn.Module):
    """A model that holds its last layer first."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.head, self.body = net[2], net[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


class TestOrder:
    def setting(self) -> tuple[fc.Objective, fc.Objective]:
        model, data = mlp(5, 7, 3), batch(30, 5, 3)
        return cross_entropy(model, data), cross_entropy(HeadFirst(model), data)

    def test_is_that_of_the_calls(self) -> None:
        plain, other = self.setting()
        one, two = (measures.minimum_sharpness(o, method="exact") for o in (plain, other))
        assert close(one.value, two.value, EXACT) and list(two.by_layer) == ["body", "head"]
        with untouched(other.model):
            found = measures.relative_flatness(other)
        assert list(found.by_layer) == ["body", "head"] and found.by_layer["head"].method == "closed"
        (pair,) = measures.width(other).details["couplings"]
        assert (pair.first, pair.second, pair.reason) == ("body", "head", "")
        assert pair.imbalance == measures.width(plain).details["couplings"][0].imbalance

    def test_last_layer_of_a_report(self) -> None:
        (one,), (two,) = (measured(o, ["relative_flatness"], 0, lambda _: None) for o in self.setting())
        assert one.measure.value == two.measure.value


class TestTies:
    def test_shared_weights_have_no_scales_of_their_own(self) -> None:
        for bias in (True, False):
            model = mlp(5, 5, 5, 3, bias=bias)
            model[2].weight = model[0].weight
            objective = cross_entropy(model, batch(30, 5, 3))
            with pytest.raises(ValueError, match="got '0', whose weight is used 2 times"):
                measures.minimum_sharpness(objective)
            with pytest.raises(ValueError, match="for method='kfac', got '0', a shared weight"):
                measures.soft_rank(objective, 0.1, method="kfac")
            assert "the weight of '0' is used 2 times" in measures.width(objective).status


class TestGroups:
    """Of an optimizer: what the threshold follows from must be one, weight decay need not be."""

    def groups(self, model: nn.Module, name: str, weights: object, others: object) -> list[dict[str, object]]:
        by_kind: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for p in model.parameters():
            by_kind[p.dim() > 1].append(p)
        return [{"params": by_kind[True], name: weights}, {"params": by_kind[False], name: others}]

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
    def test_each_weight_decay_counts_for_its_own(self, kind: type[torch.optim.Optimizer]) -> None:
        data, model = batch(30, 5, 3), mlp(5, 6, 3)
        objective, P = cross_entropy(model, data), torch.ones(57, dtype=torch.float64)
        optimizer = kind(self.groups(model, "weight_decay", 3.0, 0.0), lr=0.1)
        if kind is torch.optim.Adam:
            F.cross_entropy(model(data[0]), data[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            v = [optimizer.state[p]["exp_avg_sq"].flatten() / (1 - 0.999) for p in model.parameters()]
            P = torch.cat(v).sqrt() + 1e-8
        decay = torch.cat([torch.full((p.numel(),), 3.0 if p.dim() > 1 else 0.0) for p in model.parameters()])
        H = dense_hessian(objective, data) + torch.diag(decay.double())
        top = float(torch.linalg.eigvalsh(H / (P[:, None] * P).sqrt())[-1])
        found = measures.edge_of_stability(objective, optimizer, tol=1e-8)
        assert close(found.details["lambda_max"], top, 1e-8)
        row = fc.track(objective, optimizer=optimizer, trace=False, tol=1e-8).step()
        assert close(row["edge"], found.value, 1e-8)

    def test_what_must_be_one(self) -> None:
        objective = cross_entropy(mlp(5, 6, 3), batch(30, 5, 3))
        model = objective.model
        for message, optimizer in {
            "one momentum": torch.optim.SGD(self.groups(model, "momentum", 0.9, 0.0), lr=0.1),
            "one pair of betas": torch.optim.Adam(self.groups(model, "betas", (0.9, 0.99), (0.8, 0.99))),
            "one that minimises": torch.optim.SGD(model.parameters(), lr=0.1, maximize=True),
        }.items():
            with pytest.raises(ValueError, match=f"^lr: expected {message}"):
                measures.edge_of_stability(objective, optimizer)


class Root(nn.Module):
    """Defined in half of the space: sqrt of the parameters' sum."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return -(self.w.sum() - 2.9).sqrt() * x


class TestNotFinite:
    def setting(self) -> fc.Objective:
        ones = torch.ones(3, 1, dtype=torch.float64)
        return fc.Objective(Root(), lambda z, t: (z - t).mean(), (ones, ones))

    @pytest.mark.parametrize(
        "measure",
        [
            lambda o: measures.lpf(o, 1.0),
            lambda o: measures.adaptive_sharpness_average(o, 1.0),
            lambda o: measures.sam_sharpness(o, 1.0),
            lambda o: measures.local_energy(o, 1.0, "loss"),
            lambda o: measures.local_entropy(o, 0.1, 1.0, steps=40),
        ],
    )
    def test_is_told(self, measure: Callable[[fc.Objective], measures.Measure]) -> None:
        with pytest.warns(FlatcoreWarning, match="not finite"):
            found = measure(self.setting())
        assert math.isnan(found.value) and "not finite" in found.status

    def test_in_a_report(self) -> None:
        (found,) = measured(self.setting(), ["sam_sharpness"], 0, lambda _: None)
        assert found.has_value
        with pytest.warns(FlatcoreWarning, match="not finite"):
            (found,) = measured(self.setting(), ["adaptive_sharpness_average"], 0, lambda _: None)
        assert "not finite" in found.reason


class TestBudget:
    def test_objectives_made_of_one_keep_its_memory(self) -> None:
        objective = fc.Objective(mlp(5, 7, 3), F.cross_entropy, batch(9, 5, 3), memory=2**22)
        assert measures.normalize_logits(objective).budget == objective.budget


class TestNames:
    def test_of_reports_are_no_markup(self) -> None:
        from rich.console import Console

        report = fc.report(cross_entropy(mlp(3, 4, 2), batch(9, 3, 2)), name="[b] of [/]", k=1, rtol=0.3)
        text = io.StringIO()
        Console(file=text, width=200).print(report.table())
        assert text.getvalue().count("[b] of [/]") == 2


class TestReplicas:
    def test_frozen_in_one_alone(self) -> None:
        nets = [mlp(5, 7, 3), mlp(5, 7, 3, seed=1)]
        nets[1][0].weight.requires_grad_(False)
        with pytest.raises(ValueError, match=r"^replicas: expected nets alike, got '0\.weight' frozen"):
            ReplicatedSGD(nets, 0.1)


def test_a_followed_function_may_draw_from_any_generator() -> None:
    model, data = mlp(5, 7, 3), batch(9, 5, 3)
    t = fc.track((model, F.cross_entropy, data), trace=False, measures={"n": lambda _: np.random.rand()})  # noqa: NPY002
    with untouched(model, *data):
        t.step()

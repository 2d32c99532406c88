"""Relative flatness estimated: by probes that all examples share, and by probes of each example's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from measured import batch, convolutional, cross_entropy, dense_hessian, mlp, of_layer
from torch import Tensor, nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


class SharedWeight(nn.Module):
    """Two layers, of which one is used twice: probes of each example's own reach the other alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = mlp(6, 6)[0], mlp(6, 6, seed=1)[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.one(x))))))


class TestProbes:
    @pytest.mark.parametrize("form", ["2021", "simplified"])
    def test_within_their_error(self, form: str) -> None:
        data, model = batch(100, 12, 4), mlp(12, 16, 16, 4)
        objective = cross_entropy(model, data)
        for path in ("0", "all"):
            exact = measures.relative_flatness(objective, path, form=form, method="exact")
            found = measures.relative_flatness(objective, path, form=form, method="probes", rtol=0.04)
            assert found.status == "converged" and 0 < found.stderr <= 0.04 * found.value
            assert abs(found.value - exact.value) <= 4 * found.stderr
            assert list(found.by_layer) == list(exact.by_layer)
            for layer, one in found.by_layer.items():
                assert abs(one.value - exact.by_layer[layer].value) <= 4 * one.stderr

    @pytest.mark.parametrize("form", ["2021", "simplified"])
    @pytest.mark.parametrize("standardize", [True, False])
    def test_of_each_example(self, form: str, standardize: bool) -> None:
        data, model = batch(60, 8, 4), mlp(8, 10, 9, 4)
        data[0].mul_(torch.arange(1.0, 9.0, dtype=torch.float64).sqrt())
        objective = cross_entropy(model, [(data[0][:40], data[1][:40]), (data[0][40:], data[1][40:])])
        options = {"form": form, "standardize": standardize}
        exact = measures.relative_flatness(objective, method="exact", **options)
        with untouched(model, *data):
            found = measures.relative_flatness(objective, method="examples", rtol=0.05, **options)
        assert found.method == "examples" and found.status == "converged"
        assert 0 < found.stderr <= 0.05 * found.value and abs(found.value - exact.value) <= 4 * found.stderr
        for path, one in found.by_layer.items():
            assert one.stderr > 0 and abs(one.value - exact.by_layer[path].value) <= 4 * one.stderr

    def test_of_each_example_in_convolutions(self) -> None:
        model, data = convolutional()
        objective = cross_entropy(model, data, params=["0.weight", "2.weight"])
        for standardize in (True, False):
            exact = measures.relative_flatness(objective, method="exact", standardize=standardize)
            found = measures.relative_flatness(
                objective, method="examples", standardize=standardize, rtol=0.05
            )
            for path, one in found.by_layer.items():
                assert abs(one.value - exact.by_layer[path].value) <= 4 * one.stderr

    def test_no_probes_of_each_example(self) -> None:
        model, data = convolutional(groups=2)
        with pytest.raises(
            ValueError, match=r"^method: there are no probes of each example's own: weights of grouped"
        ):
            measures.relative_flatness(cross_entropy(model, data), "0", method="examples")
        torch.manual_seed(0)
        normed = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)).double()
        objective = fc.Objective(normed, F.cross_entropy, batch(20, 9, 3), allow_train_mode=True)
        with pytest.raises(ValueError, match=r"^method: there are no probes of each example's own"):
            measures.relative_flatness(objective, "0", method="examples")
        assert measures.relative_flatness(objective, "0", rtol=0.5).method in ("probes", "exact")

    def test_layers_that_such_probes_do_not_reach(self) -> None:
        """take shared ones, beside others that are reached."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(9, 10), nn.Tanh(), nn.Unflatten(1, (2, 5)), nn.Conv1d(2, 9, 3, groups=1)
        )
        model = nn.Sequential(
            *model, nn.Tanh(), nn.Flatten(), nn.Linear(27, 9), nn.Tanh(), nn.Linear(9, 4)
        ).double()
        objective = cross_entropy(model, batch(60, 9, 4), params=["*.weight"])
        exact = measures.relative_flatness(objective, method="exact")
        found = measures.relative_flatness(objective, rtol=0.1)
        assert {path: m.method for path, m in found.by_layer.items()} == {
            "0": "examples",
            "3": "probes",
            "6": "examples",
            "8": "closed",
        }
        assert found.method == "closed and examples and probes"
        for path, one in found.by_layer.items():
            assert abs(one.value - exact.by_layer[path].value) <= 4 * one.stderr + EXACT

    @pytest.mark.parametrize("kind", ["called twice", "functional", "tied"])
    def test_weights_with_several_uses(self, kind: str) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.last = mlp(9, 9)[0], mlp(9, 9)[0], mlp(9, 4)[0]
                if kind == "tied":
                    self.second.weight = self.first.weight

            def forward(self, x: Tensor) -> Tensor:
                h = torch.tanh(self.first(x))
                if kind == "functional":
                    return self.last(h @ self.first.weight)
                return self.last(torch.tanh(self.first(h) if kind == "called twice" else self.second(h)))

        objective = cross_entropy(Model(), batch(60, 9, 4), params=["first.weight"])
        options = {"standardize": False, "rtol": 0.1}
        exact = measures.relative_flatness(objective, "first", **options, method="exact")
        found = measures.relative_flatness(objective, "first", **options)
        assert found.method != "examples" and abs(found.value - exact.value) <= 4 * found.stderr + EXACT
        with pytest.raises(ValueError, match="several uses"):
            measures.relative_flatness(objective, "first", **options, method="examples")

    def test_constant_features_are_no_standardised_copy(self) -> None:
        """A feature that never changes and is not zero would lose its weight, and the function change."""
        (x, y), model = batch(40, 9, 4), mlp(9, 9, 4)
        x[:, 2] = 1.5
        objective = cross_entropy(model, (x, y))
        with pytest.raises(ValueError, match="change the function"):
            measures.relative_flatness(objective, "0", method="examples")
        x[:, 2] = 0
        objective = cross_entropy(model, (x, y))
        exact = measures.relative_flatness(objective, "0", method="exact")
        found = measures.relative_flatness(objective, "0", method="examples", rtol=0.05)
        assert abs(found.value - exact.value) <= 4 * found.stderr

    def test_layers_do_not_leak_into_each_other(self) -> None:
        """A chain of numbers, y = w3 w2 w1 x: kappa_l = w_l² H_ll, so all that varies comes from other layers."""
        model = mlp(1, 1, 1, 1, bias=False, activation=nn.Identity)
        data = batch(20, 1, 2)[0], batch(20, 1, 2, seed=2)[0]
        objective = fc.Objective(model, F.mse_loss, data)
        found = measures.relative_flatness(
            objective, standardize=False, method="probes", rtol=0.02, max_matvecs=20_000
        )
        H, w = dense_hessian(objective, data), torch.cat([p.detach().flatten() for p in model.parameters()])
        terms = w[:, None] * H * w
        assert terms.triu(1).abs().sum() > 0.5 * terms.diagonal().sum()
        for one, exact in zip(found.by_layer.values(), terms.diagonal(), strict=True):
            assert 0 < abs(one.value - exact) <= 4 * one.stderr

    def test_change_over_to_exact(self) -> None:
        data, model = batch(40, 9, 4), mlp(9, 9, 4)
        found = measures.relative_flatness(cross_entropy(model, data), "0", rtol=1e-4)
        assert found.method == "exact" and found.matvecs == 81 + 4 and found.stderr == 0

    def test_not_reached_is_told(self) -> None:
        data, model = batch(40, 5, 4), mlp(5, 7, 4)
        with pytest.warns(fc.errors.FlatcoreWarning, match="max_matvecs"):
            found = measures.relative_flatness(
                cross_entropy(model, data), "0", method="probes", max_matvecs=20
            )
        assert found.matvecs == 20 and "rtol" in found.status and math.isfinite(found.stderr)

    def test_the_layer_is_named(self) -> None:
        objective = cross_entropy(mlp(5, 7, 6, 4), batch(40, 5, 4))
        for method in ("probes", "examples"):
            options = {"method": method, "max_matvecs": 4, "rtol": 1e-4}
            with pytest.warns(FlatcoreWarning, match="relative flatness of layer '2' is"):
                measures.relative_flatness(objective, "2", **options)
            with pytest.warns(FlatcoreWarning, match="of 3 layers together .the least certain: '[024]'. is"):
                measures.relative_flatness(objective, **options)

    @pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
    @pytest.mark.parametrize("most", [1, 2, 3, 7, 90])
    def test_budget(self, most: int) -> None:
        objective = cross_entropy(mlp(9, 9, 4), batch(40, 9, 4))
        shared, data = SharedWeight(), batch(30, 6, 6)
        options = {"max_matvecs": most, "rtol": 1e-4}
        for o in (objective, cross_entropy(shared, data)):
            for method in ("auto", "probes"):
                found = measures.relative_flatness(o, method=method, **options)
                assert found.matvecs <= most and found.value != 0
        if most < 2:
            with pytest.raises(ValueError, match="their spread takes 2 of them, got max_matvecs=1"):
                measures.relative_flatness(objective, "0", method="examples", **options)
        else:
            found = measures.relative_flatness(objective, "0", method="examples", **options)
            assert found.matvecs <= most

    def test_seeds(self) -> None:
        objective = of_layer(mlp(5, 7, 4), batch(40, 5, 4), "0")
        one, two, three = (
            measures.relative_flatness(objective, "0", method="probes", rtol=0.3, seed=s).value
            for s in (0, 0, 1)
        )
        assert one == two != three

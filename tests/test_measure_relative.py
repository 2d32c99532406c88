"""Relative flatness: against dense Hessians, closed forms, invariances, and what it is not invariant to."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measured import (
    EPS,
    batch,
    blocks,
    close,
    convolutional,
    cross_entropy,
    dense_hessian,
    dense_value,
    kappa,
    mlp,
    of_layer,
    value,
)
from torch import Tensor, nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore import measures

pytestmark = pytest.mark.usefixtures("one_thread")

# A few hundred products and sums of float64 numbers; measured curvatures are within 1e-10 of torch.func by contract.
EXACT = 1e-10


class TestDefinition:
    @pytest.mark.parametrize("path", ["0", "4"])
    def test_every_form(self, path: str) -> None:
        data, model = batch(40, 5, 4), mlp(5, 7, 6, 4)
        objective = of_layer(model, data, path)
        ((W, H),) = blocks(model, data, path)
        for form in ("2021", "max", "simplified", "2019", "2019-max"):
            with untouched(model, *data):
                found = measures.relative_flatness(objective, path, standardize=False, form=form, rtol=1e-7)
            # An eigenvalue is as far off as the residual at most.
            assert close(found.value, dense_value(form, W, H), 1e-7 if form.endswith("max") else EXACT)
            assert abs(found.value - dense_value(form, W, H)) <= found.stderr + EXACT * found.value

    @pytest.mark.parametrize(("path", "groups"), [("0", 1), ("0", 2), ("2", 1)])
    def test_convolutions(self, path: str, groups: int) -> None:
        model, data = convolutional(groups)
        objective = of_layer(model, data, path)
        parts = blocks(model, data, path, groups if path == "0" else 1)
        whole = sum(float(W.square().sum()) for W, _ in parts)
        traces = sum(dense_value("simplified", W, H) / float(W.square().sum()) for W, H in parts)
        for form in ("2021", "max", "simplified"):
            expected = (
                whole * traces if form == "simplified" else sum(dense_value(form, W, H) for W, H in parts)
            )
            method = "auto" if form == "max" else "exact"
            found = measures.relative_flatness(
                objective, path, standardize=False, form=form, rtol=1e-7, method=method
            )
            assert close(found.value, expected, 1e-7 if form == "max" else EXACT)

    def test_weights_with_inputs_first(self) -> None:
        """The `Conv1D` of Hugging Face is a linear layer whose weight is transposed."""

        class Conv1D(nn.Module):
            def __init__(self, inner: nn.Linear) -> None:
                super().__init__()
                self.nf = inner.out_features
                self.weight = nn.Parameter(inner.weight.detach().T.clone())
                self.bias = nn.Parameter(inner.bias.detach().clone())

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight + self.bias

        data, model = batch(20, 5, 3), mlp(5, 6, 3, activation=nn.Tanh)
        other = nn.Sequential(Conv1D(model[0]), nn.Tanh(), Conv1D(model[2]))
        for path in ("0", "2"):
            objectives = [of_layer(m, data, path) for m in (model, other)]
            for form in ("2021", "simplified", "max"):
                values = [measures.relative_flatness(o, path, form=form, rtol=1e-8).value for o in objectives]
                assert close(*values, 1e-8 if form == "max" else EXACT)

    def test_means_the_loss_under_rotated_features(self) -> None:
        """E_O L(phi + d O phi) - L(phi) = d² kappa / (2 m) + O(d⁴). Signed permutations have the moments of the
        orthogonal group up to the third, and all of them can be visited."""
        (x, y), model = batch(12, 3, 3), mlp(3, 5, 3, activation=nn.Tanh)

        def rise(delta: float) -> float:
            total = 0.0
            for order in itertools.permutations(range(3)):
                for signs in itertools.product((-1.0, 1.0), repeat=3):
                    turned = x[:, list(order)] * torch.tensor(signs, dtype=torch.float64)
                    total += float(F.cross_entropy(model(x + delta * turned), y).detach()) / 48
            return total - float(F.cross_entropy(model(x), y).detach())

        delta = 1e-2
        second = 2 * 3 * (16 * rise(delta / 2) / delta**2 * 4 - rise(delta) / delta**2 * 4 * 1) / (4 * 3)
        # Richardson leaves d⁴ = 1e-8 times the sixth derivative; rounding is EPS / d² = 2e-12.
        assert close(second, value(model, (x, y), "0"), 1e-6)

    def test_linear_regression(self) -> None:
        """L = mean |W x - y|²: kappa = 2 |W|² E|x|²."""
        x = batch(30, 5, 3)[0]
        target, model = batch(30, 4, 3, seed=5)[0], mlp(5, 4)
        objective = fc.Objective(model, lambda z, t: (z - t).square().sum(1).mean(), (x, target))
        W = model[0].weight.detach()
        expected = 2 * float(W.square().sum() * x.square().sum(1).mean())
        assert close(
            measures.relative_flatness(objective, "0", standardize=False, method="exact").value,
            expected,
            EXACT,
        )

    @pytest.mark.parametrize("path", ["0", "2", "4"])
    def test_below_the_simplified_form(self, path: str) -> None:
        """Within a layer of a net of ReLUs the Hessian is positive semidefinite."""
        data, model = batch(40, 5, 4), mlp(5, 7, 6, 4)
        assert value(model, data, path) <= value(model, data, path, form="simplified")


class TestLastLayer:
    LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # noqa: RUF012
        "mean": F.cross_entropy,
        "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        "weights": lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([0.5, 2.0, 1.0, 3.0]).double()),
        "ignored": lambda z, y: F.cross_entropy(z, y, ignore_index=2),
        "smoothed": lambda z, y: F.cross_entropy(
            z, y, label_smoothing=0.2, weight=torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
        ),
        "probabilities": lambda z, y: F.cross_entropy(
            z, F.one_hot(y, 4).double() * 0.7 + 0.05, weight=torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
        ),
    }

    @pytest.mark.parametrize("width", [6, 3])  # more features than classes, and fewer
    @pytest.mark.parametrize("kind", list(LOSSES))
    def test_closed_form_is_the_exact_one(self, kind: str, width: int) -> None:
        data, model = batch(40, 5, 4), mlp(5, width, 4)
        objective = fc.Objective(model, self.LOSSES[kind], data, params=["2.weight"])
        for standardize, form in itertools.product((False, True), ("2021", "simplified", "2019")):
            options = {"form": form, "standardize": standardize}
            with untouched(model, *data):
                closed = measures.relative_flatness(objective, "2", method="closed", **options)
            exact = measures.relative_flatness(objective, "2", method="exact", **options)
            assert closed.matvecs == 0 and closed.method == "closed"
            assert close(closed.value, exact.value, EXACT)
            assert measures.relative_flatness(objective, "2", **options).value == closed.value

    def test_ragged_batches_and_sequences(self) -> None:
        """Logits of every position of a sequence, flattened for the loss, in batches of different size."""

        class Positions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = mlp(5, 6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x).flatten(0, 1)

        model, (x, y) = Positions(), batch(36, 5, 4)
        y[::5] = -100
        data = [(x[:21].view(7, 3, 5), y[:21]), (x[21:].view(5, 3, 5), y[21:])]
        objective = cross_entropy(model, data)
        closed = measures.relative_flatness(objective, "inner.2", method="closed")
        assert close(
            closed.value, measures.relative_flatness(objective, "inner.2", method="exact").value, EXACT
        )
        flat = cross_entropy(model.inner, (x, y))
        assert close(closed.value, measures.relative_flatness(flat, "2", method="closed").value, EXACT)

    def test_confident_predictions_lose_no_digits(self) -> None:
        """1 - |p|² and Var w are differences of large numbers where p is close to one class."""
        (x, y), model = batch(20, 5, 4), mlp(5, 4)
        with torch.no_grad():
            model[0].weight *= 60
        sure = model(x).softmax(1).max(1).values > 1 - 1e-7
        assert sure.sum() > 8
        x, y = x[sure], y[sure]
        W, p = model[0].weight.detach(), model(x).softmax(1).detach()
        squares = (W[:, None] - W).square().sum(2)  # |w_s - w_t|²
        pairs = 0.5 * (p[:, :, None] * p[:, None] * squares).sum((1, 2))
        found = measures.relative_flatness(cross_entropy(model, (x, y)), "0", standardize=False)
        assert close(found.value, float((x.square().sum(1) * pairs).mean()), 1000 * EPS)

    @pytest.mark.parametrize(
        "kind",
        ["scaled", "hooked", "in place", "subclass", "tied", "feature", "twice", "penalty", "other loss"],
    )
    def test_is_not_taken_where_it_does_not_hold(self, kind: str) -> None:
        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.front, self.last = mlp(5, 4, 4, activation=nn.Tanh), mlp(4, 4, seed=3)[0]
                if kind == "subclass":
                    self.last = Doubled(4, 4).double()
                if kind == "tied":
                    self.front[2].weight = self.last.weight
                if kind == "hooked":
                    self.last.register_forward_hook(lambda module, given, z: z * 2)
                if kind == "in place":
                    self.last.register_forward_hook(lambda module, given, z: z.mul_(2))

            def forward(self, x: Tensor) -> Tensor:
                phi = torch.tanh(self.front(x))
                if kind == "feature":
                    phi = phi @ self.last.weight
                if kind == "twice":
                    phi = self.last(phi)
                z = self.last(phi)
                return z / 2 if kind == "scaled" else z

        def loss(z: Tensor, y: Tensor) -> Tensor:
            if kind == "other loss":
                return F.mse_loss(z, F.one_hot(y, 4).double())
            value = F.cross_entropy(z, y)
            return value + z.square().mean() if kind == "penalty" else value

        torch.manual_seed(0)
        model, data = Model(), batch(30, 5, 4)
        objective = fc.Objective(model, loss, data)
        path = "front.2" if kind == "tied" else "last"
        found = measures.relative_flatness(objective, path, standardize=False)
        assert found.method == "exact"
        name = "front.2.weight" if kind == "tied" else "last.weight"
        place, weight = objective.parameter_slices[name], objective.parameters[name].detach()
        H = dense_hessian(objective, data)[place, place].view(*weight.shape, *weight.shape)
        assert close(found.value, kappa(weight, H), EXACT)
        with pytest.raises(ValueError, match=r"^method: the closed form"):
            measures.relative_flatness(objective, path, method="closed")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"form": "2022"}, "form: expected"),
            ({"method": "guess"}, "method: expected"),
            ({"form": "max", "method": "exact"}, "method: form="),
            ({"method": "closed"}, "method: 'closed' is for the last layer"),
            ({"layer": "1"}, "layer: expected a linear layer or convolution"),
            ({"layer": "9"}, "layer: expected a module path"),
            ({"rtol": 0}, "rtol: expected"),
            ({"max_matvecs": 0}, "max_matvecs: expected"),
            ({"seed": -1}, "seed: expected"),
        ],
    )
    def test_arguments(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            measures.relative_flatness(cross_entropy(mlp(5, 7, 3), batch(6, 5, 3)), **options)

    def test_objects(self) -> None:
        with pytest.raises(TypeError, match=r"^objective: expected"):
            measures.relative_flatness(mlp(5, 3), "0")
        with pytest.raises(TypeError, match=r"^layer: expected"):
            measures.relative_flatness(cross_entropy(mlp(5, 3), batch(6, 5, 3)), 0)
        unselected = cross_entropy(mlp(5, 7, 3), batch(6, 5, 3), params=["0.*"])
        with pytest.raises(ValueError, match="not a selected parameter"):
            measures.relative_flatness(unselected, "2")

    def test_a_layer_that_is_never_called(self) -> None:
        model = mlp(5, 3)
        wide = nn.ModuleDict({"used": model, "spare": mlp(5, 3)})
        wide.forward = lambda x: wide["used"](x)
        objective = cross_entropy(wide, batch(6, 5, 3))
        with pytest.raises(ValueError, match="not called by the model"):
            measures.relative_flatness(objective, "spare.0")
        with pytest.warns(fc.errors.FlatcoreWarning, match=r"left out: 'spare\.0'"):
            found = measures.relative_flatness(objective, rtol=0.5)
        assert list(found.by_layer) == ["used.0"]

"""Relative flatness: against dense Hessians, closed forms, invariances, and what it is not invariant to."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measured import EPS, Batch, batch, close, cross_entropy, dense_hessian, mlp
from torch import Tensor, nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore import measures

pytestmark = pytest.mark.usefixtures("one_thread")

# A few hundred products and sums of float64 numbers; measured curvatures are within 1e-10 of torch.func by contract.
EXACT = 1e-10
CONVOLUTION = 2, 4  # channels in and size of the images of `convolutional`


def blocks(model: nn.Module, data: Batch, path: str, groups: int = 1) -> list[tuple[Tensor, Tensor]]:
    """(W, H) of each group: (d, m) and (d, m, d, m), from the dense Hessian of everything."""
    objective = cross_entropy(model, data)
    weight = model.get_submodule(path).weight.detach()
    place = objective.parameter_slices[f"{path}.weight"]
    W = weight.reshape(groups, weight.shape[0] // groups, -1)
    size = W[0].numel()
    H = dense_hessian(objective, data)[place, place].view(groups, size, groups, size)
    return [(W[g], H[g, :, g].view(*W[g].shape, *W[g].shape)) for g in range(groups)]


def kappa(W: Tensor, H: Tensor) -> float:
    """The definition, one neuron after another."""
    d = range(len(W))
    return sum(float(W[s] @ W[t]) * float(H[s, :, t, :].diagonal().sum()) for s in d for t in d)


def dense_value(form: str, W: Tensor, H: Tensor) -> float:
    flat = H.reshape(W.numel(), W.numel())
    square = float(W.square().sum())
    if form == "max":
        tops = [float(torch.linalg.eigvalsh(H[s, :, s, :])[-1]) for s in range(len(W))]
        return sum(float(w @ w) * top for w, top in zip(W, tops, strict=True))
    if form == "2019-max":
        return square * float(torch.linalg.eigvalsh(flat)[-1])
    if form == "2021":
        return kappa(W, H)
    return square * float(flat.diagonal().sum()) / (W.numel() if form == "2019" else 1)


def convolutional(groups: int = 1) -> tuple[nn.Sequential, Batch]:
    torch.manual_seed(0)
    channels, size = CONVOLUTION
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3, groups=groups), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2, 3)
    )
    x = torch.randn(9, channels, size, size, dtype=torch.float64)
    return model.double(), (x * torch.tensor([1.0, 3.0]).view(2, 1, 1).double(), torch.arange(9) % 3)


def of_layer(model: nn.Module, data: object, path: str) -> fc.Objective:
    return cross_entropy(model, data, params=[f"{path}.weight"])


def value(model: nn.Module, data: object, path: str, **options: object) -> float:
    options = {"method": "exact", "standardize": False} | options
    return float(measures.relative_flatness(of_layer(model, data, path), path, **options).value)


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

    @pytest.mark.parametrize("kind", list(LOSSES))
    def test_closed_form_is_the_exact_one(self, kind: str) -> None:
        data, model = batch(40, 5, 4), mlp(5, 6, 4)
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
        "kind", ["scaled", "hooked", "tied", "feature", "twice", "penalty", "other loss"]
    )
    def test_is_not_taken_where_it_does_not_hold(self, kind: str) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.front, self.last = mlp(5, 4, 4, activation=nn.Tanh), mlp(4, 4, seed=3)[0]
                if kind == "tied":
                    self.front[2].weight = self.last.weight
                if kind == "hooked":
                    self.last.register_forward_hook(lambda module, given, z: z * 2)

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
            return F.cross_entropy(z, y) + (z.square().mean() if kind == "penalty" else 0)

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


class TestInvariances:
    def test_scaling_outputs(self) -> None:
        """Each neuron in front of a ReLU by its own factor, and the whole layer by one."""
        data, model = batch(40, 5, 4), mlp(5, 7, 6, 4)
        original = value(model, data, "2")
        for c in (torch.linspace(0.1, 8, 6, dtype=torch.float64), torch.full((6,), 7.0, dtype=torch.float64)):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other[2].weight *= c[:, None]
                other[2].bias *= c
                other[4].weight /= c
            assert close(original, value(other, data, "2"), EXACT)

    def test_rotating_features(self) -> None:
        (x, y), model = batch(40, 5, 4), mlp(5, 7, 4)
        x *= torch.arange(1.0, 6.0, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double())[0]
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.copy_(model[0].weight @ rotation)
        objectives = of_layer(model, (x, y), "0"), of_layer(other, (x @ rotation, y), "0")
        for form, standardize in (("2021", False), ("simplified", False), ("2021", True)):
            options = {"form": form, "standardize": standardize, "method": "exact"}
            values = [measures.relative_flatness(o, "0", **options).value for o in objectives]
            assert close(*values, 0.01 if standardize else EXACT) == (not standardize)

    def test_scaling_inputs_needs_standardised_features(self) -> None:
        data, model = batch(40, 5, 4), mlp(5, 7, 6, 4)
        c = torch.linspace(0.1, 8, 7, dtype=torch.float64)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight *= c[:, None]
            other[0].bias *= c
            other[2].weight /= c
        objectives = [of_layer(m, data, "2") for m in (model, other)]
        for form, method in (("2021", "exact"), ("simplified", "exact"), ("max", "auto")):
            options = {"form": form, "method": method, "rtol": 1e-8}
            raw, standard = (
                [measures.relative_flatness(o, "2", standardize=s, **options).value for o in objectives]
                for s in (False, True)
            )
            assert not close(*raw, 0.1)
            assert close(*standard, 1e-8 if form == "max" else EXACT)

    def test_standardising_is_dividing_the_features(self) -> None:
        """The layer before divided, the layer itself multiplied, by the deviations over all batches."""
        (x, y), model = batch(40, 5, 4), mlp(5, 7, 4)
        s = model[:2](x).detach().std(0, correction=0)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight /= s[:, None]
            other[0].bias /= s
            other[2].weight *= s
        ragged = [(x[:11], y[:11]), (x[11:], y[11:])]
        found = value(model, ragged, "2", standardize=True)
        assert close(found, value(other, (x, y), "2"), EXACT)

    def test_features_that_never_change(self) -> None:
        (x, y), model = batch(40, 5, 4), mlp(5, 7, 4)
        with torch.no_grad():
            model[0].bias[3] = -100
        assert close(
            value(model, (x, y), "2", standardize=True),
            value(model, (x, y), "2", standardize=True, method="closed"),
            EXACT,
        )
        x[:, 2] = 1.5
        found = value(model, (x, y), "0", standardize=True)
        ((W, H),) = blocks(model, (x, y), "0")
        s = x.std(0, correction=0)
        inverse = torch.where(s > 0, 1 / s, 1.0)
        assert close(found, kappa(W * s, H * inverse[:, None, None] * inverse), EXACT)

    def test_standardising_convolutions_by_channel(self) -> None:
        model, (x, y) = convolutional()
        s = x.std((0, 2, 3), correction=0)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight *= s[:, None, None]
        found = value(model, (x, y), "0", standardize=True)
        assert close(found, value(other, (x / s[:, None, None], y), "0"), EXACT)

    def test_temperature_counts(self) -> None:
        data, model = batch(40, 5, 4), mlp(5, 7, 4)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[2].weight *= 3
            other[2].bias *= 3
        assert not close(value(model, data, "2"), value(other, data, "2"), 0.1)


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
        assert found.method == "exact" and found.matvecs == 81 + 16 and found.stderr == 0

    def test_not_reached_is_told(self) -> None:
        data, model = batch(40, 5, 4), mlp(5, 7, 4)
        with pytest.warns(fc.errors.FlatcoreWarning, match="max_matvecs"):
            found = measures.relative_flatness(
                cross_entropy(model, data), "0", method="probes", max_matvecs=20
            )
        assert found.matvecs == 20 and "rtol" in found.status and math.isfinite(found.stderr)

    def test_seeds(self) -> None:
        objective = of_layer(mlp(5, 7, 4), batch(40, 5, 4), "0")
        one, two, three = (
            measures.relative_flatness(objective, "0", method="probes", rtol=0.3, seed=s).value
            for s in (0, 0, 1)
        )
        assert one == two != three


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
        with pytest.raises(ValueError, match="no batch reaches"):
            measures.relative_flatness(cross_entropy(wide, batch(6, 5, 3)), "spare.0")

"""Measures from the spectrum, in units of layers, and of paths: against dense matrices and closed forms."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from measured import Batch, batch, close, cross_entropy, dense_hessian, mlp, rescaled
from reference import Reference
from torch import Tensor, nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
LANCZOS = 1e-7  # the residual asked for; the eigenvalue is closer


def setting(activation: type[nn.Module] = nn.ReLU) -> tuple[fc.Objective, Batch, Tensor]:
    data, model = batch(30, 5, 3), mlp(5, 6, 3, activation=activation)
    objective = cross_entropy(model, data)
    return objective, data, dense_hessian(objective, data)


def scaled_layers(model: nn.Sequential, factors: list[float]) -> nn.Sequential:
    """W_l times a_l, biases along with the activations in front of them; the product of the factors is one."""
    other, product = copy.deepcopy(model), 1.0
    with torch.no_grad():
        for layer, a in zip([m for m in other if isinstance(m, nn.Linear)], factors, strict=True):
            product *= a
            layer.weight *= a
            if layer.bias is not None:
                layer.bias *= product
    return other


class TestSpectrum:
    def test_against_all_eigenvalues(self) -> None:
        objective, data, H = setting(nn.Tanh)
        eigenvalues = torch.linalg.eigvalsh(H)
        with untouched(objective.model, *data):
            top = measures.lambda_max(objective, tol=LANCZOS)
            condition = measures.condition_number(objective, tol=LANCZOS)
            total = measures.trace(objective, method="exact")
            ratio = measures.participation_ratio(objective, method="exact")
        assert close(top.value, float(eigenvalues[-1]), LANCZOS)
        assert close(condition.value, float(eigenvalues[-1] / eigenvalues[0]), 1e-4)
        assert close(total.value, float(eigenvalues.sum()), EXACT)
        assert close(ratio.value, float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()), EXACT)

    def test_of_the_gauss_newton_matrix(self) -> None:
        objective, data, _ = setting()
        G = Reference(objective.model, F.cross_entropy, data, "output_target").ggn()
        lambdas = torch.linalg.eigvalsh(G).clamp(min=0)
        dimension = measures.effective_dimension(objective, 0.01, method="exact")
        assert close(dimension.value, float((lambdas / (lambdas + 0.01)).sum()), EXACT)
        volume = measures.log_volume(objective, 0.1, 0.01, method="exact")
        P = len(lambdas)
        ball = P / 2 * math.log(math.pi) - math.lgamma(P / 2 + 1)
        exact = P / 2 * math.log(0.2) + ball - 0.5 * float((lambdas + 0.01).log().sum())
        assert close(volume.value, exact, EXACT)

    def test_volume_of_an_ellipse(self) -> None:
        """Two parameters: pi times the half axes sqrt(2 epsilon / lambda)."""
        x = torch.tensor([[1.0, 0.5], [0.2, 2.0], [0.3, -1.0]], dtype=torch.float64)
        model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
        objective = fc.Objective(model, F.mse_loss, (x, x[:, :1]))
        a, b = torch.linalg.eigvalsh(2 / 3 * x.T @ x).tolist()
        area = math.pi * math.sqrt(2 * 0.1 / a) * math.sqrt(2 * 0.1 / b)
        found = measures.log_volume(objective, 0.1, 0.0, curvature="hessian")
        assert close(found.value, math.log(area), EXACT)

    def test_singular(self) -> None:
        """Logits may all move together, so the Hessian of a softmax layer is singular."""
        data = batch(30, 5, 3)
        with pytest.warns(FlatcoreWarning, match="least eigenvalue is zero to the rounding"):
            found = measures.condition_number(cross_entropy(mlp(5, 3), data), tol=1e-9)
        assert math.isinf(found.value) and math.isnan(found.stderr)

    def test_not_invariant_to_scaling_neurons(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 6, 3)
        one, other = (cross_entropy(m, data) for m in (model, rescaled(model, largest=6)))
        for measure in (measures.trace, measures.lambda_max, measures.participation_ratio):
            assert not close(measure(one).value, measure(other).value, 0.05)
        dimensions = [measures.effective_dimension(o, 0.01, method="exact").value for o in (one, other)]
        assert not close(*dimensions, 0.01)

    def test_refuses(self) -> None:
        objective, _, _ = setting()
        with pytest.raises(ValueError, match=r"^curvature: expected"):
            measures.trace(objective, curvature="fisher")
        with pytest.raises(ValueError, match=r"^z: expected"):
            measures.effective_dimension(objective, 0)
        with pytest.raises(ValueError, match=r"^epsilon: expected"):
            measures.log_volume(objective, -1, 0.1)
        with pytest.raises(TypeError, match=r"^objective: expected"):
            measures.lambda_max(objective.model)


class TestEdgeOfStability:
    @pytest.mark.parametrize(
        "options", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"weight_decay": 3.0}]
    )
    def test_thresholds_of_sgd(self, options: dict[str, float]) -> None:
        """torch's own SGD on a quadratic in one parameter dies out just below one and grows just above."""
        for relative in (0.99, 1.01):
            w, lr, decay = (
                nn.Parameter(torch.ones(1, 1, dtype=torch.float64)),
                0.1,
                options.get("weight_decay", 0.0),
            )
            momentum, nesterov = options.get("momentum", 0.0), options.get("nesterov", False)
            curvature = relative * (2 + 2 * momentum) / (lr * (1 + 2 * momentum if nesterov else 1)) - decay
            model = nn.Linear(1, 1, bias=False).double()
            model.weight = w
            x = torch.full((1, 1), curvature**0.5, dtype=torch.float64)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
            objective = fc.Objective(
                model, lambda z, t: 0.5 * (z - t).square().mean(), (x, torch.zeros(1, 1).double())
            )
            assert close(measures.edge_of_stability(objective, optimizer).value, relative, EXACT)
            if not decay:
                by_hand = measures.edge_of_stability(objective, lr, momentum=momentum, nesterov=nesterov)
                assert close(by_hand.value, relative, EXACT)
            for _ in range(1000):
                optimizer.zero_grad()
                (0.5 * curvature * w.square()).sum().backward()
                optimizer.step()
            assert (abs(float(w.detach())) > 10) == (relative > 1) and (abs(float(w.detach())) < 0.1) == (
                relative < 1
            )

    @pytest.mark.parametrize("decay", [0.0, 0.5])
    def test_adam(self, decay: float) -> None:
        objective, (x, y), H = setting(nn.Tanh)
        optimizer = torch.optim.Adam(
            objective.model.parameters(), lr=0.01, betas=(0.8, 0.99), weight_decay=decay
        )
        with pytest.raises(ValueError, match="take a step"):
            measures.edge_of_stability(objective, optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(objective.model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        H = dense_hessian(objective, (x, y)) + decay * torch.eye(len(H), dtype=torch.float64)
        v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in objective.model.parameters()])
        c = ((v / (1 - 0.99**5)).sqrt() + 1e-8).rsqrt()
        found = measures.edge_of_stability(objective, optimizer, tol=LANCZOS)
        top = float(torch.linalg.eigvalsh(c[:, None] * H * c)[-1])
        assert close(found.details["lambda_max"], top, LANCZOS)
        assert close(found.details["threshold"], 3.6 / (0.2 * 0.01), 1e-14)
        assert close(found.value, top / found.details["threshold"], LANCZOS)

    def test_threshold_of_adam(self) -> None:
        """With P held fixed, m = b m + (1 - b) g, w -= lr m / P."""
        for relative in (0.99, 1.01):
            b, lr, P = 0.9, 0.01, 3.0
            curvature, w, m = relative * 38 / lr * P, 1.0, 0.0
            for _ in range(3000):
                m = b * m + (1 - b) * curvature * w
                w -= lr * m / P
            assert (abs(w) > 10) == (relative > 1)

    def test_refuses(self) -> None:
        objective, _, _ = setting()
        parameters = list(objective.model.parameters())
        for message, given in {
            "lr: expected a positive": -0.1,
            "lr: expected SGD without dampening": torch.optim.SGD(
                parameters, lr=0.1, dampening=0.1, momentum=0.2
            ),
            "lr: expected one learning rate": torch.optim.SGD(
                [{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:], "lr": 0.1}]
            ),
            "lr: expected an optimizer of the selected": torch.optim.SGD(parameters[:1], lr=0.1),
        }.items():
            with pytest.raises(ValueError, match=f"^{message}"):
                measures.edge_of_stability(objective, given)
        with pytest.raises(TypeError, match=r"^lr: expected"):
            measures.edge_of_stability(objective, torch.optim.Adagrad(parameters))
        with pytest.raises(ValueError, match=r"^momentum: expected"):
            measures.edge_of_stability(objective, 0.1, momentum=1.0)


class TestFisherRao:
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_homogeneous_nets(self, depth: int) -> None:
        """Depth² times E Var_p f, and empirically depth² E (<p, f> - f_y)²."""
        (x, y), model = batch(30, 5, 4), mlp(*(5, 6, 7)[:depth], 4, bias=False)
        objective = cross_entropy(model, (x, y))
        f = model(x).detach()
        p = f.softmax(1)
        mean = (p * f).sum(1)
        variance = (p * (f - mean[:, None]).square()).sum(1)
        residual = mean - f.gather(1, y[:, None])[:, 0]
        with untouched(model, x, y):
            assert close(measures.fisher_rao(objective).value, depth**2 * float(variance.mean()), EXACT)
            empirical = measures.fisher_rao(objective, empirical=True)
        assert close(empirical.value, depth**2 * float(residual.square().mean()), EXACT)

    def test_with_biases(self) -> None:
        objective, data, _ = setting(nn.Tanh)
        reference = Reference(objective.model, F.cross_entropy, data, "output_target")
        assert close(
            measures.fisher_rao(objective).value,
            float(reference.flat @ reference.ggn() @ reference.flat),
            EXACT,
        )
        C = reference.covariance(30)
        assert close(
            measures.fisher_rao(objective, empirical=True).value,
            float(reference.flat @ C @ reference.flat),
            EXACT,
        )

    def test_invariances(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        values = [measures.fisher_rao(cross_entropy(m, data)).value for m in (model, rescaled(model))]
        assert close(*values, 1e-9)
        hotter = copy.deepcopy(model)
        with torch.no_grad():
            hotter[2].weight *= 3
            hotter[2].bias *= 3
        assert not close(values[0], measures.fisher_rao(cross_entropy(hotter, data)).value, 0.1)


class TestPathNorm:
    def test_all_paths(self) -> None:
        """From every input and every bias, with the weights along the way squared."""
        data, model = batch(6, 3, 2), mlp(3, 4, 2)
        W, b, V, c = (p.detach() for p in model.parameters())
        paths = sum(
            float(V[k, j] ** 2 * W[j, i] ** 2) for k, j, i in itertools.product(range(2), range(4), range(3))
        )
        paths += sum(float(V[k, j] ** 2 * b[j] ** 2) for k, j in itertools.product(range(2), range(4)))
        paths += float(c.square().sum())
        with untouched(model, *data):
            found = measures.path_norm(cross_entropy(model, data))
        assert close(found.value, paths, EXACT) and close(found.details["root"], paths**0.5, EXACT)

    def test_batch_normalisation_is_a_layer(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
        )
        model = model.double().eval()
        norm = model[1]
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.copy_(torch.randn(3))
        norm.running_var.copy_(torch.rand(3) + 0.5)
        data = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.arange(5) % 2
        folded = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), copy.deepcopy(model[4])).double()
        scale = (norm.running_var + norm.eps).rsqrt() * norm.weight.detach()
        with torch.no_grad():
            folded[0].weight.copy_(model[0].weight * scale[:, None, None, None])
            folded[0].bias.copy_(norm.bias - norm.running_mean * scale)
        assert torch.allclose(model(data[0]), folded(data[0]))
        with untouched(model, *data):
            one = measures.path_norm(cross_entropy(model, data)).value
        assert close(one, measures.path_norm(cross_entropy(folded, data)).value, EXACT)

    def test_invariances(self) -> None:
        data, model = batch(6, 3, 2), mlp(3, 4, 5, 2)
        value = measures.path_norm(cross_entropy(model, data)).value
        assert close(value, measures.path_norm(cross_entropy(rescaled(model), data)).value, 1e-10)
        linear = mlp(3, 4, 2, activation=nn.Identity)
        rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())[0]
        turned = copy.deepcopy(linear)
        with torch.no_grad():
            turned[0].weight.copy_(rotation @ linear[0].weight)
            turned[0].bias.copy_(rotation @ linear[0].bias)
            turned[2].weight.copy_(linear[2].weight @ rotation.T)
        assert torch.allclose(linear(data[0]), turned(data[0]))
        assert not close(*(measures.path_norm(cross_entropy(m, data)).value for m in (linear, turned)), 0.01)

    def test_refuses(self) -> None:
        data = batch(6, 3, 2)
        for layer in (nn.LayerNorm(4), nn.Tanh()):
            model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)).double()
            with pytest.raises(ValueError, match="path norm does not apply"):
                measures.path_norm(cross_entropy(model, data))
        by_model = fc.Objective(mlp(3, 2), fc.ModelLoss(lambda m, b: F.cross_entropy(m(b[0]), b[1])), data)
        with pytest.raises(ValueError, match=r"^loss: expected"):
            measures.path_norm(by_model)


class TestLayerScales:
    def test_quotient_sharpness_is_dense(self) -> None:
        objective, data, H = setting(nn.Tanh)
        c = torch.cat([p.detach().norm().expand(p.numel()) for p in objective.model.parameters()])
        with untouched(objective.model, *data):
            found = measures.quotient_sharpness(objective, tol=LANCZOS)
        assert close(found.value, float(torch.linalg.eigvalsh(c[:, None] * H * c)[-1]), LANCZOS)

    @pytest.mark.parametrize("bias", [False, True])
    def test_scaling_layers_but_not_neurons(self, bias: bool) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 6, 3, bias=bias)
        nets = (model, scaled_layers(model, [3.0, 0.2, 1 / 0.6]), rescaled(model, largest=4))
        objectives = [cross_entropy(m, data) for m in nets]
        for measure, options in (
            (measures.quotient_sharpness, {"tol": LANCZOS}),
            (measures.minimum_sharpness, {"method": "exact"}),
        ):
            one, layers, neurons = (measure(o, **options).value for o in objectives)
            assert close(one, layers, 10 * LANCZOS if "tol" in options else EXACT)
            assert not close(one, neurons, 0.05)

    def test_minimum_sharpness_without_biases(self) -> None:
        """m (t_1 ... t_m)^(1/m)"""
        data, model = batch(30, 5, 3), mlp(5, 7, 6, 3, bias=False)
        objective = cross_entropy(model, data)
        H, slices = dense_hessian(objective, data), objective.parameter_slices
        t = [float(H.diagonal()[s].sum()) for s in slices.values()]
        with untouched(model, *data):
            found = measures.minimum_sharpness(objective, method="exact")
        assert close(found.value, 3 * math.prod(t) ** (1 / 3), EXACT)
        assert close(math.prod(m.details["scale"] for m in found.by_layer.values()), 1.0, 1e-12)

    def test_minimum_sharpness_is_reached_and_least(self) -> None:
        """The trace of the net at the scales found; any other scales have a larger one."""
        data, model = batch(30, 5, 3), mlp(5, 7, 6, 3)
        objective = cross_entropy(model, data)
        found = measures.minimum_sharpness(objective, method="exact")
        scales = [m.details["scale"] for m in found.by_layer.values()]

        def trace(factors: list[float]) -> float:
            scaled = cross_entropy(scaled_layers(model, factors), data)
            return float(fc.trace(fc.Hessian(scaled), method="exact").value)

        assert close(found.value, trace(scales), EXACT)
        assert found.value < trace([1.0, 1.0, 1.0])
        assert found.value < trace([scales[0] * 1.05, scales[1] / 1.05, scales[2]])
        assert found.value < trace([scales[0] * 0.95, scales[1], scales[2] / 0.95])

    def test_one_layer_has_no_scales(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 3)
        objective = cross_entropy(model, data)
        found = measures.minimum_sharpness(objective, method="exact")
        assert close(found.value, float(dense_hessian(objective, data).trace()), EXACT)

    def test_refuses(self) -> None:
        data = batch(30, 5, 3)
        normed = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
        with pytest.raises(ValueError, match=r"'1\.weight' of another module"):
            measures.minimum_sharpness(cross_entropy(normed, data))
        dead = mlp(5, 6, 3)
        with torch.no_grad():
            dead[0].bias.fill_(-100)
        with pytest.raises(ValueError, match="expected positive traces"):
            measures.minimum_sharpness(cross_entropy(dead, data))
        with pytest.raises(ValueError, match=r"^curvature: expected"):
            measures.minimum_sharpness(cross_entropy(mlp(5, 3), data), curvature="fisher")

"""Relative flatness as a training term: its value, and its true gradient against finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measured import Batch, batch, close, cross_entropy, mlp
from torch import Tensor, nn
from untouched import one_thread  # noqa: F401

from flatcore import measures, optim

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


def small(activation: Callable[[], nn.Module] = nn.Tanh) -> tuple[nn.Sequential, Batch]:
    return mlp(3, 4, 3, activation=activation), batch(7, 3, 3)


def convolutional() -> tuple[nn.Sequential, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    return model, (torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.arange(5) % 3)


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))])


def by_differences(model: nn.Module, value: Callable[[nn.Module], float], step: float = 1e-3) -> Tensor:
    """Central differences of the fourth order: h⁴ of truncation, eps / h of rounding, both about 1e-12."""
    other = copy.deepcopy(model)
    slopes = []
    for p in other.parameters():
        flat = p.data.view(-1)
        for i in range(len(flat)):
            at = float(flat[i])
            values = []
            for k in (-2, -1, 1, 2):
                flat[i] = at + k * step
                values.append(value(other))
            flat[i] = at
            slopes.append((values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step))
    return torch.tensor(slopes, dtype=torch.float64)


class TestValue:
    @pytest.mark.parametrize(("build", "layer"), [(small, "0"), (small, "2"), (convolutional, "0")])
    def test_is_the_measure(self, build: Callable[[], tuple[nn.Sequential, Batch]], layer: str) -> None:
        model, data = build()
        exact = measures.relative_flatness(
            cross_entropy(model, data), layer, standardize=False, method="exact"
        )
        found = optim.relative_flatness_penalty(model, F.cross_entropy, data, layer, method="exact")
        assert close(float(found.flatness.detach()), exact.value, EXACT)
        assert close(
            float(found.loss.detach()), float(F.cross_entropy(model(data[0]), data[1]).detach()), 1e-15
        )

    @pytest.mark.parametrize(
        "loss",
        [
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
            nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0]).double(), ignore_index=1),
        ],
    )
    def test_closed_form(self, loss: nn.Module) -> None:
        model, data = small()
        found = optim.relative_flatness_penalty(model, loss, data, "2")
        exact = optim.relative_flatness_penalty(model, loss, data, "2", method="exact")
        assert found.method == "closed"
        assert close(float(found.flatness.detach()), float(exact.flatness.detach()), EXACT)
        one, other = gradient(found.flatness, model), gradient(exact.flatness, model)
        assert (one - other).norm() <= EXACT * other.norm()

    def test_closed_form_is_refused_where_it_does_not_hold(self) -> None:
        model, data = small()
        tied = mlp(3, 3, 3, activation=nn.Tanh)
        tied[2].weight = tied[0].weight

        class Reused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.last = nn.Linear(3, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                return self.last(torch.tanh(x @ self.last.weight))

        def smoothed(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y) + 0.1 * z.square().mean()

        class Halved(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 0.5 * super().forward(x)

        halved, hooked, overwritten = (nn.Sequential(*small()[0]) for _ in range(3))
        halved[2] = Halved(4, 3).double()
        hooked[2].register_forward_hook(lambda module, given, z: 2 * z)
        overwritten[2].register_forward_hook(lambda module, given, z: z.mul_(2))
        cases = [
            (model, F.cross_entropy, "0"),
            (tied, F.cross_entropy, "2"),
            (Reused(), F.cross_entropy, "last"),
            (model, smoothed, "2"),
            (halved, F.cross_entropy, "2"),
            (hooked, F.cross_entropy, "2"),
            (overwritten, F.cross_entropy, "2"),
        ]
        for net, loss, layer in cases:
            assert optim.relative_flatness_penalty(net, loss, data, layer).method == "probes"
            with pytest.raises(ValueError, match=r"^method: the closed form"):
                optim.relative_flatness_penalty(net, loss, data, layer, method="closed")

    def test_probes_are_unbiased_in_value_and_gradient(self) -> None:
        """Within 4 standard errors of the exact numbers, entry by entry; 29 entries and a value."""
        model, data = small()
        exact = optim.relative_flatness_penalty(model, F.cross_entropy, data, "0", method="exact")
        truth = torch.cat([exact.flatness.detach()[None], gradient(exact.flatness, model)])
        generator, draws = torch.Generator().manual_seed(0), []
        for _ in range(400):
            found = optim.relative_flatness_penalty(
                model, F.cross_entropy, data, "0", method="probes", generator=generator
            )
            draws.append(torch.cat([found.flatness.detach()[None], gradient(found.flatness, model)]))
        samples = torch.stack(draws)
        away = (samples.mean(0) - truth).abs()
        assert (away <= 4 * samples.std(0) / math.sqrt(len(draws)) + 1e-14).all()


class TestGradient:
    @pytest.mark.parametrize(("build", "layer"), [(small, "0"), (small, "2"), (convolutional, "0")])
    def test_against_finite_differences(
        self, build: Callable[[], tuple[nn.Sequential, Batch]], layer: str
    ) -> None:
        model, data = build()

        def value(net: nn.Module) -> float:
            out = optim.relative_flatness_penalty(net, F.cross_entropy, data, layer, method="exact")
            return float(out.flatness.detach())

        found = optim.relative_flatness_penalty(model, F.cross_entropy, data, layer, method="exact")
        expected = by_differences(model, value)
        difference = gradient(found.flatness, model) - expected
        assert difference.norm() <= 1e-8 * expected.norm()

    def test_probes_against_finite_differences(self) -> None:
        """With the same signs at every point the estimate is a smooth function too."""
        model, data = small()

        def flatness(net: nn.Module) -> Tensor:
            generator = torch.Generator().manual_seed(3)
            options = {"method": "probes", "probes": 2, "generator": generator}
            return optim.relative_flatness_penalty(net, F.cross_entropy, data, "0", **options).flatness

        expected = by_differences(model, lambda net: float(flatness(net).detach()))
        assert (gradient(flatness(model), model) - expected).norm() <= 1e-8 * expected.norm()

    def test_third_derivatives_count(self) -> None:
        """Without them, as with the Hessian's blocks detached, other layers would get no gradient at all."""
        model, data = small()
        found = optim.relative_flatness_penalty(model, F.cross_entropy, data, "2", method="exact")
        grads = torch.autograd.grad(found.flatness, list(model.parameters()))
        assert all(float(g.abs().max()) > 1e-3 for g in grads)

    def test_training_lowers_the_measure(self) -> None:
        values = []
        for strength in (0.0, 0.3):
            model, data = small(nn.ReLU)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            for _ in range(60):
                optimizer.zero_grad()
                out = optim.relative_flatness_penalty(model, F.cross_entropy, data, "2")
                (out.loss + strength * out.flatness).backward()
                optimizer.step()
            values.append(float(out.flatness.detach()))
        assert values[1] < 0.5 * values[0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"layer": "1"}, ValueError, "layer: expected a linear"),
            ({"layer": "9"}, ValueError, "layer: expected a module path"),
            ({"layer": 0}, ValueError, "layer: expected a module path"),
            ({"method": "guess"}, ValueError, "method: expected"),
            ({"probes": 0}, ValueError, "probes: expected"),
            ({"model": F.relu}, TypeError, "model: expected"),
            ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, "loss: expected"),
            ({"batch": torch.ones(3, 3)}, ValueError, "batch: expected"),
        ],
    )
    def test_arguments(self, options: dict[str, object], error: type[Exception], message: str) -> None:
        model, data = small()
        arguments = {"model": model, "loss": F.cross_entropy, "batch": data, "layer": "2"} | options
        with pytest.raises(error, match=f"^{message}"):
            optim.relative_flatness_penalty(**arguments)

    def test_frozen_layer(self) -> None:
        model, data = small()
        model[2].weight.requires_grad_(False)
        for method in ("auto", "exact", "probes"):
            with pytest.raises(
                ValueError, match=r"^layer: expected a layer whose weight is trained, got '2'"
            ):
                optim.relative_flatness_penalty(model, F.cross_entropy, data, "2", method=method)

    def test_unused_layer(self) -> None:
        model, data = small()
        wide = nn.ModuleDict({"used": model, "spare": mlp(5, 3)})
        wide.forward = lambda x: wide["used"](x)
        with pytest.raises(ValueError, match="depends on"):
            optim.relative_flatness_penalty(wide, F.cross_entropy, data, "spare.0")

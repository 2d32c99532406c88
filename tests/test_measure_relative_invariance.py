"""What leaves relative flatness as it is, and what does not."""

from __future__ import annotations

import copy

import pytest
import torch
from measured import batch, blocks, close, convolutional, kappa, mlp, of_layer, value
from untouched import one_thread  # noqa: F401

from flatcore import measures

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


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

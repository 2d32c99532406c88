"""What every measure is invariant to and what it is not, and how it follows the scale of the loss: one table each."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measured import Batch, batch, close, cross_entropy, mlp, rescaled
from torch import Tensor, nn
from untouched import one_thread  # noqa: F401

import flatcore as fc
from flatcore import measures as m

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-9
LANCZOS = 1e-9  # the relative residual asked for; the eigenvalue is closer
Function = Callable[[fc.Objective], m.Measure]

# Of one deterministic number each.
SPECTRAL: dict[str, Function] = {
    "trace": partial(m.trace, method="exact"),
    "lambda_max": partial(m.lambda_max, tol=LANCZOS),
    "effective_dimension": lambda o: m.effective_dimension(o, 0.01, method="exact"),
    "log_volume": lambda o: m.log_volume(o, 0.1, 0.01, method="exact"),
    "participation_ratio": partial(m.participation_ratio, method="exact"),
    "edge_of_stability": lambda o: m.edge_of_stability(o, 0.1, tol=LANCZOS),
    "soft_rank": lambda o: m.soft_rank(o, 0.01, method="exact"),
    "generalization_gap": lambda o: m.generalization_gap(o, 0.01, method="exact"),
    "sam_sharpness": lambda o: m.sam_sharpness(o, 0.1),
    "fisher_rao": m.fisher_rao,
    "fisher_rao empirical": partial(m.fisher_rao, empirical=True),
}
BY_WEIGHT: dict[str, Function] = {
    "adaptive_sharpness_average": lambda o: m.adaptive_sharpness_average(o, 0.3),
    "adaptive_sharpness_worst": lambda o: m.adaptive_sharpness_worst(o, 0.1),
    "local_energy": lambda o: of_curve(m.local_energy(o, 0.3, "loss", draws=20)),
}
BY_LAYER: dict[str, Function] = {
    "quotient_sharpness": partial(m.quotient_sharpness, tol=LANCZOS),
    "minimum_sharpness": partial(m.minimum_sharpness, method="exact"),
}
FLATNESS: dict[str, Function] = {
    form: partial(m.relative_flatness, layer="2", standardize=False, form=form, rtol=LANCZOS)
    for form in ("2021", "max", "simplified", "2019", "2019-max")
}
NOISE: dict[str, Function] = {
    "asam_sharpness": lambda o: m.asam_sharpness(o, 0.1),
    "lpf": lambda o: m.lpf(o, 0.1),
    "pac_bayes_sigma": m.pac_bayes_sigma,
    "path_norm": m.path_norm,
}


def of_curve(measure: m.Measure) -> m.Measure:
    return m.Measure(float(measure.value[0]), float(measure.stderr[0]), None, "", 0)


def half_squares(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (z - t).square().sum(1).mean()


def setting(*widths: int) -> tuple[nn.Sequential, Batch]:
    return mlp(*(widths or (5, 7, 3))), batch(30, 5, 3)


class Turned(nn.Module):
    """A net 4-5-3 of tanh whose parameters are Q times its one parameter."""

    def __init__(self, flat: Tensor, Q: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(Q.T @ flat)
        self.register_buffer("Q", Q)

    def forward(self, x: Tensor) -> Tensor:
        W, b, V, c = (self.Q @ self.weight).split([20, 5, 15, 3])
        return torch.tanh(x @ W.view(5, 4).T + b) @ V.view(3, 5).T + c


@pytest.fixture(scope="module")
def turned() -> tuple[fc.Objective, fc.Objective]:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(43, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(43, 43, generator=generator, dtype=torch.float64))[0]
    data = batch(25, 4, 3)
    one, other = (cross_entropy(Turned(flat, q), data) for q in (torch.eye(43).double(), Q))
    assert close(one.loss(), other.loss(), 1e-13)
    return one, other


class TestRotationsOfTheParameters:
    @pytest.mark.parametrize("name", list(SPECTRAL))
    def test_change_nothing(self, turned: tuple[fc.Objective, fc.Objective], name: str) -> None:
        assert close(*(SPECTRAL[name](o).value for o in turned), EXACT)

    def test_change_no_mean(self, turned: tuple[fc.Objective, fc.Objective]) -> None:
        """The noise is not turned along, so the estimates differ, but not by more than their errors."""
        for measure in (
            partial(m.lpf, sigma=0.1, draws=400),
            partial(m.local_entropy, gamma=3.0, beta=20.0, steps=80),
            lambda o: of_curve(m.local_energy(o, 0.1, "loss", draws=200, noise="additive")),
        ):
            one, other = (measure(o) for o in turned)
            assert 0 < abs(one.value - other.value) <= 4 * math.hypot(one.stderr, other.stderr)

    @pytest.mark.parametrize(
        "name", ["adaptive_sharpness_average", "adaptive_sharpness_worst", "local_energy", "asam_sharpness"]
    )
    def test_change_what_looks_at_single_weights(
        self, turned: tuple[fc.Objective, fc.Objective], name: str
    ) -> None:
        assert not close(*((BY_WEIGHT | NOISE)[name](o).value for o in turned), 0.01)

    def test_change_the_diagonal(self, turned: tuple[fc.Objective, fc.Objective]) -> None:
        assert not close(*(m.soft_rank(o, 0.01, method="diagonal").value for o in turned), 0.01)


class TestRotationsOfFeatures:
    """Of the inputs, W Qᵀ for W and Q x for x: within the first layer, whose norm stays."""

    @pytest.mark.parametrize("name", ["quotient_sharpness", "minimum_sharpness", "path_norm"])
    def test_change_nothing(self, name: str) -> None:
        model, (x, y) = setting()
        Q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double())[0]
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.copy_(model[0].weight @ Q.T)
        measure = (BY_LAYER | NOISE)[name]
        assert close(
            measure(cross_entropy(model, (x, y))).value,
            measure(cross_entropy(other, (x @ Q.T, y))).value,
            EXACT,
        )


class TestScalingNeurons:
    @pytest.mark.parametrize("name", [n for n in SPECTRAL if "fisher" not in n])
    def test_changes_what_is_in_units_of_the_parameters(self, name: str) -> None:
        model, data = setting()
        pair = (cross_entropy(net, data) for net in (model, rescaled(model, largest=6)))
        assert not close(*(SPECTRAL[name](o).value for o in pair), 0.01)

    def scaled(self, model: nn.Sequential, c: Tensor, before: int, behind: int) -> nn.Sequential:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[before].weight *= c[:, None]
            other[before].bias *= c
            other[behind].weight /= c
        return other

    @pytest.mark.parametrize("form", list(FLATNESS))
    def test_and_forms_of_relative_flatness(self, form: str) -> None:
        """Of the second of three layers: its outputs; all of them alike; and its inputs, all alike."""
        model, data = setting(5, 7, 6, 3)
        c = torch.linspace(0.1, 8, 6, dtype=torch.float64)
        original, outputs, layer, inputs = (
            FLATNESS[form](cross_entropy(net, data)).value
            for net in (
                model,
                self.scaled(model, c, 2, 4),
                self.scaled(model, torch.full_like(c, 5.0), 2, 4),
                self.scaled(model, torch.full((7,), 5.0, dtype=torch.float64), 0, 2),
            )
        )
        assert close(original, layer, 1e-8) and close(original, inputs, 1e-8)
        assert close(original, outputs, 1e-8) == (form in ("2021", "max"))
        assert close(original, outputs, 0.05) == (form in ("2021", "max"))

    def test_only_for_lambda_to_zero_leaves_rank_and_gap(self) -> None:
        """G = JᵀJ / n and C = JᵀR J / n: the gap tends to Tr(R P) / n², P the projector on J's columns, which D of
        J D cannot change. lambda is 1e-6 of the least eigenvalue beside the zeros, which is the error."""
        generator = torch.Generator().manual_seed(0)
        model = mlp(3, 4, 2)
        data = batch(30, 3, 2)[0], torch.randn(30, 2, generator=generator, dtype=torch.float64)
        pair = [fc.Objective(net, half_squares, data) for net in (model, rescaled(model, largest=3))]
        values = [torch.linalg.eigvalsh(fc.GGN(o).to_dense()) for o in pair]
        least = min(float(v[v > 1e-12 * v[-1]][0]) for v in values)
        for measure in (m.soft_rank, m.generalization_gap):
            small, large = (
                [measure(o, damping, method="exact").value for o in pair] for damping in (1e-6 * least, 0.1)
            )
            assert close(*small, 1e-4) and not close(*large, 0.01)
        assert close(m.soft_rank(pair[0], 1e-6 * least, method="exact").value, 26 - 4, 1e-4)


class TestTemperature:
    def hotter(self, model: nn.Sequential) -> nn.Sequential:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[-1].weight *= 3
            other[-1].bias *= 3
        return other

    @pytest.mark.parametrize("name", [*SPECTRAL, *BY_WEIGHT, *BY_LAYER, *FLATNESS, *NOISE])
    def test_counts(self, name: str) -> None:
        model, (x, y) = setting()
        y = model(x).argmax(1)  # so that there is an accuracy to lose
        measure = (SPECTRAL | BY_WEIGHT | BY_LAYER | FLATNESS | NOISE)[name]
        pair = (cross_entropy(net, (x, y)) for net in (model, self.hotter(model)))
        assert not close(*(measure(o).value for o in pair), 0.01)

    @pytest.mark.parametrize("kind", ["std", "norm"])
    @pytest.mark.parametrize("name", list(BY_WEIGHT))
    def test_unless_logits_are_normalised(self, name: str, kind: str) -> None:
        model, data = setting()
        pair = (m.normalize_logits(cross_entropy(net, data), kind) for net in (model, self.hotter(model)))
        # The ascent of the worst case takes 20 steps, each from the last one's rounded gradient.
        assert close(*(BY_WEIGHT[name](o).value for o in pair), 1e-7)


class TestScaleOfTheLoss:
    """c L for L: a sum over n examples for the mean, or torch's MSELoss, 2 / outputs of half the squared error."""

    def pairs(self) -> Iterator[tuple[fc.Objective, fc.Objective, float]]:
        model, (x, y) = setting()
        summed = fc.Objective(model, nn.CrossEntropyLoss(reduction="sum"), (x, y))
        yield cross_entropy(model, (x, y)), summed, 30.0
        t = batch(30, 3, 2, seed=5)[0]
        yield fc.Objective(model, half_squares, (x, t)), fc.Objective(model, F.mse_loss, (x, t)), 2 / 3

    def test_measures_follow(self) -> None:
        linear = ("trace", "lambda_max", "edge_of_stability", "fisher_rao", "sam_sharpness")
        for one, other, c in self.pairs():
            for name, measure in (SPECTRAL | BY_WEIGHT | BY_LAYER | FLATNESS).items():
                power = 1.0 if name in (*linear, *BY_WEIGHT, *BY_LAYER, *FLATNESS) else 0.0
                if name in ("effective_dimension", "log_volume", "soft_rank", "generalization_gap"):
                    continue
                if name == "fisher_rao empirical":  # products of two gradients
                    power = 2.0
                assert close(c**power * measure(one).value, measure(other).value, 1e-8), name
            sharpness = partial(m.normalized_sharpness, method="exact", curvature="ggn")
            assert close(math.sqrt(c) * sharpness(one).value, sharpness(other).value, EXACT)

    def test_damping_follows(self) -> None:
        for one, other, c in self.pairs():
            for measure, power in (
                (partial(m.soft_rank, method="exact"), 0),
                (partial(m.effective_dimension, method="exact"), 0),
                (partial(m.generalization_gap, method="exact"), 1),
            ):
                assert close(c**power * measure(one, 0.01).value, measure(other, 0.01 * c).value, EXACT)
            volumes = m.log_volume(one, 0.1, 0.01).value, m.log_volume(other, 0.1 * c, 0.01 * c).value
            assert close(*volumes, EXACT)


class TestCuts:
    def test_ragged_batches_ignored_targets_and_class_weights(self) -> None:
        """One number, however the data are cut, where the measure is not one of batches."""
        model, (x, y) = setting()
        y[::4] = -100
        loss = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0]).double())
        cut = fc.Objective(model, loss, [(x[:7], y[:7]), (x[7:11], y[7:11]), (x[11:], y[11:])])
        whole = fc.Objective(model, loss, (x, y))
        measured = SPECTRAL | BY_LAYER | FLATNESS | {"lpf": NOISE["lpf"], "energy": BY_WEIGHT["local_energy"]}
        for name, measure in measured.items():
            if "empirical" not in name:
                assert close(measure(cut).value, measure(whole).value, 1e-8), name

    def test_selected_parameters_alone_are_perturbed(self) -> None:
        """(sigma²/2) sum of H_ii w_i² over the weights; the biases stay."""
        model, (x, _) = setting(5, 3)
        with torch.no_grad():
            model[0].bias.fill_(2.0)
        t = batch(30, 3, 2, seed=5)[0]
        objective = fc.Objective(model, half_squares, (x, t), params=["*.weight"])
        found = m.local_energy(objective, 0.4, "loss", draws=300)
        exact = 0.08 * float((model[0].weight.detach().square() * x.square().mean(0)).sum())
        assert 0 < abs(float(found.value[0]) - exact) <= 4 * float(found.stderr[0])
        whole = m.local_energy(fc.Objective(model, half_squares, (x, t)), 0.4, "loss", draws=300)
        assert float(whole.value[0]) - exact > 8 * float(whole.stderr[0])


class TestCurvatures:
    def test_largest_is_not_largest_absolute(self) -> None:
        class Saddle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.ones(4, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.w.square()

        d = torch.tensor([-5.0, 0.5, 1.0, 0.25], dtype=torch.float64)
        objective = fc.Objective(Saddle(), lambda z, t: (z - t).sum(1).mean(), (d[None], torch.zeros(1, 4)))
        assert close(m.lambda_max(objective, tol=LANCZOS).value, 2.0, EXACT)
        assert close(m.condition_number(objective, tol=LANCZOS).value, -0.2, 1e-8)
        with pytest.raises(ValueError, match="has a pole between"):
            m.soft_rank(objective, 3.0, matrix="hessian")

    def test_softmax_layer_has_rank_of_one_class_less(self) -> None:
        """lambda is 1e-7 of the least eigenvalue beside the zeros, or less; their rounding is 1e-7 of lambda."""
        objective = cross_entropy(mlp(5, 3, bias=False), batch(30, 5, 3))
        least = float(torch.linalg.eigvalsh(fc.GGN(objective).to_dense())[5])
        assert least > 1e-2
        assert close(m.soft_rank(objective, 1e-9, method="exact").value, (3 - 1) * 5, 1e-6)

    def test_soft_rank_falls_with_damping(self) -> None:
        objective = cross_entropy(*setting())
        values = [m.soft_rank(objective, d, method="exact").value for d in (1e-6, 1e-3, 1e-1, 10.0)]
        assert all(a > b > 0 for a, b in itertools.pairwise(values))

    @pytest.mark.parametrize("form", ["2021", "simplified", "2019"])
    def test_penalty_in_the_loss_counts(self, form: str) -> None:
        """(a/2) |W|² has the Hessian a I: a m |W|² more, and a d m |W|² more of |W|² Tr H."""
        model, data = setting()
        W, a = model[0].weight.detach(), 0.3
        (d, columns), square = W.shape, float(W.square().sum())
        more = {"2021": columns, "simplified": d * columns, "2019": 1}[form] * a * square

        def penalised(net: Any, b: Batch) -> Tensor:
            return F.cross_entropy(net(b[0]), b[1]) + a / 2 * net[0].weight.square().sum()

        pair = cross_entropy(model, data), fc.Objective(model, fc.ModelLoss(penalised), data)
        options: dict[str, Any] = {"standardize": False, "form": form, "method": "exact"}
        plain, with_penalty = (m.relative_flatness(o, "0", **options).value for o in pair)
        assert close(plain + more, with_penalty, EXACT)

    def test_flattest_nets_need_not_be_balanced(self) -> None:
        """Two layers, white inputs: |W_1|² + |W_2|² = 2 sigma_1, whatever the smaller directions do."""
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
        x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
        with torch.no_grad():
            model[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.5])))
            model[1].weight.copy_(torch.diag(torch.tensor([2.0, 0.1])))
        found = m.width(fc.Objective(model, half_squares, (x, model(x).detach())))
        assert found.status == "converged" and close(found.value, 1.0, 1e-12)
        assert close(found.details["lambda_max"], 8.0, 1e-12)
        (pair,) = found.details["couplings"]
        assert pair.imbalance > 0.1 and close(pair.top, 1.0, 1e-12)
        # And the bound of the sum of products of norms is one.
        bound = sum(float(layer.weight.detach().norm() ** 2) for layer in model)
        assert found.details["lambda_max"] < bound

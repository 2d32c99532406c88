"""Measures of the loss at perturbed parameters: closed forms on quadratics, limits, invariances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from measured import Batch, batch, close, cross_entropy, dense_hessian, mlp, rescaled
from torch import Tensor, nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


def half_squares(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (z - t).square().sum(1).mean()


def regression(at_minimum: bool) -> tuple[fc.Objective, Batch]:
    """A quadratic in 8 parameters, whose minimum is known."""
    x, t = batch(25, 3, 2)[0] * torch.tensor([1.0, 2.0, 0.5]).double(), batch(25, 2, 2, seed=4)[0]
    model = nn.Sequential(mlp(3, 2)[0])
    if at_minimum:
        ones = torch.cat([x, torch.ones(25, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(ones, t).solution
        with torch.no_grad():
            model[0].weight.copy_(solution[:3].T)
            model[0].bias.copy_(solution[3])
    return fc.Objective(model, half_squares, (x, t)), (x, t)


def parts(objective: fc.Objective, data: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, gradient and Hessian, without the engine."""
    w = torch.cat([p.detach().reshape(-1) for p in objective.model.parameters()])
    loss = objective.loss_function(objective.model(data[0]), data[1])
    gradients = torch.autograd.grad(loss, list(objective.model.parameters()))
    return w, torch.cat([g.reshape(-1) for g in gradients]), dense_hessian(objective, data)


class TestAverage:
    @pytest.mark.parametrize("adaptive", [True, False])
    @pytest.mark.parametrize(("norm", "variance"), [("l2", 1.0), ("linf", 1 / 3)])
    def test_on_a_quadratic(self, norm: str, variance: float, adaptive: bool) -> None:
        """rho² sum c² H_ii / 2 at any point and any rho, a third of it for uniform noise."""
        objective, data = regression(at_minimum=False)
        w, _, H = parts(objective, data)
        c = w.abs() if adaptive else torch.ones_like(w)
        with untouched(objective.model, *data):
            found = measures.adaptive_sharpness_average(
                objective, 0.3, norm=norm, adaptive=adaptive, draws=2000
            )
        exact = 0.3**2 / 2 * variance * float((c**2 * H.diagonal()).sum())
        assert 0 < found.stderr < exact and abs(found.value - exact) <= 4 * found.stderr

    def test_is_local_energy_of_the_loss(self) -> None:
        objective, _ = regression(at_minimum=True)
        sharpness = measures.adaptive_sharpness_average(objective, 0.2, draws=1000)
        energy = measures.local_energy(objective, 0.2, error="loss", draws=1000, seed=5)
        spread = math.hypot(sharpness.stderr, float(energy.stderr[0]))
        assert abs(sharpness.value - float(energy.value[0])) <= 4 * spread

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_invariant_to_scaling_neurons_if_adaptive(self, norm: str) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 6, 3)
        objectives = [cross_entropy(m, data) for m in (model, rescaled(model))]
        adaptive, plain = (
            [measures.adaptive_sharpness_average(o, 0.1, norm=norm, adaptive=a).value for o in objectives]
            for a in (True, False)
        )
        assert close(*adaptive, 1e-9) and not close(*plain, 0.1)

    def test_batches(self) -> None:
        """Weighted by their examples, each with draws of its own."""
        (x, t), whole = regression(at_minimum=False)[1], regression(at_minimum=False)[0]
        cut = fc.Objective(whole.model, half_squares, [(x[:20], t[:20]), (x[20:], t[20:])])
        found = measures.adaptive_sharpness_average(cut, 0.3, draws=1000)
        one = measures.adaptive_sharpness_average(whole, 0.3, draws=1000)
        assert found.value != one.value
        assert abs(found.value - one.value) <= 4 * math.hypot(found.stderr, one.stderr)


class TestWorst:
    def test_ball_at_a_minimum(self) -> None:
        """rho² lambda_max(diag(c) H diag(c)) / 2, which no ascent exceeds and 60 steps come close to."""
        objective, data = regression(at_minimum=True)
        w, _, H = parts(objective, data)
        with torch.no_grad():  # a little off: at the minimum itself no gradient shows the way up
            objective.model[0].bias += 1e-6
        for adaptive in (True, False):
            c = w.abs() if adaptive else torch.ones_like(w)
            exact = 0.3**2 / 2 * float(torch.linalg.eigvalsh(c[:, None] * H * c)[-1])
            with untouched(objective.model, *data):
                found = measures.adaptive_sharpness_worst(objective, 0.3, adaptive=adaptive, steps=60)
            assert 0.999 * exact <= found.value <= (1 + 1e-4) * exact

    @pytest.mark.parametrize("adaptive", [True, False])
    def test_box_on_a_quadratic(self, adaptive: bool) -> None:
        """A convex function is largest at a corner of the box: there are 256."""
        objective, data = regression(at_minimum=False)
        w, g, H = parts(objective, data)
        c = w.abs() if adaptive else torch.ones_like(w)
        corners = 0.3 * c * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
        exact = float((corners @ g + 0.5 * (corners @ H * corners).sum(1)).max())
        found = measures.adaptive_sharpness_worst(objective, 0.3, norm="linf", adaptive=adaptive)
        assert 0.95 * exact <= found.value <= exact * (1 + EXACT)

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_the_published_ascent(self, norm: str) -> None:
        """Croce and Hein's Auto-PGD once more, on a concave quadratic, where steps that are too long must be halved."""
        convex, data = regression(at_minimum=False)
        objective = fc.Objective(convex.model, lambda z, t: -half_squares(z, t), data)
        w, g, H = parts(objective, data)
        c, rho, steps = w.abs(), 3.0, 20

        def project(e: Tensor) -> Tensor:
            return e.clamp(-rho, rho) if norm == "linf" else e * min(1.0, rho / max(float(e.norm()), 1e-300))

        def rise(e: Tensor) -> float:
            return float(g @ (c * e) + (c * e) @ H @ (c * e) / 2)

        points, step, halved_before, best_before = [torch.zeros_like(w)], 2 * rho, True, 0.0
        x, before = points[0], points[0]
        checkpoints, gap = (
            [4],
            4,
        )  # 0.22 * 20, then each a step (0.03 * 20, at least one) shorter, down to 0.06 * 20
        while checkpoints[-1] < steps:
            gap = max(gap - 1, 1)
            checkpoints.append(checkpoints[-1] + gap)
        last = 0
        for k in range(1, steps + 1):
            slope = c * (g + H @ (c * x))
            up = slope.sign() if norm == "linf" else slope / slope.norm()
            ahead = project(x + step * up)
            moved = ahead if k == 1 else project(x + 0.75 * (ahead - x) + 0.25 * (x - before))
            before, x = x, moved
            points.append(x)
            if k in checkpoints:
                values = [rise(p) for p in points]
                rises = sum(values[i + 1] > values[i] for i in range(last, k))
                halve = rises <= 0.75 * (k - last) or (not halved_before and max(values) <= best_before)
                halved_before, best_before, last = halve, max(values), k
                if halve:
                    step, x = step / 2, points[values.index(max(values))]
        exact = max(rise(p) for p in points)
        found = measures.adaptive_sharpness_worst(objective, rho, norm=norm, steps=steps)
        assert close(found.value, exact, EXACT)

    @pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
    def test_small_radius(self, norm: str, dual: int) -> None:
        """rho |c g|_dual + O(rho²)."""
        data, model = batch(30, 5, 3), mlp(5, 7, 3, activation=nn.Tanh)
        objective = cross_entropy(model, data)
        w, g, _ = parts(objective, data)
        slope = float((w.abs() * g).norm(p=dual))
        ratios = [
            measures.adaptive_sharpness_worst(objective, rho, norm=norm).value / (rho * slope) - 1
            for rho in (1e-3, 1e-4)
        ]
        assert abs(ratios[1]) < 0.11 * abs(ratios[0]) < 0.01

    def test_invariant_to_scaling_neurons_if_adaptive(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 6, 3)
        objectives = [cross_entropy(m, data) for m in (model, rescaled(model, largest=8))]
        adaptive, plain = (
            [measures.adaptive_sharpness_worst(o, 0.1, adaptive=a).value for o in objectives]
            for a in (True, False)
        )
        assert close(*adaptive, 1e-7) and not close(*plain, 0.1)

    def test_each_batch_has_a_maximum_of_its_own(self) -> None:
        whole, (x, t) = regression(at_minimum=False)
        cut = [(x[:20], t[:20]), (x[20:], t[20:])]
        found = measures.adaptive_sharpness_worst(fc.Objective(whole.model, half_squares, cut), 0.3)
        alone = [
            measures.adaptive_sharpness_worst(fc.Objective(whole.model, half_squares, b), 0.3).value
            for b in cut
        ]
        assert close(found.value, 0.8 * alone[0] + 0.2 * alone[1], 1e-12)
        assert found.details["by_batch"] == alone

    def test_never_below_zero(self) -> None:
        objective, _ = regression(at_minimum=True)
        assert measures.adaptive_sharpness_worst(objective, 1e-9, steps=1).value >= 0


class TestOneStep:
    def test_sam_on_a_quadratic(self) -> None:
        objective, data = regression(at_minimum=False)
        _, g, H = parts(objective, data)
        with untouched(objective.model, *data):
            found = measures.sam_sharpness(objective, 0.2)
        exact = 0.2 * float(g.norm()) + 0.2**2 / 2 * float(g @ H @ g / (g @ g))
        assert close(found.value, exact, EXACT)

    def test_asam_on_a_quadratic(self) -> None:
        """Biases have T = 1, whatever their size."""
        objective, data = regression(at_minimum=False)
        w, g, H = parts(objective, data)
        T = torch.cat([w[:6].abs() + 0.05, torch.ones(2, dtype=torch.float64)])
        e = 0.2 * T**2 * g / (T * g).norm()
        found = measures.asam_sharpness(objective, 0.2, eta=0.05)
        assert close(found.value, float(g @ e + e @ H @ e / 2), EXACT)

    def test_batches(self) -> None:
        whole, (x, t) = regression(at_minimum=False)
        cut = [(x[:20], t[:20]), (x[20:], t[20:])]
        objective = fc.Objective(whole.model, half_squares, cut)
        assert close(
            measures.sam_sharpness(objective, 0.2).value, measures.sam_sharpness(whole, 0.2).value, EXACT
        )
        alone = [measures.sam_sharpness(fc.Objective(whole.model, half_squares, b), 0.2).value for b in cut]
        found = measures.sam_sharpness(objective, 0.2, by_batch=True).value
        assert close(found, 0.8 * alone[0] + 0.2 * alone[1], EXACT)
        assert found > measures.sam_sharpness(whole, 0.2).value

    def test_invariances(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3, bias=False)
        objectives = [cross_entropy(m, data) for m in (model, rescaled(model, largest=6))]
        assert close(*(measures.asam_sharpness(o, 0.1, eta=0.0).value for o in objectives), 1e-9)
        assert not close(*(measures.asam_sharpness(o, 0.1, eta=0.3).value for o in objectives), 1e-3)
        assert not close(*(measures.sam_sharpness(o, 0.1).value for o in objectives), 0.1)

    def test_no_gradient_no_step(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
        nn.init.zeros_(model[0].weight)
        x = torch.ones(2, 2, dtype=torch.float64)
        objective = fc.Objective(model, half_squares, (x, torch.zeros_like(x)))
        assert measures.sam_sharpness(objective).value == 0


class TestFilter:
    def test_on_a_quadratic(self) -> None:
        objective, data = regression(at_minimum=False)
        H = parts(objective, data)[2]
        with untouched(objective.model, *data):
            found = measures.lpf(objective, 0.3, draws=2000)
        exact = objective.loss() + 0.3**2 / 2 * float(H.trace())
        assert abs(found.value - exact) <= 4 * found.stderr < 0.2 * exact
        assert found.details["loss"] == objective.loss()

    def test_not_invariant_to_scaling_neurons(self) -> None:
        data, model = batch(30, 5, 3), mlp(5, 7, 3)
        values = [
            measures.lpf(cross_entropy(m, data), 0.1).value for m in (model, rescaled(model, largest=10))
        ]
        assert not close(*values, 0.3)


class TestPacBayes:
    """A linear classifier: P(wrong) = mean Phi(-m_i / s_i), m the margin and s² the variance of <u, x>."""

    def setting(self) -> tuple[nn.Sequential, Batch, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(80, 4, generator=generator, dtype=torch.float64)
        w = torch.tensor([0.3, -0.2, 0.1, 0.25], dtype=torch.float64)
        y = (x @ w + 0.1 * torch.randn(80, generator=generator, dtype=torch.float64) > 0).double()[:, None]
        model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(w[None])
        return model, (x, y), w, (2 * y[:, 0] - 1) * (x @ w)

    @pytest.mark.parametrize("magnitude", [False, True])
    def test_against_the_exact_accuracy(self, magnitude: bool) -> None:
        model, (x, y), w, margin = self.setting()

        def variances(sigma: float) -> Tensor:
            return sigma**2 * w**2 + 1e-6 if magnitude else torch.full_like(w, sigma**2)

        def change(variance: Tensor) -> float:
            spread = (x.square() @ variance).sqrt()
            wrong = 0.5 * (1 + torch.erf(-margin / spread / math.sqrt(2)))
            return abs(float(wrong.mean()) - float((margin < 0).double().mean()))

        draws, tolerance = 400, 1e-3
        objective = fc.Objective(model, F.binary_cross_entropy_with_logits, (x, y))
        with untouched(model, x, y):
            found = measures.pac_bayes_sigma(objective, magnitude=magnitude, draws=draws, tolerance=tolerance)
        # The spread of one draw's error rate, from draws of the test's own.
        noise = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        signs = (2 * y[:, 0] - 1) * ((w + variances(found.value).sqrt() * noise) @ x.T)
        spread = float((signs < 0).double().mean(1).std())
        allowed = tolerance + 4 * spread / math.sqrt(draws)
        assert abs(change(variances(found.value)) - 0.1) <= allowed
        # With the variance taken for the standard deviation this sigma costs another share of the accuracy.
        assert abs(change(variances(found.value).square()) - 0.1) > 2 * allowed
        assert close(found.details["flatness"], found.value**-2, 1e-14)
        if not magnitude:
            square = float(w.square().sum())
            bound = math.sqrt((square / (4 * found.value**2) + math.log(80 / found.value) + 10) / 80)
            assert close(found.details["bound"], bound, 1e-14)

    def test_distance_from_the_start(self) -> None:
        model, data, w, _ = self.setting()
        objective = fc.Objective(model, F.binary_cross_entropy_with_logits, data)
        found = measures.pac_bayes_sigma(objective, initial={"0.weight": w[None] / 2})
        bound = math.sqrt((float(w @ w) / 4 / (4 * found.value**2) + math.log(80 / found.value) + 10) / 80)
        assert close(found.details["bound_initial"], bound, 1e-14)
        with pytest.raises(ValueError, match=r"^initial: expected"):
            measures.pac_bayes_sigma(objective, initial={})

    def test_not_reached_is_told(self) -> None:
        model, data, _, _ = self.setting()
        objective = fc.Objective(model, F.binary_cross_entropy_with_logits, data)
        with pytest.warns(FlatcoreWarning, match="raise largest"):
            found = measures.pac_bayes_sigma(objective, largest=1e-3)
        assert found.value == pytest.approx(1e-3, rel=1e-3) and "largest" in found.status

    def test_invariant_to_scaling_neurons_with_magnitude(self) -> None:
        data, model = batch(60, 5, 3), mlp(5, 7, 3)
        data = data[0], model(data[0]).argmax(1)
        # The floor of 0.001 beside weights of 0.1 and more is below the tolerance of the search.
        one, other = (
            measures.pac_bayes_sigma(cross_entropy(m, data), magnitude=True).value
            for m in (model, rescaled(model, largest=2))
        )
        assert close(one, other, 0.05)
        plain = [
            measures.pac_bayes_sigma(cross_entropy(m, data)).value
            for m in (model, rescaled(model, largest=8))
        ]
        assert not close(*plain, 0.2)


class TestRefusals:
    CALLS = (
        measures.adaptive_sharpness_average,
        measures.adaptive_sharpness_worst,
        measures.sam_sharpness,
        measures.asam_sharpness,
    )

    def test_arguments(self) -> None:
        objective, _ = regression(at_minimum=False)
        for call in self.CALLS:
            with pytest.raises(ValueError, match=r"^rho: expected"):
                call(objective, -1.0)
            with pytest.raises(TypeError, match=r"^objective: expected"):
                call(objective.model, 0.1)
        for call in self.CALLS[:2]:
            with pytest.raises(ValueError, match=r"^norm: expected"):
                call(objective, 0.1, norm="l1")
        for message, call in {
            "eta: expected": lambda: measures.asam_sharpness(objective, eta=-1),
            "sigma: expected": lambda: measures.lpf(objective, 0),
            "draws: expected": lambda: measures.lpf(objective, draws=0),
            "steps: expected": lambda: measures.adaptive_sharpness_worst(objective, 0.1, steps=0),
            "error: expected a cross-entropy": lambda: measures.pac_bayes_sigma(objective),
            "drop: expected": lambda: measures.pac_bayes_sigma(objective, drop=0),
        }.items():
            with pytest.raises(ValueError, match=f"^{message}"):
                call()

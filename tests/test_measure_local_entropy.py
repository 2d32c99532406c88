"""Local entropy against the closed form on quadratics, and its chain against densities written out."""

import math
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from untouched import untouched

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning
from flatcore.measures.chain_statistics import BatchMeans, Buckets, batch_means, effective_samples
from flatcore.measures.langevin import Chain
from flatcore.measures.local_entropy import _integral, _weights


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half_mse(output, target):
    return (output - target).square().sum() / (2 * len(output))


def quadratic():
    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(random(2, 3))
        net.bias.copy_(random(2, seed=1))
    x, y = random(20, 3, seed=2), random(20, 2, seed=3)
    return net, (x, y), fc.Objective(net, half_mse, (x, y))


def gradient(objective):
    names = list(objective.parameters)
    loss = objective.evaluate(next(objective.batches()).batch, objective.parameters).loss
    parts = torch.autograd.grad(loss, [objective.parameters[n] for n in names])
    return torch.cat([p.reshape(-1) for p in parts])


@pytest.mark.parametrize(("gamma", "beta"), [(0.5, 20.0), (5.0, 3.0)])
def test_quadratic(gamma, beta):
    net, data, objective = quadratic()
    with untouched(net, *data):
        result = measures.local_entropy(objective, gamma, beta, steps=160)
    assert result.status == "converged"
    H, g = fc.Hessian(objective).to_dense(), gradient(objective)
    eye = torch.eye(len(g), dtype=torch.float64)
    solved = torch.linalg.solve(H + gamma * eye, g)
    expected = -float(g @ solved) / 2 + float(torch.logdet(eye + H / gamma)) / (2 * beta)
    assert abs(result.value - expected) <= 4 * result.stderr
    for name in ("gradient", "force"):
        away = (result.details[name] - gamma * solved).abs()
        assert (away <= 4 * result.details[f"{name}_stderr"]).all()
    assert 0.3 < result.details["acceptance"] <= 1
    mean = float((solved**2).sum()) + float(torch.trace(torch.linalg.inv(H + gamma * eye))) / beta
    assert result.details["distance"] == pytest.approx(mean, rel=0.3)


def test_large_beta_is_the_moreau_envelope():
    """min_w' L + (gamma/2)|w' - w|² - L(w) = -gᵀ (H + gamma I)^-1 g / 2; the temperature adds P/beta times at most
    log(1 + lambda_max/gamma)/2."""
    _, _, objective = quadratic()
    gamma, beta = 2.0, 1e6
    result = measures.local_entropy(objective, gamma, beta, steps=160)
    H, g = fc.Hessian(objective).to_dense(), gradient(objective)
    eye = torch.eye(len(g), dtype=torch.float64)
    envelope = -float(g @ torch.linalg.solve(H + gamma * eye, g)) / 2
    warmth = len(g) / beta * math.log(1 + float(torch.linalg.eigvalsh(H)[-1]) / gamma) / 2
    assert abs(result.value - envelope) <= 4 * result.stderr + warmth


def test_shift_of_the_loss_and_rescaled_neurons():
    """A constant added to the loss changes nothing, rescaled neurons do."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = random(20, 3), random(20, 2, seed=1)
    a = measures.local_entropy(fc.Objective(net, half_mse, (x, y)), 3.0, 20.0, steps=300)
    b = measures.local_entropy(
        fc.Objective(net, lambda o, t: half_mse(o, t) + 7, (x, y)), 3.0, 20.0, steps=300
    )
    # Sums with 7 in them: its rounding, times beta in what is accepted, could decide otherwise only at 1e-13 odds.
    assert a.value == pytest.approx(b.value, abs=1e-11)
    with torch.no_grad():
        net[0].weight.mul_(8)
        net[0].bias.mul_(8)
        net[2].weight.div_(8)
    c = measures.local_entropy(fc.Objective(net, half_mse, (x, y)), 3.0, 20.0, steps=300)
    assert abs(a.value - c.value) > 4 * (a.stderr + c.stderr)


def test_acceptance_against_the_densities():
    """log pi(v) q(v, u) - log pi(u) q(u, v) with both Gaussians written out."""
    _, _, objective = quadratic()
    gamma, beta, s, delta = 0.7, 11.0, 0.6, 0.8
    chain = Chain(objective, gamma, beta, 0, adjusted=True, delta=delta)
    u, v = 0.3 * random(8, seed=5), 0.3 * random(8, seed=6)
    at_u, at_v = chain._at(u), chain._at(v)

    def log_pi(u, at):
        return -beta * (s * at[0] + gamma / 2 * float(u @ u))

    def log_q(u, v, at):
        mean = ((2 - delta) * u - 2 * delta * s / gamma * at[1]) / (2 + delta)
        variance = 8 * delta / (beta * gamma) / (2 + delta) ** 2
        return -float((v - mean).square().sum()) / (2 * variance)

    expected = log_pi(v, at_v) + log_q(v, u, at_v) - log_pi(u, at_u) - log_q(u, v, at_u)
    ours = chain._rho(u, v, at_u, s) - chain._rho(v, u, at_v, s)
    assert ours == pytest.approx(expected, rel=1e-11)


def test_sgld_by_name():
    """Unadjusted with a small step and all data: the closed form within its bias of the order of the step."""
    _, _, objective = quadratic()
    H, g = fc.Hessian(objective).to_dense(), gradient(objective)
    gamma = 1.0
    solved = torch.linalg.solve(H + gamma * torch.eye(len(g), dtype=torch.float64), g)
    result = measures.local_entropy(objective, gamma, 1e4, method="sgld", step_size=0.2, steps=200)
    away = (result.details["gradient"] - gamma * solved).norm() / solved.norm()
    # For a quadratic the chain's mean solves another recurrence with the same fixed point: no bias of the mean.
    assert away <= 4 * result.details["gradient_stderr"].norm() / solved.norm() + 1e-3
    assert math.isnan(result.details["acceptance"]) and result.method.endswith("sgld")


def test_clenshaw_curtis():
    w, t = _weights(8), torch.cos(torch.linspace(math.pi, 0, 9, dtype=torch.float64)) / 2 + 0.5
    for degree in range(9):
        assert float(w @ t**degree) == pytest.approx(1 / (degree + 1), rel=1e-12)
    value, error = _integral(t, t**4, torch.zeros_like(t))
    assert value == pytest.approx(1 / 3) and error < 1e-12


def test_short_chains_are_told():
    """A stiff quadratic from far away: too few steps."""
    net = nn.Linear(1, 1, bias=False).double()
    x = torch.full((4, 1), 30.0, dtype=torch.float64)
    objective = fc.Objective(net, half_mse, (x, -50 * x))
    with pytest.warns(FlatcoreWarning, match="local_entropy: chains at s = .* are too short"):
        measures.local_entropy(objective, 1e-3, 1.0, steps=200, method="sgld", step_size=1e-6)


@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 3.0), (5.0, 10.0)])
def test_one_parameter_by_quadrature(gamma, beta):
    """(sin 2w + w²)² has several modes within reach: F, its gradient, and the mean gradient, which is the same."""

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.4], dtype=torch.float64))

        def forward(self, x):
            return (torch.sin(2 * self.w) + self.w**2) * x

    ones = torch.ones(2, 1, dtype=torch.float64)
    objective = fc.Objective(Waves(), F.mse_loss, (ones, 0 * ones))
    w = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    loss, prior = (torch.sin(2 * w) + w**2) ** 2, -beta * gamma / 2 * (w - 0.4) ** 2
    weights = prior - beta * loss
    value = -float(torch.logsumexp(weights, 0) - torch.logsumexp(prior, 0)) / beta - objective.loss()
    slope = gamma * (0.4 - float(weights.softmax(0) @ w))
    result = measures.local_entropy(objective, gamma, beta, steps=300)
    assert abs(result.value - value) <= 4 * result.stderr < 0.3 * abs(value)
    for name in ("gradient", "force"):
        error = float(result.details[f"{name}_stderr"])
        assert abs(float(result.details[name]) - slope) <= 4 * error < 1.2 * abs(slope), name


def test_rounding_that_decides_is_told():
    """At beta = 1e8 float32 tells apart losses of a few units of temperature at best."""
    net, (x, y), _ = quadratic()
    single = fc.Objective(net.float(), half_mse, (x.float(), y.float()))
    with pytest.warns(FlatcoreWarning, match="rounded to .* which decides over acceptance"):
        measures.local_entropy(single, 2.0, 1e8, steps=40)


def test_a_chain_that_stands_still_is_told():
    """All steps refused: no spread, and no certainty."""
    _, _, objective = quadratic()
    with pytest.warns(FlatcoreWarning, match="too short to have mixed"):
        measures.local_entropy(objective, 1e-6, 1e7, steps=40, step_size=1.9)


def autoregression(time, steps, columns):
    """Chains of variance 1 whose correlation falls by e in so many steps."""
    phi, noise = math.exp(-1 / time), random(steps, columns)
    rows = [noise[0]]
    for row in noise[1:]:
        rows.append(phi * rows[-1] + math.sqrt(1 - phi**2) * row)
    return torch.stack(rows), phi


@pytest.mark.parametrize("time", [0.5, 5, 20, 80])
def test_errors_of_correlated_samples(time):
    """Two standard errors hold the mean of autoregressions in 94 to 97 % of 2000 chains of 400 steps, give or take four
    deviations, where they are worth 400 or 2.5 samples; which is seen in chains watched together."""
    chains, phi = autoregression(time, 400, 2000)
    tally = BatchMeans(chains[0], 400)
    for step, row in enumerate(chains):
        tally.add(step, row)
    mean, error = tally.results()
    assert torch.allclose(mean, chains.mean(0), rtol=0, atol=1e-13)
    inside = float((mean.abs() <= 2 * error).double().mean())
    assert 0.94 - 4 * math.sqrt(0.94 * 0.06 / 2000) <= inside <= 0.97 + 4 * math.sqrt(0.97 * 0.03 / 2000)
    one, two = batch_means(chains[:, 0])
    assert one == pytest.approx(float(mean[0])) and two == pytest.approx(float(error[0]))
    worth = effective_samples(chains)
    # Taking off the mean, of variance t / n, lowers each lag's covariance by that, up to the lag where it is all of it,
    # time * log(n / t), behind which a share of time / t * t / n is left; 5 % for the noise of 2000 chains.
    exact, low = 400 * (1 - phi) / (1 + phi), 2 * time * (1 + math.log((1 - phi) / (1 + phi) * 400)) / 400
    assert 0.95 * exact <= worth <= 1.05 * exact / (1 - low)


def test_slow_coordinates_are_told_and_held():
    """Curvatures of 8 to 0.02 beside gamma = 0.1: the flattest coordinate moves in 100 steps by its own size at most,
    which the loss does not show."""
    x = random(30, 4) * torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    net = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(random(1, 4, seed=1))
    objective = fc.Objective(net, F.mse_loss, (x, random(30, 1, seed=2)))
    H, g, eye = fc.Hessian(objective).to_dense(), gradient(objective), torch.eye(4, dtype=torch.float64)
    exact = 0.1 * torch.linalg.solve(H + 0.1 * eye, g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        runs = [measures.local_entropy(objective, 0.1, 10.0, steps=100, seed=s) for s in range(12)]
    assert sum(r.status == "converged" for r in runs) <= 1
    for name in ("gradient", "force"):
        away = torch.stack([(r.details[name] - exact) / r.details[f"{name}_stderr"] for r in runs])
        # 0.95 less four deviations, as if the coordinates of a run were independent.
        inside = float((away.abs() <= 2).double().mean())
        assert inside >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 48), name


def test_buckets_of_many_entries():
    """Signed sums keep the sum of the entries' variances, in the mean; of few entries each is its own."""
    rows = random(500, 1000)
    sums = torch.stack([Buckets(rows[0])(row) for row in rows])
    assert sums.shape == (500, 64)
    assert float(sums.var(0).sum()) == pytest.approx(1000, rel=4 * math.sqrt(2 / (500 * 64)))
    assert torch.equal(Buckets(rows[0, :64])(rows[0, :64]).abs(), rows[0, :64].abs())


def test_same_seed_same_bits():
    _, _, objective = quadratic()
    a, b, c = (measures.local_entropy(objective, 1.0, 10.0, steps=80, seed=s) for s in (0, 0, 1))
    assert a.value == b.value and torch.equal(a.details["gradient"], b.details["gradient"])
    assert a.value != c.value


def test_bad_input():
    _, _, objective = quadratic()
    with pytest.raises(TypeError, match=r"objective: expected a flatcore.Objective"):
        measures.local_entropy(F.mse_loss, 1.0, 1.0)
    with pytest.raises(ValueError, match="gamma: expected a positive number, got 0"):
        measures.local_entropy(objective, 0.0, 1.0)
    with pytest.raises(ValueError, match="steps: expected at least 40"):
        measures.local_entropy(objective, 1.0, 1.0, steps=3)
    with pytest.raises(ValueError, match="method: expected 'mala' or 'sgld', got 'hmc'"):
        measures.local_entropy(objective, 1.0, 1.0, method="hmc")
    with pytest.raises(
        ValueError, match=r"step_size: expected a number in \(0, 2\) for method='sgld', got None"
    ):
        measures.local_entropy(objective, 1.0, 1.0, method="sgld")


@pytest.mark.skipif(not os.environ.get("FLATCORE_LONG"), reason="FLATCORE_LONG=1: minutes")
def test_bars_over_many_seeds():
    """Two standard errors hold the closed form in 95 % of runs, give or take four deviations; their mean is right."""
    _, _, objective = quadratic()
    H, g, gamma, beta = fc.Hessian(objective).to_dense(), gradient(objective), 0.5, 20.0
    eye = torch.eye(len(g), dtype=torch.float64)
    exact = -float(g @ torch.linalg.solve(H + gamma * eye, g)) / 2 + float(torch.logdet(eye + H / gamma)) / (
        2 * beta
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)  # of 900 chains a few look as if they had not mixed
        runs = [measures.local_entropy(objective, gamma, beta, steps=200, seed=s) for s in range(100)]
    inside = sum(abs(r.value - exact) <= 2 * r.stderr for r in runs) / 100
    assert inside >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 100)
    mean = sum(r.value for r in runs) / 100
    spread = math.sqrt(sum((r.value - mean) ** 2 for r in runs) / 99 / 100)
    assert abs(mean - exact) <= 4 * spread

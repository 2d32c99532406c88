"""Local energy against closed forms, its invariance and where it has none, and both ways to evaluate it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from untouched import untouched

import flatcore as fc
from flatcore import measures
from flatcore.measures import perturbed

EPS = torch.finfo(torch.float64).eps


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relu_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def classes(n=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return random(n, 4, seed=seed), torch.randint(0, 3, (n,), generator=generator)


def half_mse(output, target):
    return (output - target).square().sum() / (2 * len(output))


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("noise", ["multiplicative", "additive"])
def test_quadratic_loss(noise, antithetic):
    """Exact for a quadratic: (sigma²/2) sum_i H_ii w_i², or (sigma²/2) Tr H; no critical point is needed."""
    net = nn.Linear(5, 2).double()
    x, y = random(30, 5), random(30, 2, seed=1)
    objective = fc.Objective(net, half_mse, (x, y))
    with untouched(net, x, y):
        result = measures.local_energy(
            objective, (0.3, 1.0), "loss", draws=200, noise=noise, antithetic=antithetic, seed=3
        )
    h = fc.Hessian(objective).to_dense().diagonal()
    w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    curvature = float((h * w**2).sum() if noise == "multiplicative" else h.sum())
    for sigma, value, stderr in zip((0.3, 1.0), result.value, result.stderr, strict=True):
        assert abs(float(value) - sigma**2 / 2 * curvature) <= 4 * float(stderr)
    assert result.details["base"] == pytest.approx(objective.loss(), rel=1e-12)
    assert result.passes == 2 * 200 * (2 if antithetic else 1) + 1
    if antithetic:  # first-order terms cancel: the curve of each draw is exactly quadratic
        ratio = result.details["samples"][1] / result.details["samples"][0]
        assert torch.allclose(ratio, torch.full_like(ratio, 1 / 0.09), rtol=1e-8)


@pytest.mark.parametrize("noise", ["multiplicative", "additive"])
def test_small_sigma_of_a_deep_net(noise):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = fc.Objective(net, F.cross_entropy, classes())
    h = fc.Hessian(objective).to_dense().diagonal()
    w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    curvature = float((h * w**2).sum() if noise == "multiplicative" else h.sum())
    sigma = 0.01
    result = measures.local_energy(objective, sigma, "loss", draws=800, noise=noise)
    # The next term is O(sigma^4): a hundredth of a percent of the first at sigma = 0.01, far below the error bar.
    assert abs(float(result.value[0]) - sigma**2 / 2 * curvature) <= 4 * float(result.stderr[0])


def test_linear_classifier():
    """P(error) = mean_i Phi(-y_i <w, x_i> / (sigma |w * x_i|)); for two classes with the difference of the rows."""
    net = nn.Linear(6, 2, bias=False).double()
    x, w = random(50, 6), net.weight.detach()
    margins = x @ (w[1] - w[0])
    y = (margins + random(50, seed=4) > 0).long()
    objective = fc.Objective(net, F.cross_entropy, (x, y))
    sigmas = (0.2, 1.0)
    result = measures.local_energy(objective, sigmas, draws=600)
    deviation = (x**2 @ (w[0] ** 2 + w[1] ** 2)).sqrt()
    signs = 2.0 * y - 1
    wrong = float((signs * margins < 0).double().mean())
    assert result.details["base"] == wrong
    for sigma, value, stderr in zip(sigmas, result.value, result.stderr, strict=True):
        expected = float(torch.special.ndtr(-signs * margins / (sigma * deviation)).mean()) - wrong
        assert abs(float(value) - expected) <= 4 * float(stderr)


def rescaled(net, factors):
    """Incoming weights and bias of each hidden neuron times its factor, outgoing ones divided."""
    other = relu_net()
    with torch.no_grad():
        other[0].weight.copy_(net[0].weight * factors[:, None])
        other[0].bias.copy_(net[0].bias * factors)
        other[2].weight.copy_(net[2].weight / factors)
        other[2].bias.copy_(net[2].bias)
    return other


@pytest.mark.parametrize("error", ["loss", None])
def test_rescaled_neurons(error):
    """The same numbers with multiplicative noise, draw by draw; others with additive noise."""
    net, x = relu_net(), random(200, 4, seed=1)
    data = x, net(x).argmax(1)
    factors = 2.0 ** torch.tensor([3, -2, 1, 0, 4, -3], dtype=torch.float64)
    a, b = (fc.Objective(n, F.cross_entropy, data) for n in (net, rescaled(net, factors)))
    one, other = (measures.local_energy(o, (0.1, 0.5), error, draws=20) for o in (a, b))
    assert torch.allclose(one.details["samples"], other.details["samples"], rtol=0, atol=1e4 * EPS)
    one, other = (measures.local_energy(o, (0.1, 0.5), error, draws=20, noise="additive") for o in (a, b))
    assert ((one.value - other.value).abs() > 4 * (one.stderr + other.stderr)).any()


def test_logit_scale_matters_to_the_loss_only():
    data, net = classes(), relu_net()
    louder = relu_net()
    louder.load_state_dict({k: v * (4 if k.startswith("2") else 1) for k, v in net.state_dict().items()})
    a, b = (fc.Objective(n, F.cross_entropy, data) for n in (net, louder))
    errors = [measures.local_energy(o, 0.5, draws=20).value for o in (a, b)]
    losses = [measures.local_energy(o, 0.5, "loss", draws=20) for o in (a, b)]
    assert torch.equal(*errors)
    assert abs(losses[0].value - losses[1].value) > 4 * (losses[0].stderr + losses[1].stderr)


def test_a_plain_loop_and_both_ways(monkeypatch):
    """One by one, in chunks, and written out with the same draws; batches of different size."""
    net, (x, y) = relu_net(), classes()
    objective = fc.Objective(net, F.cross_entropy, [(x[:13], y[:13]), (x[13:], y[13:])])
    results = []
    for limit in (0, 1e9):
        monkeypatch.setattr(perturbed, "_VECTORISED", limit)
        results.append(measures.local_energy(objective, (0.2, 0.4), draws=11, seed=5))
    assert torch.equal(results[0].details["samples"], results[1].details["samples"])
    w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    from flatcore.measures.noise import noise_generator

    def error(flat):
        pieces = flat.split([p.numel() for p in net.parameters()])
        state = {n: v.view_as(p) for (n, p), v in zip(net.named_parameters(), pieces, strict=True)}
        return float((torch.func.functional_call(net, state, (x,)).argmax(1) != y).double().mean())

    for draw in range(11):
        z = torch.randn(w.shape, dtype=w.dtype, generator=noise_generator(5, draw, w.device))
        for index, sigma in enumerate((0.2, 0.4)):
            expected = (error(w + sigma * z * w) + error(w - sigma * z * w)) / 2 - error(w)
            assert float(results[0].details["samples"][index, draw]) == pytest.approx(expected, abs=1e-14)


def test_batch_normalisation_and_own_error():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    ).double()
    net(random(20, 1, 6, 6))
    net.eval()
    x, y = random(10, 1, 6, 6), random(10, 2, seed=1)
    objective = fc.Objective(net, half_mse, (x, y))
    with untouched(net, x, y):
        result = measures.local_energy(
            objective, 0.2, lambda output, target: (output - target).abs().sum(1) > 2, draws=5
        )
    assert 0 <= result.details["base"] <= 1 and math.isfinite(float(result.stderr[0]))


def test_ignored_targets_and_binary_losses():
    net, (x, y) = relu_net(), classes()
    y = y.clone()
    y[::3] = -100
    counted = y != -100
    base = measures.local_energy(fc.Objective(net, F.cross_entropy, (x, y)), 0.1, draws=2).details["base"]
    assert base == pytest.approx(float((net(x).argmax(1) != y)[counted].double().mean()))
    single = nn.Linear(4, 1).double()
    target = (random(40, 1, seed=7) > 0).double()
    objective = fc.Objective(single, F.binary_cross_entropy_with_logits, (x, target))
    base = measures.local_energy(objective, 0.1, draws=2).details["base"]
    assert base == pytest.approx(float(((single(x) > 0) != (target > 0.5)).double().mean()))


def test_seeds():
    objective = fc.Objective(relu_net(), F.cross_entropy, classes())
    a, b, c = (measures.local_energy(objective, 0.4, "loss", draws=20, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.value, b.value) and not torch.equal(a.value, c.value)
    assert math.isnan(float(measures.local_energy(objective, 0.4, draws=1).stderr[0]))


def test_bad_input():
    net, data = relu_net(), classes()
    objective = fc.Objective(net, F.cross_entropy, data)
    with pytest.raises(TypeError, match=r"objective: expected a flatcore.Objective, got Sequential"):
        measures.local_energy(net)
    for sigma in (-0.1, 0, (), "0.1", [0.1, float("nan")]):
        with pytest.raises(ValueError, match="sigma: expected a positive number"):
            measures.local_energy(objective, sigma)
    with pytest.raises(ValueError, match="noise: expected 'multiplicative' or 'additive', got 'gauss'"):
        measures.local_energy(objective, 0.1, noise="gauss")
    with pytest.raises(TypeError, match="error: expected None for the argmax rule"):
        measures.local_energy(objective, 0.1, "errors")
    with pytest.raises(ValueError, match="draws: expected at least 1"):
        measures.local_energy(objective, 0.1, draws=0)
    with pytest.raises(
        ValueError, match="error: expected a callable that gives a tensor with one number an example"
    ):
        measures.local_energy(
            objective, 0.1, lambda output, target: (output.argmax(1) != target).double().mean()
        )
    regression = fc.Objective(nn.Linear(4, 1).double(), half_mse, (data[0], data[0][:, :1]))
    with pytest.raises(ValueError, match="error: expected a cross-entropy for the argmax rule"):
        measures.local_energy(regression, 0.1)
    own = fc.Objective(net, fc.ModelLoss(lambda m, b: m(b[0]).square().mean()), data)
    with pytest.raises(ValueError, match=r"error: expected a loss of torch.nn.functional in the ModelLoss"):
        measures.local_energy(own, 0.1, lambda output, target: output)


def test_is_average_adaptive_sharpness():
    """On the loss with rho = sigma, one batch and all parameters: two samplers of one number."""
    objective = fc.Objective(relu_net(), F.cross_entropy, classes())
    energy = measures.local_energy(objective, 0.2, "loss", draws=300)
    sharpness = measures.adaptive_sharpness_average(objective, 0.2, draws=300, seed=9)
    assert abs(float(energy.value[0]) - sharpness.value) <= 4 * math.hypot(
        float(energy.stderr[0]), sharpness.stderr
    )

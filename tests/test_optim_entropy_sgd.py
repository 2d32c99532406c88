"""Entropy-SGD against closed forms on quadratics, a plain loop of both published algorithms, and its own resume."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from flatcore.optim import EntropySGD, Scoping

EPS = torch.finfo(torch.float64).eps


def quadratic(n=6, seed=0):
    """L(w) = (w - c)^T H (w - c) / 2 with eigenvalues of H from 0.2 to 1.8."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    H = q @ torch.diag(torch.linspace(0.2, 1.8, n, dtype=torch.float64)) @ q.T
    c = torch.randn(n, dtype=torch.float64, generator=generator)
    w = nn.Parameter(torch.randn(n, dtype=torch.float64, generator=generator))
    return H, c, w


def closure_for(optimizer, w, H, c):
    def closure():
        optimizer.zero_grad()
        loss = (w - c) @ H @ (w - c) / 2
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(("variant", "factor"), [("chaudhari", 1.0), ("pittorino", 0.4)])
def test_gradient_of_a_quadratics_local_entropy(variant, factor):
    """Without noise and with a long chain w - mu is (H + gamma I)^-1 g; the variant of 2021 multiplies it by gamma.

    The chain contracts by 1 - 0.5 * 0.6 = 0.7 a step at worst and the average by 0.75: 0.75^400 is far below rounding.
    """
    H, c, w = quadratic()
    gamma, lr = 0.4, 0.5
    optimizer = EntropySGD([w], lr, variant=variant, gamma=gamma, inner_steps=400, inner_lr=0.5, noise=0.0)
    for _ in range(3):  # a persistent chain ends where a new one does
        before = w.detach().clone()
        expected = factor * torch.linalg.solve(
            H + gamma * torch.eye(6, dtype=torch.float64), H @ (before - c)
        )
        optimizer.step(closure_for(optimizer, w, H, c))
        moved = (before - w.detach()) / lr
        assert (moved - expected).norm() <= 100 * EPS * (before.norm() + expected.norm() + c.norm())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("variant", ["chaudhari", "pittorino"])
def test_plain_loop(variant, nesterov):
    """Both algorithms written out for one vector."""
    H, c, w = quadratic(seed=1)
    lr, gamma, L, eta, alpha, m, mi, wd = 0.7, 0.05, 4, 0.1, 0.6, 0.9, 0.5, 0.01
    optimizer = EntropySGD(
        [w], lr, variant=variant, gamma=gamma, scoping=Scoping("rate", 1.5), inner_steps=L, inner_lr=eta,
        averaging=alpha, noise=0.0, momentum=m, inner_momentum=mi, nesterov=nesterov, weight_decay=wd,
    )  # fmt: skip
    x, outer = w.detach().clone(), torch.zeros(6, dtype=torch.float64)
    chain = x.clone()
    for t in range(3):
        g = gamma * 1.5**t
        y = x.clone() if variant == "chaudhari" else chain
        mu, v = x.clone(), torch.zeros_like(x)
        for _ in range(L):
            d = H @ (y - c) + wd * y
            pull = g * (y - x)
            if variant == "pittorino":
                d = d + pull
            v = mi * v + d
            d = d + mi * v if nesterov else v
            if variant == "chaudhari":
                d = d + pull
            y = y - eta * d
            mu = alpha * mu + (1 - alpha) * y
        chain = y
        d = x - mu + wd * x
        outer = m * outer + d
        d = d + m * outer if nesterov else outer
        x = x - lr * d * (g if variant == "pittorino" else 1)
        optimizer.step(closure_for(optimizer, w, H, c))
        assert torch.allclose(w.detach(), x, rtol=0, atol=1000 * EPS * float(x.norm()))


def test_noise_is_langevin_at_temperature_noise_squared():
    """On h w² / 2 the chain's variance after L steps is noise² 2 eta sum_k r^2k, with r = 1 - eta (h + gamma)."""
    n, h, gamma, eta, L, noise = 20_000, 0.7, 0.3, 0.1, 60, 0.2
    w = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = EntropySGD(
        [w], 0.0, variant="pittorino", gamma=gamma, inner_steps=L, inner_lr=eta, noise=noise
    )

    def closure():
        optimizer.zero_grad()
        (h * w.square().sum() / 2).backward()

    optimizer.step(closure)
    r = 1 - eta * (h + gamma)
    expected = noise**2 * 2 * eta * (1 - r ** (2 * L)) / (1 - r**2)
    chain = optimizer.state[w]["chain"]
    assert abs(float(chain.square().mean()) - expected) <= 4 * expected * math.sqrt(2 / n)
    assert abs(float(chain.mean())) <= 4 * math.sqrt(expected / n)
    assert float(w.detach().abs().max()) == 0  # lr = 0: put back


@pytest.mark.parametrize("variant", ["chaudhari", "pittorino"])
def test_resume_gives_the_same_bits(variant):
    def new():
        H, c, w = quadratic(seed=2)
        bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
        groups = [{"params": [w]}, {"params": [bias], "lr": 0.05}]
        optimizer = EntropySGD(
            groups, 0.5, variant=variant, gamma=None, scoping=Scoping("exponential", 10.0, steps=6),
            momentum=0.9, nesterov=True, noise=0.01, inner_steps=3, seed=7,
        )  # fmt: skip

        def closure():
            optimizer.zero_grad()
            loss = (w - c) @ H @ (w - c) / 2 + bias.square().sum()
            loss.backward()
            return loss.detach()

        return w, bias, optimizer, closure

    w, bias, optimizer, closure = new()
    for _ in range(3):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save({"w": w.detach(), "bias": bias.detach(), "state": optimizer.state_dict()}, file)
    for _ in range(3):
        optimizer.step(closure)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    w2, bias2, optimizer2, closure2 = new()
    with torch.no_grad():
        w2.copy_(saved["w"])
        bias2.copy_(saved["bias"])
    optimizer2.load_state_dict(saved["state"])
    for _ in range(3):
        optimizer2.step(closure2)
    assert torch.equal(w, w2) and torch.equal(bias, bias2)
    assert optimizer.couplings() == optimizer2.couplings()


def test_coupling_from_the_loss():
    H, c, w = quadratic(seed=3)
    optimizer = EntropySGD([w], 0.5, gamma=None, inner_steps=1, inner_lr=0.1, noise=0.0)
    gradient = (H @ (w - c)).detach()
    loss = float(((w - c) @ H @ (w - c) / 2).detach())
    assert optimizer.couplings() == [None]
    optimizer.step(closure_for(optimizer, w, H, c))
    expected = loss / (float((0.1 * gradient).square().sum()) / 2)
    # The squared distance comes from differences of w, whose rounding is eps |w|.
    size = 10 * EPS * float(w.detach().norm()) / float((0.1 * gradient).norm())
    assert abs(optimizer.couplings()[0] / expected - 1) <= size


def test_scoping():
    assert [Scoping("exponential", 100.0, steps=4)(t) for t in (0, 2, 4, 9)] == pytest.approx(
        [1, 10, 100, 100]
    )
    assert [Scoping("linear", 5.0, steps=4)(t) for t in (0, 1, 4, 5)] == [1, 2, 5, 5]
    assert [Scoping("cosine", 3.0, steps=2)(t) for t in (0, 1, 2)] == pytest.approx([1, 2, 3])
    assert Scoping("rate", 1.001)(1000) == pytest.approx(1.001**1000)
    assert [Scoping("linear", 5.0, steps=4, every=2)(t) for t in (0, 1, 2, 3)] == [1, 1, 3, 3]


def test_a_closure_that_raises_leaves_the_parameters():
    H, c, w = quadratic()
    optimizer = EntropySGD([w], 0.5, inner_steps=3)
    before, calls, inner = w.detach().clone(), [], closure_for(optimizer, w, H, c)

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of data")
        return inner()

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    assert torch.equal(w.detach(), before)
    assert optimizer.param_groups[0]["steps"] == 0


def test_parameters_without_gradients_stay():
    H, c, w = quadratic()
    idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = EntropySGD([w, idle], 0.5, inner_steps=3)
    optimizer.step(closure_for(optimizer, w, H, c))
    assert torch.equal(idle.detach(), torch.ones(3, dtype=torch.float64))


def test_learning_rate_schedulers_and_loss():
    H, c, w = quadratic()
    optimizer = EntropySGD([w], 1.0, inner_steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.2)
    first = closure_for(optimizer, w, H, c)()
    assert torch.equal(optimizer.step(closure_for(optimizer, w, H, c)), first)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert copy.deepcopy(optimizer).param_groups[0]["steps"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "hinton"}, "variant: expected 'chaudhari' or 'pittorino'"),
        ({"gamma": -1.0}, "gamma: expected a finite number >= 0"),
        ({"inner_steps": 0}, "inner_steps: expected at least 1"),
        ({"averaging": 1.0}, r"averaging: expected a number in \[0, 1\)"),
        ({"noise": float("nan")}, "noise: expected a finite number"),
        ({"scoping": 3}, "scoping: expected a flatcore.optim.Scoping"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EntropySGD([nn.Parameter(torch.zeros(2))], 0.1, **settings)


def test_bad_use():
    w = nn.Parameter(torch.zeros(2))
    optimizer = EntropySGD([w], 0.1)
    with pytest.raises(TypeError, match="closure: expected a function that gives new gradients"):
        optimizer.step()
    with pytest.raises(ValueError, match="seed: expected 0 as in the other groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "seed": 3})
    automatic = EntropySGD([w], 0.1, gamma=None)
    with pytest.raises(ValueError, match="gamma: expected a closure that returns the loss"):
        automatic.step(lambda: None)
    with pytest.raises(ValueError, match="kind: expected one of"):
        Scoping("quadratic", 2.0)

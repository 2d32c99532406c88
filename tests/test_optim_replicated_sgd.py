"""Replicated-SGD: where it is SGD, what the coupling conserves, its centre, its resume."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcore.optim import ReplicatedSGD, Scoping

EPS = torch.finfo(torch.float64).eps


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (8,), generator=generator)


def flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("replicas", [1, 3])
def test_equal_replicas_are_sgd(replicas):
    """One replica, and several with the same batches, move as SGD does, to the last bit."""
    plain = net(0)
    nets = [copy.deepcopy(plain) for _ in range(replicas)]
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    sgd = torch.optim.SGD(plain.parameters(), 0.1, foreach=False, **settings)
    optimizer = ReplicatedSGD(nets, 0.1, coupling=2.0, scoping=Scoping("rate", 1.5), **settings)
    for t in range(4):
        x, y = batch(t)
        sgd.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        sgd.step()
        optimizer.step(optimizer.closure(F.cross_entropy, [(x, y)] * replicas))
    for replica in nets:
        assert torch.equal(flat(replica), flat(plain))


def test_coupling_gradient_and_its_sum():
    """Without data the step is -lr 2 g (w^a - w_bar); over the replicas it sums to zero."""
    nets = [net(s) for s in range(3)]
    before = torch.stack([flat(n) for n in nets])
    optimizer = ReplicatedSGD(nets, 0.1, coupling=0.7, momentum=0.0, nesterov=False)
    optimizer.step()
    moved = torch.stack([flat(n) for n in nets]) - before
    expected = -0.1 * 2 * 0.7 * (before - before.mean(0))
    assert (moved - expected).abs().max() <= 10 * EPS * before.abs().max()
    assert moved.sum(0).abs().max() <= 30 * EPS * before.abs().max()


def test_coupling_is_the_gradient_of_the_replicated_loss():
    """y times the gradient of L_R, by autograd from the formula as it stands, w_bar not detached."""
    nets = [net(s) for s in range(3)]
    batches = [batch(s) for s in range(3)]
    twins = [copy.deepcopy(n) for n in nets]
    columns = list(zip(*(list(t.parameters()) for t in twins), strict=True))
    distance = sum(((p - sum(ps) / 3) ** 2).sum() for ps in columns for p in ps) / 3
    loss = sum(F.cross_entropy(t(x), y) for t, (x, y) in zip(twins, batches, strict=True)) / 3
    (3 * (loss + 0.3 * distance)).backward()
    optimizer = ReplicatedSGD(nets, 0.05, coupling=0.3, momentum=0.0, nesterov=False)
    before = [flat(n) for n in nets]
    value = optimizer.step(optimizer.closure(F.cross_entropy, batches))
    assert abs(float(value) - float(loss.detach())) <= 10 * EPS * float(value)
    for n, twin, old in zip(nets, twins, before, strict=True):
        gradient = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
        # Three passes of 8 rows and a difference of parameters of order one.
        assert (old - flat(n) - 0.05 * gradient).abs().max() <= 100 * EPS


def test_permuted_replicas():
    batches = [batch(s) for s in range(3)]
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        nets = [net(s) for s in order]
        optimizer = ReplicatedSGD(nets, 0.1, coupling=None)
        for _ in range(3):
            optimizer.step(optimizer.closure(F.cross_entropy, [batches[s] for s in order]))
        results.append({s: flat(n) for s, n in zip(order, nets, strict=True)})
    for s in range(3):
        assert torch.allclose(results[0][s], results[1][s], rtol=1e4 * EPS, atol=1e4 * EPS)


def test_coupling_from_the_loss():
    nets = [net(s) for s in range(3)]
    before = torch.stack([flat(n) for n in nets])
    optimizer = ReplicatedSGD(nets, 0.1, scoping=Scoping("exponential", 1e4, steps=4, every=2))
    loss = optimizer.step(optimizer.closure(F.cross_entropy, [batch(s) for s in range(3)]))
    distance = (before - before.mean(0)).square().sum() / 3
    g = float(loss / distance)
    couplings = [optimizer.coupling()]
    for _ in range(4):
        optimizer.step()
        couplings.append(optimizer.coupling())
    assert couplings == pytest.approx([g, 100 * g, 100 * g, 1e4 * g, 1e4 * g])


def test_centre():
    nets = [net(s) for s in range(3)]
    for count, n in enumerate(nets):
        for s in range(count + 1):
            n(batch(s)[0])
    nets[2][1].num_batches_tracked += 1  # 1, 2 and 4: the mean rounded up is 3
    optimizer = ReplicatedSGD(nets, 0.1, coupling=0.1)
    kept = [copy.deepcopy(n.state_dict()) for n in nets]
    centre = optimizer.centre()
    for name, value in centre.state_dict().items():
        parts = [k[name] for k in kept]
        if value.is_floating_point():
            assert torch.allclose(value, torch.stack(parts).mean(0), rtol=10 * EPS, atol=10 * EPS)
        else:
            assert int(value) == 3
    for n, k in zip(nets, kept, strict=True):
        assert all(torch.equal(v, k[name]) for name, v in n.state_dict().items())
    assert not {id(p) for p in centre.parameters()} & {id(p) for n in nets for p in n.parameters()}


def test_strong_coupling_contracts_to_the_centre():
    """w^a - w_bar shrinks by 1 - 2 lr g a step, w_bar stays."""
    nets = [net(s) for s in range(3)]
    optimizer = ReplicatedSGD(nets, 0.1, coupling=2.0, momentum=0.0, nesterov=False)
    middle = flat(optimizer.centre())
    spread = torch.stack([flat(n) for n in nets]) - middle
    for _ in range(10):
        optimizer.step()
    now = torch.stack([flat(n) for n in nets]) - middle
    assert (now - spread * 0.6**10).abs().max() <= 100 * EPS * middle.abs().max()


def test_resume_gives_the_same_bits():
    def new():
        nets = [net(s) for s in range(2)]
        return nets, ReplicatedSGD(nets, 0.1, scoping=Scoping("cosine", 50.0, steps=6), weight_decay=1e-3)

    def train(optimizer, steps):
        for t in steps:
            optimizer.step(optimizer.closure(F.cross_entropy, [batch(t), batch(100 + t)]))

    nets, optimizer = new()
    train(optimizer, range(3))
    file = io.BytesIO()
    torch.save({"nets": [n.state_dict() for n in nets], "state": optimizer.state_dict()}, file)
    train(optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = new()
    for n, state in zip(again, saved["nets"], strict=True):
        n.load_state_dict(state)
    resumed.load_state_dict(saved["state"])
    train(resumed, range(3, 6))
    assert all(torch.equal(flat(a), flat(b)) for a, b in zip(nets, again, strict=True))


def test_copies():
    nets = [net(s) for s in range(2)]
    optimizer = ReplicatedSGD(nets, 0.1, coupling=0.3)
    optimizer.step(optimizer.closure(F.cross_entropy, [batch(0), batch(1)]))
    other = copy.deepcopy(optimizer)
    for o in (optimizer, other):
        o.step(o.closure(F.cross_entropy, [batch(2), batch(3)]))
    assert torch.equal(flat(optimizer.centre()), flat(other.centre()))
    assert not {id(p) for r in optimizer.replicas for p in r.parameters()} & {
        id(p) for r in other.replicas for p in r.parameters()
    }


def test_bad_input():
    with pytest.raises(TypeError, match="replicas: expected a list of modules, got one Sequential"):
        ReplicatedSGD(net(0), 0.1)
    with pytest.raises(TypeError, match="replicas: expected at least one"):
        ReplicatedSGD([], 0.1)
    with pytest.raises(ValueError, match=r"replicas: expected nets alike, got 'weight' of shape \(2, 3\)"):
        ReplicatedSGD([nn.Linear(3, 2), nn.Linear(2, 3)], 0.1)
    shared = net(0)
    with pytest.raises(ValueError, match="share no parameter"):
        ReplicatedSGD([shared, shared], 0.1)
    equal = [net(0), net(0)]
    with pytest.raises(ValueError, match="coupling: expected a closure"):
        ReplicatedSGD(equal, 0.1).step()
    optimizer = ReplicatedSGD(equal, 0.1, coupling=1.0)
    with pytest.raises(ValueError, match="batches: expected one for each of the 2 replicas, got 1"):
        optimizer.closure(F.cross_entropy, [batch(0)])
    with pytest.raises(ValueError, match="param_group: expected none"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

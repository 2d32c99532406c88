"""The generalisation gap: against dense sums over examples, and against gaps of simulated regressions."""

import math
import os

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian
from torch.nn import functional as F
from untouched import untouched

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning
from flatcore.measures.example_gradients import sign_sums


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half_mse(output, target):
    return (output - target).square().sum() / (2 * len(output))


def net(seed=0, sizes=(4, 5, 3)):
    torch.manual_seed(seed)
    a, b, c = sizes
    return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)).double()


def classes(n=12, seed=1, inputs=4):
    return random(n, inputs, seed=seed), torch.randint(
        0, 3, (n,), generator=torch.Generator().manual_seed(seed)
    )


def example_gradients(model, loss, x, y):
    names = [n for n, _ in model.named_parameters()]
    values = [p.detach() for p in model.parameters()]
    sizes = [v.numel() for v in values]

    def f(flat, x=x, y=y):
        parts = [p.view_as(v) for p, v in zip(flat.split(sizes), values, strict=True)]
        return loss(functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    flat = torch.cat([v.reshape(-1) for v in values])
    gradients = torch.stack([grad(f)(flat, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    return gradients, hessian(f)(flat)


def takeuchi(A, gradients, damping, n):
    away = gradients - gradients.mean(0)
    solved = torch.linalg.solve(A + damping * torch.eye(len(A), dtype=A.dtype), away.T)
    return float((away.T * solved).sum()) / len(gradients) / n


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_sum_over_examples(matrix):
    """(1/n) sum_i (g_i - g)ᵀ (A + lambda I)^-1 (g_i - g) / n; in batches too; by probes within their bar."""
    model, (x, y) = net(), classes()
    gradients, H = example_gradients(model, F.cross_entropy, x, y)
    objective = fc.Objective(model, F.cross_entropy, [(x[:7], y[:7]), (x[7:], y[7:])])
    A = H if matrix == "hessian" else fc.GGN(objective).to_dense()
    damping = 2.0
    assert float(torch.linalg.eigvalsh(H)[0]) > -damping
    settings = {"matrix": matrix, "rtol": 0.1}
    expected = takeuchi(A, gradients, damping, 12)
    if matrix == "hessian":
        with pytest.warns(
            FlatcoreWarning, match="generalization_gap: the curvature has a negative eigenvalue"
        ):
            result = measures.generalization_gap(objective, damping, **settings)
        with pytest.warns(FlatcoreWarning, match="generalization_gap: the Hessian has a negative eigenvalue"):
            probes = measures.generalization_gap(objective, damping, method="probes", **settings)
    else:
        with untouched(model, x, y):
            result = measures.generalization_gap(objective, damping, **settings)
        probes = measures.generalization_gap(objective, damping, method="probes", **settings)
    assert result.value == pytest.approx(expected, rel=1e-9) and result.stderr == 0
    assert abs(probes.value - expected) <= 4 * probes.stderr
    assert 0 < probes.stderr <= 0.1 * probes.value and probes.passes >= 16


def test_signed_sums_have_the_covariance():
    """Over all sign vectors of three examples the mean of u uᵀ is C: here over many draws, entry by entry."""
    model, (x, y) = net(), classes(3)
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    gradients, _ = example_gradients(model, F.cross_entropy, x, y)
    away = gradients - gradients.mean(0)
    C = away.T @ away / 3
    found = {}
    for k in range(0, 64, 8):
        for column in sign_sums(objective, 0, k, 8).T:
            # Each u is a signed sum of the three; which signs tells its coefficients.
            signs = torch.linalg.lstsq(away[:2].T, (column * 3**0.5)[:, None]).solution
            found[tuple(signs.flatten().round(decimals=6).tolist())] = column
    # s and -s give the same: (s1 - s3, s2 - s3) takes 7 values, of which (0, 0) stands for two of the 8.
    assert len(found) == 7 and any(all(abs(v) < 1e-5 for v in key) for key in found)
    mean = sum(torch.outer(u, u) for u in found.values()) / 8
    assert torch.allclose(mean, C, rtol=1e-10, atol=1e-12)


def test_held_out_gradients():
    model, (x, y) = net(), classes()
    other = classes(9, seed=5)
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    held_out = fc.Objective(model, F.cross_entropy, other)
    gradients, _ = example_gradients(model, F.cross_entropy, *other)
    expected = takeuchi(fc.GGN(objective).to_dense(), gradients, 0.1, 12)
    result = measures.generalization_gap(objective, 0.1, gradients=held_out)
    assert result.value == pytest.approx(expected, rel=1e-9)
    assert result.details["gradients"] == "the objective given"


@pytest.mark.parametrize(
    ("loss", "target", "factor"),
    [
        (F.cross_entropy, "classes", 1 / 12),
        (half_mse, "numbers", 0.25 / 12),
        (F.mse_loss, "numbers", 0.25 * 2 / 3 / 12),
        (nn.CrossEntropyLoss(reduction="sum"), "classes", 1.0),
        (F.binary_cross_entropy_with_logits, "binary", 1 / 36),
    ],
)
def test_calibrated(loss, target, factor):
    """kappa rank_lambda, kappa the weight of one target's negative log likelihood."""
    model, (x, y) = net(), classes()
    y = {"classes": y, "numbers": random(12, 3, seed=3), "binary": (random(12, 3, seed=3) > 0).double()}[
        target
    ]
    objective = fc.Objective(model, loss, (x, y))
    result = measures.generalization_gap(objective, 0.1, calibrated=True, noise_variance=0.25, method="exact")
    rank = measures.soft_rank(objective, 0.1, method="exact").value
    assert result.value == pytest.approx(factor * rank, rel=1e-12)
    assert result.details["coefficient"] == pytest.approx(factor, rel=1e-12)


def test_calibrated_counts_targets():
    """Targets that are ignored do not count; several an example do."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = random(6, 5, 4), torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(0))
    y[:, 4] = -100

    def loss(output, target):
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    result = measures.generalization_gap(fc.Objective(model, loss, (x, y)), 0.1, calibrated=True)
    assert result.details["coefficient"] == pytest.approx(1 / 24, rel=1e-12)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_sampled_targets_are_calibrated_in_the_mean(kind):
    """E C of targets drawn from the model is F: so E gap = kappa rank_lambda(F), and not 1 - 1/n of it, as if C were
    centred. The bars hold the noise of the draws."""
    n = 4
    model, (x, y) = net(), classes(n)
    loss = F.cross_entropy if kind == "classes" else half_mse
    objective = fc.Objective(model, loss, (x, y if kind == "classes" else random(n, 3, seed=3)))
    exact = measures.generalization_gap(
        objective, 0.05, calibrated=True, noise_variance=0.5, method="exact"
    ).value
    for method, seeds in (("exact", 8), ("probes", 20)):
        settings = {"gradients": "sampled", "noise_variance": 0.5, "method": method, "rtol": 0.1}
        runs = [measures.generalization_gap(objective, 0.05, seed=s, **settings) for s in range(seeds)]
        samples = torch.tensor([r.value for r in runs])
        error = float(samples.std()) / math.sqrt(seeds)
        assert abs(float(samples.mean()) - exact) <= 4 * error < exact / n
        assert all(r.stderr > 0 and abs(r.value - exact) <= 4 * r.stderr for r in runs)


@pytest.mark.parametrize("method", ["exact", "probes"])
@pytest.mark.parametrize("gradients", ["data", "sampled"])
def test_examples_that_do_not_count(method, gradients):
    """Ignored targets, and classes without weight: the gap is that without their rows, the same draws included."""
    model, (x, y) = net(), classes()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 1.0]).double())
    if gradients == "sampled":  # has no classes of different weight
        loss, y = nn.CrossEntropyLoss(), torch.where(y == 1, 0, y)
    more = torch.tensor([-100, 0, -100, 2]), random(4, 4, seed=7)
    kept = (y != 1).nonzero().flatten()
    settings = {"method": method, "gradients": gradients, "rtol": 0.2}
    few = fc.Objective(
        model, loss, (torch.cat([x[kept], more[1][1::2]]), torch.cat([y[kept], more[0][1::2]]))
    )
    all_ = fc.Objective(model, loss, [(torch.cat([x, more[1]]), torch.cat([y, more[0]])),
                                      (more[1], torch.full((4,), -100))])  # fmt: skip
    a, b = (measures.generalization_gap(o, 0.1, **settings) for o in (few, all_))
    if gradients == "sampled":  # other rows, other draws
        assert abs(a.value - b.value) <= 4 * math.hypot(a.stderr, b.stderr)
        a, b = (measures.generalization_gap(o, 0.1, calibrated=True, method="exact") for o in (few, all_))
    # Solves to 1e-6 leave an error of second order.
    assert a.value == pytest.approx(b.value, rel=1e-9)


def test_gap_of_ridge_regression():
    """With inputs fixed E (L_test - L_train) = s² Tr(hat matrix)/n = s² rank_lambda(H)/n exactly, for half the
    squared error and targets with noise of variance s². 20 000 data sets; the whole gap, not half of it."""
    n, d, damping, variance = 30, 6, 0.2, 0.3
    x, w = random(n, d), random(d, seed=1)
    H = x.T @ x / n
    noise = variance**0.5 * random(2, 20_000, n, seed=2)
    train, test = x @ w + noise[0], x @ w + noise[1]
    fitted = torch.linalg.solve(H + damping * torch.eye(d, dtype=x.dtype), x.T @ train.T / n).T @ x.T
    gaps = ((fitted - test).square() - (fitted - train).square()).mean(1) / 2
    model = nn.Linear(d, 1, bias=False).double()
    objective = fc.Objective(model, half_mse, (x, train[0][:, None]))
    result = measures.generalization_gap(objective, damping, calibrated=True, noise_variance=variance)
    assert abs(float(gaps.mean()) - result.value) <= 4 * float(gaps.std()) / math.sqrt(20_000)
    # And Takeuchi's with the true C = s² H (the model's variance of 1 is wrong) is the same number.
    C = variance * H
    assert result.value == pytest.approx(
        float(torch.trace(torch.linalg.solve(H + damping * torch.eye(d, dtype=x.dtype), C))) / n, rel=1e-9
    )


def test_gap_of_logistic_regression():
    """Labels from the model, inputs fixed: n gap -> rank_lambda(F) for n -> inf, with relative corrections of order
    d/n.

    The gap is the expectation over new labels less the training loss; the same difference at the true parameters,
    whose mean is zero, is taken off against noise.
    """
    n, d, damping, sets = 500, 3, 0.02, 1500
    x, w = random(n, d), 0.7 * random(d, seed=1)
    p = torch.sigmoid(x @ w)
    y = torch.bernoulli(p.expand(sets, n), generator=torch.Generator().manual_seed(3))

    # The penalty pulls towards the truth, as a prior around it would: the model stays calibrated at its optimum.
    theta = w.expand(sets, d).clone()
    eye = damping * torch.eye(d, dtype=x.dtype)
    for _ in range(6):
        q = torch.sigmoid(theta @ x.T)
        slope = (q - y) @ x / n + damping * (theta - w)
        theta = theta - torch.linalg.solve(torch.einsum("sn,ni,nj->sij", q * (1 - q), x, x) / n + eye, slope)

    def loss(theta, y):
        z = theta @ x.T
        return (F.softplus(z) - y * z).mean(-1)

    gaps = (loss(theta, p) - loss(theta, y)) - (loss(w, p) - loss(w, y))
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w[None])
    objective = fc.Objective(model, F.binary_cross_entropy_with_logits, (x, y[:1].T))
    result = measures.generalization_gap(objective, damping, calibrated=True)
    assert result.details["coefficient"] == pytest.approx(1 / n)
    assert (
        abs(float(gaps.mean()) - result.value)
        <= 4 * float(gaps.std()) / math.sqrt(sets) + d / n * result.value
    )


def test_sum_and_mean():
    """The sum's gap is n times the mean's, for lambda n."""
    model, (x, y) = net(), classes()
    mean = fc.Objective(model, nn.CrossEntropyLoss(), (x, y))
    total = fc.Objective(model, nn.CrossEntropyLoss(reduction="sum"), (x, y))
    for settings in ({}, {"calibrated": True, "method": "exact"}):
        a = measures.generalization_gap(mean, 0.01, **settings).value
        b = measures.generalization_gap(total, 0.12, **settings).value
        assert b == pytest.approx(12 * a, rel=1e-9)


def test_rescaled_neurons():
    """For lambda > 0 another number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    other = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for a, b, factor in zip(other.parameters(), model.parameters(), (4, 4, 0.25, 1), strict=True):
            a.copy_(factor * b)
    objectives = [fc.Objective(m, F.cross_entropy, classes()) for m in (model, other)]
    a, b = (measures.generalization_gap(o, 0.01).value for o in objectives)
    assert abs(a / b - 1) > 0.01


def test_no_negative_curvature_in_silence():
    model, (x, y) = net(), classes()
    _, H = example_gradients(model, F.cross_entropy, x, y)
    lowest = float(torch.linalg.eigvalsh(H)[0])
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    for method, message in (("exact", "positive definite"), ("probes", "the Hessian has an eigenvalue")):
        with pytest.raises(ValueError, match=f"damping: expected .*{message}"):
            measures.generalization_gap(objective, -lowest / 2, matrix="hessian", method=method)


def test_float32():
    """The bar holds what float32 solves leave open."""
    model, (x, y) = net(), classes()
    expected = measures.generalization_gap(fc.Objective(model, F.cross_entropy, (x, y)), 0.01).value
    single = fc.Objective(model.float(), F.cross_entropy, (x.float(), y))
    result = measures.generalization_gap(single, 0.01, method="probes", rtol=0.1)
    assert result.status == "converged" and abs(result.value - expected) <= 4 * result.stderr


def test_budget():
    objective = fc.Objective(net(), F.cross_entropy, classes())
    with pytest.warns(FlatcoreWarning, match="rtol = 0.0001 not reached after .* products"):
        result = measures.generalization_gap(objective, 0.1, method="probes", rtol=1e-4, max_matvecs=400)
    assert result.status.startswith("rtol") and result.matvecs <= 400 and result.value > 0


def test_bad_input():
    model, (x, y) = net(), classes()
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    gap = measures.generalization_gap
    with pytest.raises(TypeError, match=r"objective: expected a flatcore.Objective"):
        gap(model, 0.1)
    with pytest.raises(ValueError, match="damping: expected either damping= or optimizer="):
        gap(objective)
    with pytest.raises(ValueError, match="gradients: expected 'data', 'sampled' or an Objective, got 'test'"):
        gap(objective, 0.1, gradients="test")
    with pytest.raises(ValueError, match="gradients: expected an Objective of the same model"):
        gap(objective, 0.1, gradients=fc.Objective(net(1), F.cross_entropy, (x, y)))
    with pytest.raises(ValueError, match="gradients: expected none with calibrated=True"):
        gap(objective, 0.1, gradients="sampled", calibrated=True)
    with pytest.raises(ValueError, match="method: expected 'auto', 'exact' or 'probes', got 'kfac'"):
        gap(objective, 0.1, method="kfac")
    smooth = fc.Objective(model, nn.CrossEntropyLoss(label_smoothing=0.1), (x, y))
    with pytest.raises(ValueError, match=r"calibrated: expected the negative log .*label_smoothing"):
        gap(smooth, 0.1, calibrated=True)
    huber = fc.Objective(model, F.smooth_l1_loss, (x, random(12, 3)))
    with pytest.raises(ValueError, match="calibrated: expected a cross-entropy or a squared error"):
        gap(huber, 0.1, calibrated=True)
    own = fc.Objective(model, fc.ModelLoss(lambda m, b: F.cross_entropy(m(b[0]), b[1])), (x, y))
    with pytest.raises(ValueError, match=r"gradients: expected a loss\(output, target\) to draw targets for"):
        gap(own, 0.1, gradients="sampled")
    normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    mixing = fc.Objective(normed, F.cross_entropy, (x, y), allow_train_mode=True)
    with pytest.raises(ValueError, match="model: expected examples that do not interact"):
        gap(mixing, 0.1, method="probes")


@pytest.mark.skipif(not os.environ.get("FLATCORE_LONG"), reason="FLATCORE_LONG=1: minutes")
def test_bars_over_many_seeds():
    """Two standard errors of the probes hold the exact value in 95 % of the runs, give or take four deviations."""
    model, (x, y) = net(), classes()
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    exact = measures.generalization_gap(objective, 0.05).value
    runs = [
        measures.generalization_gap(objective, 0.05, method="probes", rtol=0.1, seed=s) for s in range(200)
    ]
    inside = sum(abs(r.value - exact) <= 2 * r.stderr for r in runs) / 200
    assert inside >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 200)
    mean = sum(r.value for r in runs) / 200
    spread = math.sqrt(sum((r.value - mean) ** 2 for r in runs) / 199 / 200)
    assert abs(mean - exact) <= 4 * spread

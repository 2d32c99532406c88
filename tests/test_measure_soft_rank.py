"""Soft rank: closed forms, bounds, Kronecker factors against a plain loop, damping from optimizers."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from untouched import untouched

import flatcore as fc
from flatcore import functionals, measures
from flatcore.errors import FlatcoreWarning
from flatcore.measures.kfac import kfac_eigenvalues
from flatcore.measures.soft_rank import _of_diagonal
from flatcore.optim import EntropySGD


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half_mse(output, target):
    return (output - target).square().sum() / (2 * len(output))


def net(seed=0, activation=nn.Tanh):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()


def classes(n=12, seed=1):
    return random(n, 4, seed=seed), torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))


def flat_function(model, loss, x, y):
    names = [n for n, _ in model.named_parameters()]
    values = [p.detach() for p in model.parameters()]

    def outputs(flat, x=x):
        parts = [p.view_as(v) for p, v in zip(flat.split([v.numel() for v in values]), values, strict=True)]
        return functional_call(model, dict(zip(names, parts, strict=True)), (x,))

    return outputs, torch.cat([v.reshape(-1) for v in values])


def rank(eigenvalues, damping):
    return float((eigenvalues / (eigenvalues + damping)).sum())


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("method", ["auto", "exact", "kfac", "diagonal"])
def test_diagonal_matrix(method, matrix):
    """Orthogonal inputs of lengths sqrt(n h_j): H = I (x) diag h, of which every approximation is exact."""
    h = torch.tensor([4.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    x = torch.diag((4 * h).sqrt())
    model = nn.Linear(4, 2, bias=False).double()
    objective = fc.Objective(model, half_mse, (x, random(4, 2)))
    if method == "kfac" and matrix == "hessian":
        with pytest.raises(ValueError, match="method: 'kfac' approximates the Gauss-Newton matrix"):
            measures.soft_rank(objective, 0.3, method=method, matrix=matrix)
        return
    with untouched(model, x):
        result = measures.soft_rank(objective, 0.3, method=method, matrix=matrix)
    assert result.value == pytest.approx(2 * rank(h, 0.3), rel=1e-12)
    assert result.stderr == 0 and result.details["damping"] == 0.3


def test_gram_matrix_and_limits():
    """The nonzero eigenvalues are those of the Gram matrix of S^(1/2) J / sqrt(n); small and large lambda."""
    model, (x, y) = net(), classes(3)
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    outputs, flat = flat_function(model, F.cross_entropy, x, y)
    J = jacrev(outputs)(flat).detach()
    p = torch.softmax(outputs(flat), 1).detach()
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    rows = torch.einsum("nkc,nkp->ncp", vectors * values.clamp_min(0).sqrt()[:, None, :], J).reshape(9, -1)
    gram = torch.linalg.eigvalsh(rows @ rows.T / 3).clamp_min(0)
    for method in {"exact", "gram"} & set(functionals._PROBES):
        for damping in (1e-3, 0.1, 1e4):
            result = measures.soft_rank(objective, damping, method=method)
            assert result.value == pytest.approx(rank(gram, damping), rel=1e-9)
    # Softmax's null vector leaves 2 rows an example: the rank. The least eigenvalue seen decides how close 1e-9 is.
    least = float(gram[gram > 1e-12][0])
    assert measures.soft_rank(objective, 1e-9, method="exact").value == pytest.approx(
        6, abs=6e-9 / least + 1e-5
    )
    trace = float(gram.sum())
    assert measures.soft_rank(objective, 1e6).value == pytest.approx(
        trace / 1e6, rel=2 * float(gram[-1]) / 1e6 + 1e-2
    )
    assert measures.soft_rank(objective, 0.1).value <= min(9, objective.layout.size)


def test_pinching():
    """rank(F) <= rank(blocks of F) <= rank(diagonal of F)."""
    model = net()
    objective = fc.Objective(model, F.cross_entropy, classes())
    G = fc.GGN(objective).to_dense()
    blocks = [G[part, part] for part in objective.parameter_slices.values()]
    for damping in (1e-4, 1e-2, 1.0):
        whole = measures.soft_rank(objective, damping, method="exact").value
        diagonal = measures.soft_rank(objective, damping, method="diagonal").value
        middle = sum(rank(torch.linalg.eigvalsh(b).clamp_min(0), damping) for b in blocks)
        assert whole <= middle * (1 + 1e-9) and middle <= diagonal * (1 + 1e-9)
        assert whole < 0.99 * diagonal
        assert diagonal == pytest.approx(rank(G.diagonal(), damping), rel=1e-9)


def test_noise_in_a_diagonal_has_no_bias_of_second_order():
    """x / (x + lambda) is concave: of entries x + e noise its mean is low by lambda e² / (x + lambda)³, here 22 times
    the standard error. With r = e / (x + lambda), the next terms are 3 r² of that, and 5 r² of the error."""
    n, x, e, damping = 200_000, 0.2, 0.02, 0.2
    entries, errors = x + e * random(n), torch.full((n,), e, dtype=torch.float64)
    value, stderr = _of_diagonal(entries, errors, damping)
    low = damping * e**2 / (x + damping) ** 3
    assert low > 20 * stderr / n
    assert abs(value / n - x / (x + damping)) <= 4 * stderr / n + 0.01 * low
    assert stderr == pytest.approx(n**0.5 * e * damping / (x + damping) ** 2, rel=0.02)


def test_lanczos_within_its_bar():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    x, y = random(30, 8), torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(2))
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    exact = measures.soft_rank(objective, 0.01, method="exact").value
    result = measures.soft_rank(objective, 0.01, method="lanczos", rtol=0.05)
    assert abs(result.value - exact) <= 4 * result.stderr and result.stderr > 0


def kfac_by_hand(model, x, loss_curvature):
    """Of the two layers of `net`: sum over examples of d dᵀ from every column of the curvature's root, and of a aᵀ."""
    hidden = torch.cat([model[1](model[0](x)), x.new_ones(len(x), 1)], 1).detach()
    inputs = torch.cat([x, x.new_ones(len(x), 1)], 1)
    factors = []
    for a, tail in ((inputs, model[1:]), (hidden, None)):
        d = torch.zeros(5 if tail else 3, 5 if tail else 3, dtype=x.dtype)
        for i in range(len(x)):
            z = model[0](x[i]).detach()
            J = torch.autograd.functional.jacobian(tail, z) if tail else torch.eye(3, dtype=x.dtype)
            d += J.T @ loss_curvature(i) @ J / len(x)
        factors.append((d, a.T @ a / len(x)))
    return factors


def test_kfac_against_a_plain_loop():
    model, (x, y) = net(), classes()
    p = torch.softmax(model(x), 1).detach()
    factors = kfac_by_hand(model, x, lambda i: torch.diag(p[i]) - torch.outer(p[i], p[i]))
    for batches in ((x, y), [(x[:5], y[:5]), (x[5:], y[5:])]):
        objective = fc.Objective(model, F.cross_entropy, batches)
        with untouched(model, x):
            own = kfac_eigenvalues(objective)
        for values, (d, a) in zip(own.values(), factors, strict=True):
            expected = torch.linalg.eigvalsh(torch.kron(d, a))
            assert torch.allclose(values.sort().values, expected, rtol=0, atol=1e-12 * float(expected[-1]))
    result = measures.soft_rank(fc.Objective(model, F.cross_entropy, (x, y)), 0.01, method="kfac")
    expected = sum(rank(torch.linalg.eigvalsh(torch.kron(d, a)).clamp_min(0), 0.01) for d, a in factors)
    assert result.value == pytest.approx(expected, rel=1e-10)
    assert sum(m.value for m in result.by_layer.values()) == pytest.approx(result.value)


def test_kfac_is_exact_for_linear_nets_and_for_one_example():
    """The derivatives by a layer's outputs are the same for all examples, or there is one."""
    linear = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    one = fc.Objective(net(), F.cross_entropy, classes(1))
    several = fc.Objective(linear, F.mse_loss, (random(10, 4), random(10, 3, seed=1)))
    for objective in (one, several):
        G = fc.GGN(objective).to_dense()
        for path, values in kfac_eigenvalues(objective).items():
            where = [objective.parameter_slices[f"{path}.{kind}"] for kind in ("weight", "bias")]
            index = torch.cat([torch.arange(s.start, s.stop) for s in where])
            exact = torch.linalg.eigvalsh(G[index][:, index])
            assert torch.allclose(values.sort().values, exact, rtol=0, atol=1e-12 * float(exact[-1]))


def test_kfac_of_a_convolution():
    """A convolution over the whole image is a linear layer; two places are averaged as Grosse and Martens do."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()).double()
    x, y = random(6, 2, 3, 3), random(6, 3, seed=1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(18, 3)).double()
    a = kfac_eigenvalues(fc.Objective(conv, half_mse, (x, y)))["0"]
    b = kfac_eigenvalues(fc.Objective(linear, half_mse, (x, y)))["1"]
    assert torch.allclose(a.sort().values, b.sort().values, rtol=1e-12, atol=1e-13)
    x, y = random(6, 2, 3, 4), random(6, 6, seed=1)
    values = kfac_eigenvalues(fc.Objective(conv, half_mse, (x, y)))["0"]
    patches = torch.cat([x[..., :3].reshape(6, 18), x[..., 1:].reshape(6, 18)])
    a = torch.cat([patches, torch.ones(12, 1, dtype=x.dtype)], 1)
    # d of a place and output: one entry 1/sqrt(6) each, so sum d dᵀ = 2 I over 6 examples and 2 places.
    expected = torch.linalg.eigvalsh(torch.kron(2 * torch.eye(3, dtype=x.dtype), a.T @ a / 12))
    assert torch.allclose(values.sort().values, expected, rtol=0, atol=1e-12 * float(expected[-1]))


def test_invariances():
    """Permuted neurons leave it, rescaled ones do not."""
    model, data = net(activation=nn.ReLU), classes()
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted, rescaled = net(activation=nn.ReLU), net(activation=nn.ReLU)
    with torch.no_grad():
        for p in (permuted[0].weight, permuted[0].bias):
            p.copy_(p[order])
        permuted[2].weight.copy_(permuted[2].weight[:, order])
        rescaled[0].weight.mul_(4)
        rescaled[0].bias.mul_(4)
        rescaled[2].weight.div_(4)
    a, b, c = (measures.soft_rank(fc.Objective(m, F.cross_entropy, data), 0.01, method="exact").value
               for m in (model, permuted, rescaled))  # fmt: skip
    assert a == pytest.approx(b, rel=1e-10) and abs(a - c) > 1e-2


def test_sum_and_mean():
    model, (x, y) = net(), classes()
    mean = fc.Objective(model, nn.CrossEntropyLoss(), (x, y))
    total = fc.Objective(model, nn.CrossEntropyLoss(reduction="sum"), (x, y))
    one, other = (
        measures.soft_rank(o, d, method="exact").value for o, d in ((mean, 0.01), (total, 0.01 * len(x)))
    )
    assert one == pytest.approx(other, rel=1e-10)
    sgd = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.01)
    with pytest.raises(
        ValueError, match="optimizer: expected an objective that is a mean, got a loss with reduction"
    ):
        measures.soft_rank(total, optimizer=sgd)


def test_negative_curvature():
    """An eigenvalue below -lambda is refused, one above is warned of; the Gauss-Newton matrix has none."""
    model, (x, y) = net(), classes()
    objective = fc.Objective(model, F.cross_entropy, (x, y))
    outputs, flat = flat_function(model, F.cross_entropy, x, y)
    values = torch.linalg.eigvalsh(hessian(lambda f: F.cross_entropy(outputs(f), y))(flat))
    lowest = float(values[0])
    assert lowest < -1e-3
    with pytest.raises(ValueError, match=r"damping: expected more than .* the Hessian has an eigenvalue of"):
        measures.soft_rank(objective, -lowest / 2, matrix="hessian")
    with pytest.warns(FlatcoreWarning, match="soft_rank: the Hessian has a negative eigenvalue"):
        result = measures.soft_rank(objective, -2 * lowest, matrix="hessian", method="exact")
    assert result.value == pytest.approx(rank(values, -2 * lowest), rel=1e-9)
    assert result.details["lowest"] == pytest.approx(lowest, rel=1e-3)
    measures.soft_rank(objective, -lowest / 2)


def test_damping_from_an_optimizer():
    model = net()
    objective = fc.Objective(model, F.cross_entropy, classes())
    expected = measures.soft_rank(objective, 0.02).value
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        result = measures.soft_rank(objective, optimizer=kind(model.parameters(), 0.1, weight_decay=0.02))
        assert result.value == expected and result.details["damping"] == 0.02
    groups = [{"params": model[0].parameters(), "weight_decay": 0.02}, {"params": model[2].parameters()}]
    mixed = torch.optim.SGD(groups, 0.1, weight_decay=0.0)
    part = fc.Objective(model, F.cross_entropy, classes(), "0.*")
    assert measures.soft_rank(part, optimizer=mixed).details["damping"] == 0.02
    cases = [
        (torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.02), "got AdamW's decoupled one"),
        (
            torch.optim.NAdam(model.parameters(), decoupled_weight_decay=True, weight_decay=0.1),
            "NAdam's decoupled",
        ),
        (
            torch.optim.SGD(groups, 0.1),
            "expected one weight decay for all selected parameters, got 0.02 for '0.weight'",
        ),
        (torch.optim.SGD(model.parameters(), 0.1), "expected a positive weight decay, got 0"),
        (torch.optim.SGD(model[0].parameters(), 0.1, weight_decay=1), "got none for '2.weight'"),
        (torch.optim.SGD(model.parameters(), 0.1, weight_decay=1, maximize=True), "one that minimises"),
        (EntropySGD(model.parameters(), 1.0, weight_decay=0.1), "got EntropySGD"),
        (torch.optim.LBFGS(model.parameters()), "got LBFGS"),
    ]
    for optimizer, message in cases:
        with pytest.raises(ValueError, match=message):
            measures.soft_rank(objective, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got float"):
        measures.soft_rank(objective, optimizer=0.1)


def test_bad_input():
    model = net()
    objective = fc.Objective(model, F.cross_entropy, classes())
    with pytest.raises(TypeError, match=r"objective: expected a flatcore.Objective, got Sequential"):
        measures.soft_rank(model, 0.1)
    with pytest.raises(ValueError, match="damping: expected either damping= or optimizer=, got neither"):
        measures.soft_rank(objective)
    with pytest.raises(ValueError, match="damping: expected a positive number, got 0"):
        measures.soft_rank(objective, 0)
    with pytest.raises(ValueError, match="matrix: expected 'ggn' or 'hessian', got 'fisher'"):
        measures.soft_rank(objective, 0.1, matrix="fisher")
    with pytest.raises(ValueError, match=r"method: expected one of auto, .*, kfac, diagonal, got 'lanzcos'"):
        measures.soft_rank(objective, 0.1, method="lanzcos")
    normed = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"for method='kfac', got '1.weight'"):
        measures.soft_rank(fc.Objective(normed, F.cross_entropy, classes()), 0.1, method="kfac")
    grouped = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(4, 3)).double()
    data = random(5, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match="for method='kfac', got '0', a Conv1d"):
        measures.soft_rank(fc.Objective(grouped, F.cross_entropy, data), 0.1, method="kfac")

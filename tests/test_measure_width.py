"""Width of deep linear nets against dense Hessians and closed forms; couplings of any net."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from untouched import untouched

import flatcore as fc
from flatcore import measures

EPS = torch.finfo(torch.float64).eps


def half_mse(output, target):
    return (output - target).square().sum() / (2 * len(output))


def sum_mse(output, target):
    return (output - target).square().sum() / len(output)


def chain(*matrices, bias=False):
    net = nn.Sequential(*(nn.Linear(W.shape[1], W.shape[0], bias=bias) for W in matrices)).double()
    with torch.no_grad():
        for layer, W in zip(net, matrices, strict=True):
            layer.weight.copy_(W)
    return net


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n, seed):
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def white(n=12, d=4, seed=5):
    """n inputs with second moment I."""
    return torch.linalg.qr(random(n, d, seed=seed))[0] * n**0.5


def targets(net, x, K, noise=0.5, seed=9):
    """Targets of which the net is the regression: its outputs and a residual orthogonal to inputs and constant."""
    with torch.no_grad():
        y = net(x)
    r = noise * random(len(x), K, seed=seed)
    basis = torch.linalg.qr(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1))[0]
    return y + r - basis @ (basis.T @ r)


def dense(net, loss, x, y):
    names = [n for n, _ in net.named_parameters()]
    values = [p.detach() for p in net.parameters()]
    sizes = [v.numel() for v in values]

    def f(flat):
        parts = [p.view_as(v) for p, v in zip(flat.split(sizes), values, strict=True)]
        return loss(functional_call(net, dict(zip(names, parts, strict=True)), (x,)), y)

    return hessian(f)(torch.cat([v.reshape(-1) for v in values]))


def balanced(T, M, seed=0):
    """W_i = Q_(i+1) S^(1/M) Q_i^T with orthogonal Q between, W_M ... W_1 = T."""
    U, s, Vt = torch.linalg.svd(T)
    root = torch.diag(s ** (1 / M))
    Q = [Vt.T, *(orthogonal(len(s), seed + i) for i in range(M - 1)), U]
    return [Q[i + 1] @ root @ Q[i].T for i in range(M)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", [half_mse, sum_mse, F.mse_loss])
def test_spectrum_at_any_global_minimum(loss, bias):
    net = chain(random(5, 4), random(6, 5, seed=1), random(3, 6, seed=2), bias=bias)
    x = random(20, 4, seed=3) + (0.3 if bias else 0.0)
    y = targets(net, x, 3)
    objective = fc.Objective(net, loss, (x, y))
    with untouched(net, x, y):
        result = measures.width(objective)
    assert result.status == "converged"
    exact = torch.linalg.eigvalsh(dense(net, loss, x, y)).flip(0)
    own = result.details["eigenvalues"]
    # Of K all, of H the first as many; the rest are zeros. Errors of products of three matrices.
    size = 1e3 * EPS * exact[0]
    assert (exact[: len(own)] - own).abs().max() <= size and exact[len(own) :].abs().max() <= size
    assert abs(result.details["trace"] - exact.sum()) <= 10 * size
    assert result.details["factor"] == pytest.approx(
        {half_mse: 1, sum_mse: 2, F.mse_loss: 2 / 3}[loss], rel=1e-12
    )
    assert result.details["attained"] is False and result.value > 1


@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_balanced_is_flattest_for_white_inputs(M):
    T = random(4, 4, seed=7)
    s = torch.linalg.svdvals(T)
    net, x = chain(*balanced(T, M)), white()
    result = measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 4))))
    least = M * float(s[0]) ** (2 - 2 / M)
    assert result.details["attained"]
    assert result.details["least_lambda_max"] == pytest.approx(least, rel=1e-12)
    assert result.value == pytest.approx(1, rel=1e-12)
    # The whole spectrum: sum_k s_i^(2(M-k)/M) s_j^(2(k-1)/M).
    a, b = s[:, None] ** (2 / M), s[None, :] ** (2 / M)
    expected = sum(a ** (M - k) * b ** (k - 1) for k in range(1, M + 1)) * torch.ones(
        4, 4, dtype=torch.float64
    )
    expected = expected.flatten().sort(descending=True).values
    assert torch.allclose(result.details["eigenvalues"], expected, rtol=1e-12, atol=1e-13 * least)
    assert result.details["gains"] == pytest.approx(result.details["flattest_gains"], rel=1e-10)


def test_every_other_factorisation_is_sharper():
    """A rescaled layer, and random gauges between the layers; the map stays."""
    T, x = random(4, 4, seed=7), white()
    W = balanced(T, 3)
    flat = chain(*W)
    y = targets(flat, x, 4)
    for seed in range(5):
        G, Q = random(4, 4, seed=20 + seed), random(4, 4, seed=40 + seed)
        net = chain(G @ W[0], Q @ W[1] @ G.inverse(), W[2] @ Q.inverse())
        result = measures.width(fc.Objective(net, half_mse, (x, y)))
        assert result.value > 1 and result.status == "converged"
        assert result.details["least_lambda_max"] == pytest.approx(
            3 * float(torch.linalg.svdvals(T)[0]) ** (4 / 3)
        )
    scaled = measures.width(fc.Objective(chain(3 * W[0], W[1], W[2] / 3), half_mse, (x, y)))
    assert scaled.value > 1.5


def test_rotations_between_the_layers_change_nothing():
    W, x = [random(5, 4), random(5, 5, seed=1), random(3, 5, seed=2)], random(20, 4, seed=3)
    Q, R = orthogonal(5, 11), orthogonal(5, 12)
    net, turned = chain(*W), chain(Q @ W[0], R @ W[1] @ Q.T, W[2] @ R.T)
    y = targets(net, x, 3)
    a, b = (measures.width(fc.Objective(n, half_mse, (x, y))) for n in (net, turned))
    assert a.value == pytest.approx(b.value, rel=1e-12)


def test_scalar_chain():
    """prod w_i = t: lambda_max = t² sum 1/w_i², at least M t^(2 - 2/M)."""
    w = [2.0, 0.5, 3.0]
    net = chain(*(torch.tensor([[v]], dtype=torch.float64) for v in w))
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    result = measures.width(fc.Objective(net, half_mse, (x, 3 * x)))
    assert result.details["lambda_max"] == pytest.approx(9 * sum(1 / v**2 for v in w), rel=1e-12)
    assert result.details["least_lambda_max"] == pytest.approx(3 * 3 ** (4 / 3), rel=1e-10)


def test_two_layers():
    """M = 2, white: lambda_max = |W_1|² + |W_2|²."""
    net, x = chain(random(5, 4), random(3, 5, seed=1)), white()
    result = measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 3))))
    expected = sum(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) ** 2 for layer in net)
    assert result.details["lambda_max"] == pytest.approx(expected, rel=1e-12)


def test_lower_bound_for_any_second_moment():
    """The maximum over v against a fine search on the circle, and where it is tight: equal top directions."""
    T, x = (
        random(2, 2, seed=3),
        random(15, 2, seed=4) @ torch.diag(torch.tensor([2.0, 0.7], dtype=torch.float64)),
    )
    net = chain(*balanced(T, 3))
    result = measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 2))))
    S = x.T @ x / 15
    values, vectors = torch.linalg.eigh(S)
    root = vectors @ (values.sqrt()[:, None] * vectors.T)
    angle = torch.linspace(0, torch.pi, 20_001, dtype=torch.float64)
    v = torch.stack([angle.cos(), angle.sin()])
    bound = 3 * ((v * (S @ v)).sum(0) * (T @ root @ v).square().sum(0) ** 2) ** (1 / 3)
    # The grid's step of 1.6e-4 misses the maximum by about its square.
    assert result.details["least_lambda_max"] == pytest.approx(float(bound.max()), rel=1e-6)
    assert result.value > 1 and not result.details["attained"]

    _, s, Vt = torch.linalg.svd(T)
    mu = torch.tensor([3.0, 0.5], dtype=torch.float64)
    x = white(d=2) @ torch.diag(mu.sqrt()) @ Vt
    result = measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 2))))
    assert result.details["least_lambda_max"] == pytest.approx(3 * 3.0 * float(s[0]) ** (4 / 3), rel=1e-9)
    assert result.value == pytest.approx(1, rel=1e-9)


def test_bound_holds_with_biases():
    """Whatever the biases' share, no net falls below the bound."""
    for seed in range(4):
        W = balanced(random(3, 3, seed=seed), 2, seed=30 + seed)
        net = chain(*W, bias=True)
        x = random(30, 3, seed=seed) + 2.0
        result = measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 3))))
        assert result.status == "converged" and result.value >= 1 and not result.details["attained"]


def test_bound_counts_the_spread_of_the_inputs_only():
    """Where a bias takes the inputs' mean off, lambda_max = 2 t sqrt(1 + mean²) at best, below the 2 t (1 + mean²) that
    the second moment would give."""
    mean = 3.0
    x = mean + torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    first, second = (1 + mean**2) ** 0.25, (1 + mean**2) ** -0.25  # product 1
    net = chain(*(torch.tensor([[w]], dtype=torch.float64) for w in (first, second)), bias=True)
    with torch.no_grad():
        net[0].bias.fill_(-first * mean)
        net[1].bias.zero_()
    result = measures.width(fc.Objective(net, half_mse, (x, x - mean), "*.weight"))
    assert result.status == "converged" and result.value >= 1
    assert result.details["lambda_max"] <= 2 * (1 + mean**2) ** 0.5 * (1 + 1e-12)
    assert result.details["least_lambda_max"] == pytest.approx(2, rel=1e-10)


class LinearResidual(nn.Module):
    def __init__(self, matrices):
        super().__init__()
        self.blocks = chain(*(W - torch.eye(len(W), dtype=W.dtype) for W in matrices))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_residual_linear_net():
    """W_i = I + V_i has the Hessian of the plain net: balanced, it is a flattest minimum."""
    T = random(4, 4, seed=7)
    T = T @ T.T + torch.eye(4, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(T)
    root = vectors @ torch.diag(values ** (1 / 3)) @ vectors.T  # from zero initialisation: all layers alike
    net, x = LinearResidual([root] * 3), white()
    y = targets(net, x, 4)
    result = measures.width(fc.Objective(net, half_mse, (x, y)))
    assert result.value == pytest.approx(1, rel=1e-10)
    exact = float(torch.linalg.eigvalsh(dense(net, half_mse, x, y))[-1])
    assert result.details["lambda_max"] == pytest.approx(exact, rel=1e-12)


def test_ragged_batches_and_flatten():
    net = nn.Sequential(nn.Flatten(), chain(random(5, 4), random(3, 5, seed=1)))
    x = random(20, 2, 2, seed=3)
    y = targets(net[1], x.flatten(1), 3)
    one = measures.width(fc.Objective(net, F.mse_loss, (x, y)))
    several = measures.width(fc.Objective(net, F.mse_loss, [(x[:9], y[:9]), (x[9:], y[9:])]))
    assert one.value == pytest.approx(several.value, rel=1e-12)
    assert one.details["factor"] == pytest.approx(several.details["factor"], rel=1e-12)


def test_not_at_a_minimum():
    net, x = chain(random(5, 4), random(3, 5, seed=1)), random(20, 4, seed=3)
    with pytest.warns(fc.errors.FlatcoreWarning, match="width: the net is not at a global minimum"):
        result = measures.width(fc.Objective(net, half_mse, (x, random(20, 3, seed=8))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        G = fc.GGN(fc.Objective(net, half_mse, (x, random(20, 3, seed=8)))).to_dense()
    assert result.details["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-12)


def test_bottleneck():
    net, x = chain(random(1, 4), random(3, 1, seed=1)), random(20, 4, seed=3)
    with pytest.warns(
        fc.errors.FlatcoreWarning, match="a layer of 1 outputs cannot hold the best linear map"
    ):
        measures.width(fc.Objective(net, half_mse, (x, x @ random(4, 3, seed=8))))


@pytest.mark.parametrize(
    ("net", "loss", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), half_mse, "no affine function"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3)),
            nn.CrossEntropyLoss(),
            "not a multiple of the squared error",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), half_mse, "a parameter of no linear layer"),
        (lambda: nn.Sequential(nn.Linear(4, 3)), F.l1_loss, "no squared error|not a multiple"),
    ],
)
def test_no_deep_linear_net(net, loss, reason):
    model, x = net().double(), random(8, 4)
    y = torch.softmax(random(8, 3, seed=1), 1)
    result = measures.width(fc.Objective(model, loss, (x, y)))
    assert result.value != result.value
    assert (
        result.status.startswith("no curvature: the closed forms are for deep linear nets")
        and len(result.status) < 200
    )
    assert reason.split("|")[0] in result.status or reason.split("|")[-1] in result.status
    assert result.by_layer[next(iter(result.by_layer))].value > 0


def test_couplings_of_a_balanced_net():
    T = random(4, 4, seed=7)
    net, x = chain(*balanced(T, 3)), white()
    result = measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 4))))
    for pair in result.details["couplings"]:
        assert torch.allclose(pair.cosines, torch.eye(4, dtype=torch.float64), atol=1e-10)
        assert pair.top == pytest.approx(1) and pair.best == (pytest.approx(1), 1)
        assert pair.imbalance <= 1e-12 and pair.chance == 0.5
    gain = [g.spectral for g in result.details["layers"]]
    assert gain == pytest.approx([float(torch.linalg.svdvals(T)[0]) ** (1 / 3)] * 3)
    assert len(result.details["table"].splitlines()) == 4


def test_couplings_of_convolutions():
    """Weights made so that the second layer reads the top output channel of the first through any kernel, and the last
    layer reads that of the second through any place of the flattened image."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 9, 2),
    ).double()
    u, w = orthogonal(3, 1)[:, 0], orthogonal(4, 2)[:, 0]
    with torch.no_grad():
        net[0].weight.copy_(torch.einsum("o,ikl->oikl", u, random(2, 3, 3)))
        net[2].weight.copy_(torch.einsum("o,i,kl->oikl", w, u, random(2, 2, seed=1)))
        net[4].weight.copy_(torch.einsum("o,i,p->oip", random(2), w, random(9, seed=2)).reshape(2, 36))
    x, y = random(6, 2, 6, 6), torch.zeros(6, 2, dtype=torch.float64)
    result = measures.width(fc.Objective(net, half_mse, (x, y)))
    first, second = result.details["couplings"]
    assert first.top == pytest.approx(1) and second.top == pytest.approx(1)
    W, V = net[0].weight.detach().flatten(1), net[2].weight.detach()
    before, after = W @ W.T, sum(V[:, :, k, l].T @ V[:, :, k, l] for k in range(2) for l in range(2))
    scale = (before.norm() * after.norm()).sqrt()
    assert first.imbalance == pytest.approx(float((after - before).norm() / scale))
    assert "Conv2d" in result.status
    assert "36" in result.details["table"]


def test_what_does_not_meet_is_said():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        objective = fc.Objective(net, half_mse, (random(6, 4), random(6, 3)))
    other = nn.ModuleDict({"a": net, "b": nn.Linear(4, 3).double()})

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = other

        def forward(self, x):
            return self.both["a"](x) + self.both["b"](x)

    assert measures.width(objective).details["couplings"][0].reason == ""
    result = measures.width(fc.Objective(Two(), half_mse, (random(6, 4), random(6, 3))))
    assert result.details["couplings"][1].reason == "3 outputs, 4 inputs"
    assert "none: 3 outputs, 4 inputs" in result.details["table"]


def test_two_branches_are_no_chain():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x)

    net, x = Two().double(), white()
    y = targets(net, x, 3)
    with pytest.warns(fc.errors.FlatcoreWarning, match="width: the layers are no chain"):
        result = measures.width(fc.Objective(net, half_mse, (x, y)))
    exact = float(torch.linalg.eigvalsh(dense(net, half_mse, x, y))[-1])
    assert result.details["lambda_max"] == pytest.approx(exact, rel=1e-12) and result.value != result.value


def test_picture_and_bad_input():
    pytest.importorskip("matplotlib")
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    objective = fc.Objective(net, half_mse, (random(6, 4), random(6, 3)))
    figure = measures.plot_width(measures.width(objective))
    assert len(figure.axes) == 3  # singular values, one pair, its colour bar
    with pytest.raises(TypeError, match=r"objective: expected a flatcore.Objective, got Sequential"):
        measures.width(net)
    with pytest.raises(ValueError, match="tol: expected a positive number"):
        measures.width(objective, tol=0)
    with pytest.raises(ValueError, match="measure: expected the result of width"):
        measures.plot_width(measures.Measure(1.0, 0.0, None, "", 0, name="other"))


def test_one_oracle_for_other_measures():
    """The small matrix's eigenvalues against trace, largest eigenvalue and soft rank by the engine."""
    net, x = chain(random(5, 4), random(6, 5, seed=1), random(3, 6, seed=2)), random(20, 4, seed=3)
    objective = fc.Objective(net, half_mse, (x, targets(net, x, 3)))
    values = measures.width(objective).details["eigenvalues"]
    assert fc.trace(fc.Hessian(objective), method="exact").value == pytest.approx(
        float(values.sum()), rel=1e-10
    )
    top = float(fc.eigsh(fc.Hessian(objective), 1, which="LA", tol=1e-10).values[0])
    assert top == pytest.approx(float(values[0]), rel=1e-10)
    expected = float((values / (values + 0.7)).sum())
    assert measures.soft_rank(objective, 0.7, method="exact").value == pytest.approx(expected, rel=1e-9)

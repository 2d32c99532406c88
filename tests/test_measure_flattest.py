"""Bounds of deep linear nets, at flattest minima and on the largest eigenvalue; the limit of LPF on another net."""

import pytest
import torch
from torch import nn

import flatcore as fc
from flatcore import measures
from tests.test_measure_width import EPS, balanced, chain, dense, half_mse, random, targets, white


def norms(matrices):
    """|W_k ... W_1| for k = 1, 2, ..."""
    product, found = torch.eye(matrices[0].shape[1], dtype=torch.float64), []
    for W in matrices:
        product = W @ product
        found.append(float(torch.linalg.matrix_norm(product, 2)))
    return found


def unbalanced(T, M, by):
    """Balanced but along the smallest singular value of T, whose gain the first two layers share unequally."""
    s = torch.linalg.svdvals(T)
    layers = balanced(T, M)
    for i, factor in ((0, by), (1, 1 / by)):
        U, gains, Vt = torch.linalg.svd(layers[i])
        assert abs(float(gains[-1]) - float(s[-1]) ** (1 / M)) <= 100 * EPS * float(gains[0])
        gains = gains.clone()
        gains[-1] *= factor
        layers[i] = U @ torch.diag(gains) @ Vt
    return layers


@pytest.mark.parametrize("M", [2, 3, 4])
@pytest.mark.parametrize("by", [1.0, 1.2])
def test_gains_to_the_layers_of_a_flattest_minimum(M, by):
    """sigma_1^(k/M) <= |W_k ... W_1| <= sqrt(M - 1) sigma_1^(k/M) for k < M."""
    T = random(4, 4, seed=7)
    sigma = float(torch.linalg.svdvals(T)[0])
    layers = unbalanced(T, M, by)
    assert torch.linalg.multi_dot([*reversed(layers)]).sub(T).abs().max() <= 1e3 * EPS * sigma
    net, x = chain(*layers), white()
    result = measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 4))))
    assert result.value == pytest.approx(1, rel=1e-12)  # a flattest minimum, balanced or not
    for k, norm in enumerate(norms(layers)[:-1], 1):
        least = sigma ** (k / M)
        assert least * (1 - 1e-12) <= norm <= (M - 1) ** 0.5 * least * (1 + 1e-12)


def test_gains_beyond_the_bound_are_no_flattest_minimum():
    T = random(4, 4, seed=7)
    layers = [W.clone() for W in balanced(T, 3)]
    layers[0] *= 2.0
    layers[1] /= 2.0
    sigma = float(torch.linalg.svdvals(T)[0])
    assert norms(layers)[0] > 2**0.5 * sigma ** (1 / 3)
    net, x = chain(*layers), white()
    assert measures.width(fc.Objective(net, half_mse, (x, targets(net, x, 4)))).value > 1.5


@pytest.mark.parametrize("seed", range(3))
def test_norms_bound_the_largest_eigenvalue(seed):
    """lambda_max <= sum_i |A_i|² |B_i S^(1/2)|²: A_i follows layer i, B_i precedes it, S is the inputs' moment."""
    layers = [random(*s, seed=3 * seed + i) for i, s in enumerate([(5, 4), (6, 5), (3, 6)])]
    net, x = chain(*layers), random(20, 4, seed=seed + 50)
    y = targets(net, x, 3)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    bound = 0.0
    for i in range(3):
        A, B = torch.eye(3, dtype=torch.float64), root
        for W in reversed(layers[i + 1 :]):
            A = A @ W
        for W in layers[:i]:
            B = W @ B
        bound += float(torch.linalg.matrix_norm(A, 2) ** 2 * torch.linalg.matrix_norm(B, 2) ** 2)
    exact = float(torch.linalg.eigvalsh(dense(net, half_mse, x, y))[-1])
    own = float(measures.width(fc.Objective(net, half_mse, (x, y))).details["eigenvalues"][0])
    assert own == pytest.approx(exact, rel=1e3 * EPS)
    assert 0.3 * bound < own <= bound * (1 + 1e-12)


def test_lpf_of_a_net_for_small_sigma():
    """L + sigma²/2 Tr H; the next term is of order sigma^4, the noise of the draws far above it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batch = torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,))
    objective = fc.Objective(net, nn.CrossEntropyLoss(), batch)
    sigma = 0.1
    result = measures.lpf(objective, sigma, draws=40_000)
    trace = float(torch.trace(dense(net, nn.CrossEntropyLoss(), *batch)))
    rise = sigma**2 / 2 * trace
    assert rise > 10 * result.stderr
    assert abs(result.value - result.details["loss"] - rise) <= 4 * result.stderr

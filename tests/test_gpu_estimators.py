"""Everything that is built on products, on a GPU, against the same on the CPU: the probes are the same bits, so the
numbers agree to what float64 loses on the way, and the counts of products are equal.
"""

import numpy as np
import pytest
import torch

import flatcore as fc
from flatcore import measures
from flatcore._C import krylov
from tests.gpu import DEVICE, net, on_gpu

pytestmark = [on_gpu, pytest.mark.filterwarnings("default")]
CPU = torch.device("cpu")
CLOSE = 1e-6


def both(operator=fc.Hessian):
    """The operator on the CPU and on the device."""
    objectives = (net(12, 16, 4, examples=60, dtype=torch.float64, device=d) for d in (CPU, DEVICE))
    return [operator(objective) for objective in objectives]


def same(a, b) -> bool:
    first, second = (np.asarray(torch.as_tensor(x).cpu(), dtype=float) for x in (a, b))
    return bool(np.linalg.norm(first - second) <= CLOSE * np.linalg.norm(first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_are_the_same_bits(dtype):
    for seed, first, K, P in ((0, 0, 1, 1), (7, 3, 5, 1000), (2**40, 62, 70, 65)):
        here, there = (
            krylov.rademacher(seed, first, K, P, torch.empty(0, dtype=dtype, device=d)) for d in (CPU, DEVICE)
        )
        assert there.device.type == DEVICE.type and torch.equal(here, there.cpu())


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_eigsh(which):
    here, there = (fc.eigsh(A, k=4, which=which, tol=1e-10) for A in both())
    assert same(here.values, there.values) and here.status == there.status == "converged"
    A = both()[1]
    vectors = there.vectors.to(DEVICE)
    residual = A @ vectors - vectors * there.values.to(DEVICE)
    assert residual.norm() <= 1e-8 * there.values.abs().max()


@pytest.mark.parametrize("operator", [fc.Hessian, fc.GGN, fc.GradientCovariance])
@pytest.mark.parametrize("estimate", [fc.trace, fc.diagonal])
@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_trace_and_diagonal(operator, estimate, method):
    here, there = (estimate(A, method=method, rtol=0.3, max_matvecs=64) for A in both(operator))
    assert same(here.value, there.value) and same(here.stderr, there.stderr)
    assert (here.method, here.matvecs) == (there.method, there.matvecs)


def test_trace_example_by_example():
    here, there = (fc.trace(A, method="example", rtol=0.1, max_matvecs=200) for A in both())
    assert same(here.value, there.value) and same(here.stderr, there.stderr)


def test_density():
    here, there = (fc.spectral_density(A, probes=4, steps=12) for A in both())
    # Small weights answer to every rounding; the distribution they make up does not.
    points = np.linspace(here.nodes.min(), here.nodes.max(), 7)[1:-1]
    assert np.allclose(here.cdf(points)[0], there.cdf(points)[0], atol=1e-3)
    assert same((here.nodes * here.weights).sum(1), (there.nodes * there.weights).sum(1))


def test_solve():
    b = torch.randn(both()[0].shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, there = (fc.solve(A, b.to(A.device), damping=0.1, tol=1e-10) for A in both(fc.GGN))
    assert same(here.value, there.value) and bool(torch.as_tensor(there.converged).all())


def test_functionals():
    for function in (
        lambda A: fc.logdet(A, 0.1, max_matvecs=200),
        lambda A: fc.soft_rank(A, 0.1, max_matvecs=200),
        lambda A: fc.effective_dimension(A, 0.1, max_matvecs=200),
        lambda A: fc.frobenius(A, max_matvecs=200),
        lambda A: fc.functional(A, np.square, max_matvecs=200),
    ):
        here, there = (function(A) for A in both(fc.GGN))
        assert same(here.value, there.value) and here.method == there.method


def test_block_spectra():
    here, there = (fc.block_spectra(A, k=2, tol=1e-9) for A in both())
    assert here.by_parameter.keys() == there.by_parameter.keys()
    for name, pairs in here.by_parameter.items():
        assert same(pairs.values, there.by_parameter[name].values)


@pytest.mark.parametrize(
    "measure",
    [
        lambda A: measures.trace(A.objective),
        lambda A: measures.lambda_max(A.objective),
        lambda A: measures.sam_sharpness(A.objective),
        lambda A: measures.relative_flatness(A.objective, "0"),
    ],
    ids=["trace", "lambda_max", "sam_sharpness", "relative_flatness"],
)
def test_measures(measure):
    here, there = (measure(A) for A in both())
    assert same(here.value, there.value)

"""Everything that is built on products, on a GPU, against the same on the CPU: the probes are the same bits, so the
numbers agree to what float64 loses on the way, and the counts of products are equal.
"""

import numpy as np
import pytest
import torch

import flatcore as fc
from flatcore import measures
from flatcore._C import krylov
from flatcore.example_sweeps import sweeps_for
from tests.cases import CASES
from tests.gpu import DEVICE, net, objective_there, on_gpu
from tests.test_engine import objective_of

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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_by_example(case):
    """Of every kind of use that a parameter has: probes of 8 directions, and exact sums over the outputs."""
    objectives = objective_of(case)[0], objective_there(case)
    sweeps = [sweeps_for(objective, objective.snapshot()) for objective in objectives]
    if isinstance(sweeps[0], str):
        pytest.skip(f"no sum over examples: {sweeps[0]}")
    assert sweeps[0].probed == sweeps[1].probed
    modes = ("hessian", "ggn", "remainder") if case.loss_kind == "output_target" else ("hessian",)
    for mode in modes if sweeps[0].probed else ():
        here, there = (
            s.probe(mode, o.snapshot(), 0, 0, 8, diagonal=True)
            for s, o in zip(sweeps, objectives, strict=True)
        )
        # Sums of up to some thousands of numbers as large as these, which may cancel.
        spreads = [(8 * samples.variance).sqrt().cpu() for samples in (here, there)]
        rounding = 5000 * torch.finfo(torch.float64).eps * (here.mean.abs() + spreads[0]).max()
        assert ((here.mean - there.mean.cpu()).abs() <= rounding).all(), mode
        assert ((spreads[0] - spreads[1]).abs() <= rounding).all(), mode
    if case.loss_kind == "output_target" and sweeps[0].outputs:
        here, there = (s.exact_ggn(o.snapshot()) for s, o in zip(sweeps, objectives, strict=True))
        assert same(here[0], there[0])


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

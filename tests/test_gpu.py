"""Products on a GPU over the table of cases, against torch.func in float64 on the CPU.

float64: relative error at most 1e-10. float32: as in tests/test_engine.py, with autograd's error on the device itself,
whose libraries convolve in other ways than the CPU's. A product is computed three times: as it is, recorded as a
graph, and replayed.
"""

import pytest
import torch

import flatcore as fc
from flatcore._C import engine
from flatcore.backend import backend_for
from tests.cases import CASES, Case
from tests.gpu import DEVICE, moved, net, objective_there, on_cuda, on_gpu
from tests.reference import Reference
from tests.test_engine import EXACT, FLOOR32, NOT_A_PLAIN_MEAN, directions, relative

VECTORS = (1, 3, 8)
# What torch says of a device is no error of ours; a fall back to autograd is.
pytestmark = [
    on_gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::flatcore.errors.FlatcoreWarning"),
]


def reference_of(case: Case, dtype=torch.float64) -> Reference:
    return Reference(*case.build(0, dtype), case.loss_kind)


def products(A: fc.Hessian, V: torch.Tensor) -> list[torch.Tensor]:
    there = V.to(DEVICE)
    return [(A @ there).cpu() for _ in range(3)]


@on_cuda
def test_extension_is_built_for_it():
    assert engine.gpu == "cuda"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian(case):
    H = fc.Hessian(objective_there(case))
    assert H.plan().native_fraction == 1.0
    dense = reference_of(case).hessian()
    for K in VECTORS:
        V = directions(H.shape[0], K)
        first, *others = products(H, V)
        assert relative(first, dense @ V) <= EXACT
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian_float32(case):
    H = fc.Hessian(objective_there(case, torch.float32))
    exact, single = reference_of(case), Reference(*moved(case.build(0, torch.float32)), case.loss_kind)
    exact.flat.copy_(single.flat)
    with engine.Float32Products(str(DEVICE)):
        dense, dense32 = exact.hessian(), single.hessian().cpu()
    for K in VECTORS:
        V = directions(H.shape[0], K, torch.float32)
        truth = dense @ V.double()
        allowed = max(2 * relative(dense32 @ V, truth), FLOOR32)
        for product in products(H, V):
            assert relative(product, truth) <= allowed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_and_quadratic_form(case):
    objective, reference = objective_there(case), reference_of(case)
    H = fc.Hessian(objective)
    at = objective.snapshot()
    assert relative(backend_for(objective, "hessian").gradient(at).cpu(), reference.gradient()) <= EXACT
    dense = reference.hessian()
    for K in VECTORS:
        V = directions(H.shape[0], K)
        Y = dense @ V
        error = (H.quadratic_form(V.to(DEVICE)) - (V * Y).sum(0)).abs()
        assert (error <= EXACT * V.norm(dim=0) * Y.norm(dim=0).clamp_min(1.0)).all()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.loss_kind == "output_target" and c.name != "nll"], ids=str
)
def test_ggn(case):
    G = fc.GGN(objective_there(case))
    assert G.plan().native_fraction == 1.0
    dense = reference_of(case).ggn()
    for K in VECTORS:
        V = directions(G.shape[0], K)
        assert all(relative(product, dense @ V) <= EXACT for product in products(G, V))


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in NOT_A_PLAIN_MEAN], ids=str)
def test_gradient_covariance(case):
    objective, reference = objective_there(case), reference_of(case)
    C = fc.GradientCovariance(objective)
    dense, g = reference.covariance(objective.examples), reference.gradient()
    for K in VECTORS:
        V = directions(C.shape[0], K)
        truth = dense @ V - g[:, None] * (g @ V)
        for product in products(C, V):
            # Centring subtracts; the error is relative to what was there before.
            assert (product - truth).norm() <= EXACT * dense.norm() * V.norm()


# Operands rounded to 8 binary digits, and to 11 or, as the instruction itself does it, cut off behind them.
UNITS = {"bf16": 2.0**-8, "tf32": 2.0**-10}


@on_cuda
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="the device has no instructions for TF32 and bfloat16",
)
@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("operator", [fc.Hessian, fc.GGN, fc.GradientCovariance])
def test_error_is_that_of_a_few_roundings(operator, precision):
    """Four matrix products, two forward and two back, with two rounded operands each."""
    single, double = (net(256, 256, 256, examples=256, dtype=d) for d in (torch.float32, torch.float64))
    rounded, exact = operator(single, precision=precision), operator(double)
    V = directions(exact.shape[0], 8, torch.float32)
    truth = exact @ V.double().to(DEVICE)
    for product in products(rounded, V):
        assert relative(product, truth.cpu()) <= 8 * UNITS[precision]
    # Nothing of it is left behind: the next product is in full again.
    full = operator(single)
    assert relative(full @ V.to(DEVICE), truth) <= FLOOR32
    if precision == "bf16":
        assert rounded.plan().bf16_fraction > 0.5
        assert not torch.equal(rounded @ V.to(DEVICE), full @ V.to(DEVICE))

"""v^T A v by the tangent sweep alone, against the products (which test_engine.py holds to torch.func) and against the
second derivative of the loss along a line."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import flatcore as fc
from flatcore.bench.memory import peak_bytes
from flatcore.bench.workloads import mlp, resnet
from flatcore.errors import FlatcoreWarning
from tests.cases import CASES, Case
from tests.test_engine import NOT_A_PLAIN_MEAN, directions, objective_of

# Float64, relative to |v| |A v|, as for the products.
EXACT = 1e-10


def check(A: fc.Hessian | fc.GGN | fc.GradientCovariance, K: int) -> None:
    V = directions(A.shape[0], K, A.dtype)
    products = A @ V
    q = A.quadratic_form(V)
    assert q.shape == (K,)
    assert q.dtype == torch.float64
    scale = (V.norm(dim=0) * products.norm(dim=0)).double().clamp_min(torch.finfo(A.dtype).tiny)
    exact = EXACT if A.dtype == torch.float64 else 2e-6
    assert ((q - (V.double() * products.double()).sum(0)).abs() <= exact * scale).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian(case: Case):
    H = fc.Hessian(objective_of(case)[0])
    check(H, 1)
    check(H, 3)


@pytest.mark.parametrize("case", [c for c in CASES if c.loss_kind == "output_target"], ids=str)
def test_ggn(case: Case):
    check(fc.GGN(objective_of(case)[0]), 3)


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in NOT_A_PLAIN_MEAN], ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_gradient_covariance(case: Case, centered: bool):
    check(fc.GradientCovariance(objective_of(case)[0], centered=centered), 3)


@pytest.mark.parametrize("build", [lambda: mlp(8, 5, 7, 3), lambda: resnet(2, size=8)], ids=["mlp", "resnet"])
def test_it_is_the_second_derivative_along_a_line(build):
    torch.manual_seed(0)
    model, loss, (x, target) = build()
    model, x = model.double(), x.double()
    H = fc.Hessian(fc.Objective(model, loss, (x, target)))
    theta = {n: p.detach() for n, p in model.named_parameters()}
    v = directions(H.shape[0], 1)[:, 0]
    line = {n: v[s].view(theta[n].shape) for n, s in H.parameter_slices.items()}

    def at(t: Tensor) -> Tensor:
        moved = {n: theta[n] + t * line[n] for n in theta}
        return loss(functional_call(model, moved, (x,)), target)

    def slope(t: Tensor) -> Tensor:
        return jvp(at, (t,), (torch.ones_like(t),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    second = jvp(slope, (zero,), (torch.ones_like(zero),))[1]
    torch.testing.assert_close(H.quadratic_form(v), second, rtol=1e-10, atol=0)


def test_the_forms_of_V():
    torch.manual_seed(0)
    model, loss, batch = mlp(8, 5, 7, 3)
    H = fc.Hessian(fc.Objective(model, loss, batch))
    V = directions(H.shape[0], 4, H.dtype)
    q = H.quadratic_form(V)
    assert H.quadratic_form(V[:, 0]).shape == ()
    one = {
        n: V[s, 0].view(p.shape)
        for (n, p), s in zip(model.named_parameters(), H.parameter_slices.values(), strict=True)
    }
    many = {n: V[s].view(*one[n].shape, 4) for n, s in H.parameter_slices.items()}
    torch.testing.assert_close(H.quadratic_form(one), q[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(H.quadratic_form(many), q, rtol=1e-6, atol=0)
    assert H.quadratic_form(V[:, :0]).shape == (0,)
    with pytest.raises(ValueError, match="V: expected shape"):
        H.quadratic_form(V[1:])


def test_several_batches_and_float32():
    torch.manual_seed(0)
    model, loss, (x, target) = mlp(9, 5, 7, 3)
    data = [(x[:4], target[:4]), (x[4:], target[4:])]
    for kind in (fc.Hessian, fc.GGN, fc.GradientCovariance):
        check(kind(fc.Objective(model, loss, data)), 3)


def test_through_autograd():
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * 2 if y.sum().item() > 0 else y.square()

    torch.manual_seed(0)
    objective = fc.Objective(
        Untraceable().double(), nn.MSELoss(), (torch.randn(5, 4).double(), torch.randn(5, 3).double())
    )
    with pytest.warns(FlatcoreWarning, match="autograd"):
        check(fc.Hessian(objective), 3)


def test_no_memory_of_the_parameters_size():
    torch.manual_seed(0)
    model, loss, batch = mlp(4, 512, 1024, 10)
    H = fc.Hessian(fc.Objective(model, loss, batch))
    V = directions(H.shape[0], 2, torch.float32)
    V = V.T.contiguous().T
    H.quadratic_form(V)
    assert peak_bytes(lambda: H.quadratic_form(V)) < 0.1 * V.nbytes
    assert peak_bytes(lambda: H @ V) > V.nbytes

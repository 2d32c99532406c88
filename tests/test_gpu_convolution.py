"""Convolutions on a GPU, of all directions at once or one by one, emulated, against dense operators and the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatcore as fc
from flatcore._C import engine
from tests.reference import Reference
from tests.test_engine import EXACT, directions, relative

pytestmark = pytest.mark.skipif(
    engine.gpu != "emulated",
    reason="for the emulated build (make check-cuda); tests/test_gpu.py is for devices",
)


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def batch(model: nn.Module, *shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = model(x.to(next(model.parameters()).dtype)).detach()
    return x.to(y.dtype), torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3)),
    "strided": (nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), nn.Conv2d(3, 1, (1, 3), 2)),
    "dilated": (nn.Conv2d(1, 3, 2, dilation=(1, 2)), nn.Conv2d(3, 2, 1, bias=False)),
    "one pixel": (nn.Conv2d(2, 4, 5), nn.Conv2d(4, 3, 1)),
    "grouped": (nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 2, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("frozen", [(), (0,), (2,)], ids=["all", "last", "first"])
def test_small(name: str, frozen: tuple[int, ...]) -> None:
    model = copy.deepcopy(net(*CONVOLUTIONS[name])).double()
    for i in frozen:
        model[i].requires_grad_(False)
    data = batch(model, 2, model[0].in_channels, 5, 5)
    reference = Reference(model, F.mse_loss, data, "output_target")
    objective = fc.Objective(model, F.mse_loss, data)
    for A, dense in ((fc.Hessian(objective), reference.hessian()), (fc.GGN(objective), reference.ggn())):
        for K in (1, 2, 5):
            V = directions(A.shape[0], K)
            assert relative(A @ V, dense @ V) <= EXACT


def test_rounded() -> None:
    """A product goes up and down two layers: of four convolutions in a chain the two operands and the result are each
    rounded, by at most 2^-8. An error of a sixteenth of one rounding would be that of none."""
    model = net(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    data = batch(model, 4, 16, 16, 16)
    objective = fc.Objective(model, F.mse_loss, data)
    V = directions(objective.layout.size, 3, torch.float32)
    full, rounded = (fc.Hessian(objective, precision=p) for p in ("full", "bf16"))
    assert rounded.plan().bf16_fraction > 0.9
    exact = full @ V
    assert 2.0**-12 <= relative(rounded @ V, exact.double()) <= 12 * 2.0**-8


def test_large() -> None:
    """Above the size from which directions are convolved one by one."""
    model = net(nn.Conv2d(64, 64, 3, padding=1, bias=False))
    data = batch(model, 1, 64, 128, 128)
    A = fc.Hessian(fc.Objective(model, F.mse_loss, data))
    V = directions(A.shape[0], 2, torch.float32)
    (weight,) = model.parameters()

    def gradient(w: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(
            F.mse_loss(torch.tanh(F.conv2d(data[0], w, padding=1)), data[1]), w, create_graph=True
        )
        return g

    for k in range(2):
        _, expected = torch.autograd.functional.vjp(gradient, weight, V[:, k].view_as(weight))
        # Sums of 2^14 products a weight, whose roundings of 2^-24 are independent, on either side.
        assert relative((A @ V)[:, k], expected.reshape(-1).double()) <= 2 * 2.0**-17

"""Evaluation in plain torch: no more memory than it needs, and whatever torch can evaluate."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatcore as fc
from flatcore import cut_rows
from flatcore.bench.memory import peak_bytes
from flatcore.evaluate import once_differentiable, plain_torch, rows_mix

EXACT = 1e-10
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Self-attention of two heads."""

    def __init__(self, attend: Attend, width: int = 6) -> None:
        super().__init__()
        self.attend, self.project = attend, nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return self.attend(q, k, v).transpose(1, 2).flatten(-2)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mask_of_one_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.linspace(-1, 1, k.shape[-2]).to(k))


class Curved(nn.Module):
    """Attention and the second derivative of its sum in the inputs, as networks for differential equations have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(causal)

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y: Tensor = self.inner(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        return y + second


def batch(length: int, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, length, width, generator=random, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_of_queries_by_keys(frozen: bool) -> None:
    """Neither when the objective is made, nor at capture, nor in a frozen layer in front."""
    length = 1024
    torch.manual_seed(0)
    first, second = Attention(causal, 16), Attention(causal, 16)
    first.requires_grad_(not frozen)
    model, data = nn.Sequential(first, second), batch(length, 16, torch.float32)
    one_head = 4 * length * length
    made: list[fc.Hessian] = []
    gc.collect()  # what other tests left behind must not be freed meanwhile
    peak = peak_bytes(lambda: made.append(fc.Hessian(fc.Objective(model, nn.MSELoss(), data))))
    assert peak < one_head
    gc.collect()
    plan = peak_bytes(lambda: made[0].plan())  # captures, and computes the state
    assert plan < one_head + made[0].plan().state_bytes
    with torch.no_grad():
        second.project.weight.mul_(1.5)
    gc.collect()
    assert peak_bytes(made[0].objective.loss) < one_head


def test_both_forms_of_attention_agree() -> None:
    model, (x, _) = Attention(causal).double(), batch(9)
    with plain_torch(torch.device("cpu")), torch.no_grad():
        expected = model(x)
        assert torch.allclose(once_differentiable(lambda: model(x)), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")  # through autograd
@pytest.mark.parametrize("model", [lambda: Attention(mask_of_one_axis), Curved], ids=["mask", "curved"])
def test_what_one_form_alone_computes(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net, data = model().double(), batch(4)
    H = fc.Hessian(fc.Objective(net, F.mse_loss, data))
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = list(net.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(F.mse_loss(net(data[0]), data[1]), parameters, create_graph=True)
        inner = torch.cat([g.flatten() for g in gradient]) @ v
        expected = torch.cat([h.flatten() for h in torch.autograd.grad(inner, parameters)])
    assert (H @ v - expected).norm() <= EXACT * expected.norm()


def test_rows_are_tried_once_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose the rows of the output are is found by running the program twice: not before every product."""
    calls: list[int] = []

    def counted(*arguments: Any) -> bool:
        calls.append(1)
        return rows_mix(*arguments)

    monkeypatch.setattr(cut_rows, "rows_mix", counted)
    model = nn.Linear(6, 6).double()
    C = fc.GradientCovariance(fc.Objective(model, nn.MSELoss(), batch(4)))
    for points in (1, 2):
        for _ in range(3):
            C @ torch.ones(C.shape[0], dtype=torch.float64)
        C.plan()
        assert len(calls) == points
        with torch.no_grad():
            model.weight.mul_(2)

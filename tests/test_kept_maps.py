"""Products through autograd keep the graph of the gradient from a point's second product on: when that is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_operators import OPERATORS, assert_close, build, joined, reference
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import flatcore as fc
from flatcore import autograd_maps

pytestmark = pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")


class Counted(nn.Module):
    """Branches on a value, so that it has no program; counts its evaluations."""

    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.scale = torch.ones(5, dtype=torch.float64)  # no buffer: nothing tells when it changes

    def forward(self, x: Tensor) -> Tensor:
        Counted.total += 1
        h = self.first(x)
        return self.last(torch.tanh(h * self.scale) if bool(h.abs().sum() > 0) else h)


def counted(**options: Any) -> tuple[Counted, fc.Objective, list[tuple[Tensor, Tensor]]]:
    batches = build("mlp-ce")[2]
    torch.manual_seed(1)
    model = Counted().double()
    return model, fc.Objective(model, F.cross_entropy, batches, **options), batches


def evaluations(A: Any, V: Tensor) -> int:
    before = Counted.total
    A @ V
    return Counted.total - before


def made(operator: type, objective: fc.Objective) -> Any:
    """Uncentred: the mean gradient is evaluated anew."""
    return operator(objective, centered=False) if operator is fc.GradientCovariance else operator(objective)


def dense(operator: type, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    x, y = joined(batches)
    matrix = reference(operator, model, F.cross_entropy, (x, y))
    if operator is fc.GradientCovariance:
        g = parameters_to_vector(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))
        matrix = matrix + torch.outer(g, g)
    return matrix


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_third_product_at_a_point_evaluates_nothing(operator: type) -> None:
    model, objective, batches = counted()
    A = made(operator, objective)
    V = torch.randn(A.shape[0], 2, dtype=A.dtype)
    for scale in (1.0, 1.5):  # once more at another point
        with torch.no_grad():
            model.first.weight.mul_(scale)
        expected = dense(operator, model, batches) @ V
        assert evaluations(A, V) >= len(batches)
        assert_close(A @ V, expected)
        assert evaluations(A, V) == 0
        assert_close(A @ V, expected)


def test_nothing_is_kept_without_room() -> None:
    _, objective, batches = counted(memory=100)
    H = fc.Hessian(objective)
    v = torch.randn(H.shape[0], dtype=H.dtype)
    H @ v
    H @ v
    assert evaluations(H, v) == len(batches)


def test_what_torch_has_kept_is_written_into() -> None:
    """The scale is neither parameter nor buffer; torch refuses to differentiate what was computed with the old one."""
    model, objective, batches = counted()
    H = fc.Hessian(objective)
    v = torch.randn(H.shape[0], dtype=H.dtype)
    for _ in range(3):
        H @ v
    model.scale.mul_(0.5)
    assert_close(H @ v, reference(fc.Hessian, model, F.cross_entropy, joined(batches)) @ v)


def test_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _, objective, batches = counted()
    H = fc.Hessian(objective)
    v = torch.randn(H.shape[0], dtype=H.dtype)
    expected = H @ v
    H @ v
    assert evaluations(H, v) == 0
    grad, failures = torch.autograd.grad, iter([True])

    def failing(*args: Any, **named: Any) -> Any:
        if next(failures, False):
            raise torch.OutOfMemoryError("no memory left")
        return grad(*args, **named)

    monkeypatch.setattr(autograd_maps.autograd, "grad", failing)
    assert torch.equal(H @ v, expected)
    for _ in range(3):
        assert evaluations(H, v) == len(batches), "kept again although there was no memory"


class Gated(nn.Module):
    """Its rows mix where the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(4, 3), nn.Linear(3, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) if bool(x.abs().sum() > 0) else x
        return self.last(h + self.gate * h.mean(0))


def test_whether_rows_mix_is_found_at_every_point() -> None:
    """The covariance of rows that mix is made of gradients of examples alone, which have nothing to mix with: so the
    loss of the batch is not the mean of theirs, and that is refused."""
    x, y = joined(build("mlp-ce")[2])
    torch.manual_seed(2)
    model = Gated().double()
    C = fc.GradientCovariance(fc.Objective(model, F.cross_entropy, (x, y)))
    v = torch.randn(C.shape[0], dtype=C.dtype)
    C @ v
    with torch.no_grad():
        model.gate.fill_(1.0)
    with pytest.raises(ValueError, match="the mean over the examples"):
        C @ v

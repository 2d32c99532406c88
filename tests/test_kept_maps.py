"""Products through autograd keep the graph of the gradient from a point's second product on: when that is right."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_operators import OPERATORS, assert_close, build, joined, reference
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import flatcore as fc
from flatcore import autograd_maps
from flatcore.autograd import AutogradBackend

pytestmark = pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")


class Counted(nn.Module):
    """Branches on a value, so that it has no program; counts its evaluations."""

    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        Counted.total += 1
        return self.last(self.hidden(x, self.first(x)))

    def hidden(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h) if bool(h.abs().sum() > 0) else h


def counted(
    kind: type[Counted] = Counted, **options: Any
) -> tuple[Any, fc.Objective, list[tuple[Tensor, Tensor]]]:
    batches = build("mlp-ce")[2]
    torch.manual_seed(1)
    model = kind().double()
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


class Scaled(Counted):
    """The scale is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(5, dtype=torch.float64)

    def hidden(self, x: Tensor, h: Tensor) -> Tensor:
        return super().hidden(x, h * self.scale)


class Scratch(Counted):
    """Every batch's forward writes over what the last one's graph holds; .data tells nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = torch.zeros(13, 5, dtype=torch.float64)

    def hidden(self, x: Tensor, h: Tensor) -> Tensor:
        self.scratch.data[: len(x)].copy_(torch.cos(x[:, :1]).expand(len(x), 5))
        return super().hidden(x, h) * self.scratch[: len(x)]


class OpenScratch(Counted):
    """The same with writes that torch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = torch.zeros(13, 5, dtype=torch.float64)

    def hidden(self, x: Tensor, h: Tensor) -> Tensor:
        self.scratch[: len(x)].copy_(torch.cos(x[:, :1]).expand(len(x), 5))
        return super().hidden(x, h) * self.scratch[: len(x)]


class Cosine(Counted):
    """The same function without the scratch."""

    def hidden(self, x: Tensor, h: Tensor) -> Tensor:
        return super().hidden(x, h) * torch.cos(x[:, :1])


@pytest.mark.parametrize("kind", [Scaled, Scratch, OpenScratch])
def test_memory_of_the_code_is_not_kept(kind: type[Counted]) -> None:
    model, objective, batches = counted(kind)
    H = fc.Hessian(objective)
    v = torch.randn(H.shape[0], dtype=H.dtype)
    weights = [len(x) for x, _ in batches]
    for _ in range(4):
        if kind is Scaled:
            model.scale.mul_(0.5)
        plain = counted(Cosine)[0] if kind is not Scaled else model
        each = [reference(fc.Hessian, plain, F.cross_entropy, batch) @ v for batch in batches]
        expected = sum(n * y for n, y in zip(weights, each, strict=True)) / sum(weights)
        assert_close(H @ v, expected)


def test_what_torch_has_kept_is_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it kept, torch would refuse to differentiate what was computed with the old scale."""
    monkeypatch.setattr(AutogradBackend, "_bytes", lambda *_: 0.0)
    model, objective, batches = counted(Scaled)
    H = fc.Hessian(objective)
    v = torch.randn(H.shape[0], dtype=H.dtype)
    for _ in range(3):
        H @ v
    assert evaluations(H, v) == 0
    model.scale.mul_(0.5)
    assert_close(H @ v, reference(fc.Hessian, model, F.cross_entropy, joined(batches)) @ v)


class OneReader:
    """Batches that can be read again, but not by two at a time."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.reading = batches, False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert not self.reading
        self.reading = True
        for x, y in self.batches:
            yield x.clone(), y.clone()
        self.reading = False


def test_a_loader_is_read_by_one_at_a_time() -> None:
    model, _, batches = counted()
    H = fc.Hessian(fc.Objective(model, F.cross_entropy, OneReader(batches), memory=2000))
    v = torch.randn(H.shape[0], dtype=H.dtype)
    expected = H @ v
    for _ in range(3):
        assert torch.equal(H @ v, expected)


def test_batches_of_other_shapes_are_measured() -> None:
    """A first batch of one row tells nothing of the second's."""

    class Rows(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    data = [(torch.randn(2, n, 4, dtype=torch.float64), torch.tensor([0, 1])) for n in (1, 500)]
    H = fc.Hessian(fc.Objective(Rows().double(), F.cross_entropy, data, memory=150_000))
    v = torch.randn(H.shape[0], dtype=H.dtype)
    H @ v
    H @ v
    assert evaluations(H, v) == 1


def test_graphs_are_freed() -> None:
    """What measures a graph must not make it hold itself."""
    live = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.exp()
            ctx.save_for_backward(y)
            live.append(weakref.ref(y.untyped_storage()))
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * ctx.saved_tensors[0]

    class Watching(Counted):
        def hidden(self, x: Tensor, h: Tensor) -> Tensor:
            return Watched.apply(super().hidden(x, h))

    _, objective, _ = counted(Watching)
    H = fc.Hessian(objective)
    v = torch.randn(H.shape[0], dtype=H.dtype)
    for _ in range(3):
        H @ v
    H.plan()
    del H, objective
    gc.collect()
    assert not [ref for ref in live if ref() is not None]


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


class MixingSome(Counted):
    """Its rows mix in batches that begin with a large number."""

    def hidden(self, x: Tensor, h: Tensor) -> Tensor:
        return h + h.mean(0) if bool(x[0, 0] > 5) else h


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_whether_rows_mix_is_found_for_every_batch(order: list[int]) -> None:
    batches = [(torch.randn(4, 4, dtype=torch.float64) + 9 * i, torch.tensor([0, 1, 2, 0])) for i in order]
    C = fc.GradientCovariance(fc.Objective(MixingSome().double(), F.cross_entropy, batches))
    with pytest.raises(ValueError, match="the mean over the examples"):
        C @ torch.randn(C.shape[0], dtype=C.dtype)

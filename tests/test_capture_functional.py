"""The graph that torch.export gives is taken as it is only where torch's decomposition of it would say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, selected
from torch import Tensor, nn
from torch.export import ExportedProgram

from flatcore.capture import batch_leaves, capture, export, interpret, named_tensors
from flatcore.capture.functional import _decomposed, functional_form
from flatcore.capture.program import Program

# One in three, and those that write, have a normalisation, or move their numbers about.
NAMES = {c.name for c in CASES[::3]} | {
    "resnet",
    "cnn",
    "mlp-batchnorm",
    "encoder",
    "moved",
    "statistics",
    "bench-vit",
}


def program_of(
    model: nn.Module, loss: Callable[..., Tensor], batch: Any, kind: Any = "output_target"
) -> Program:
    return capture(model, loss, batch, selected=selected(model), loss_kind=kind)


def said(program: Program) -> tuple[Any, ...]:
    """All but names, which follow the operations of the graph."""
    values = [dataclasses.replace(value, name="") for value in program.values]
    ops = [dataclasses.replace(op, aten="") for op in program.ops]
    return (
        values,
        ops,
        program.parameters,
        program.constants,
        program.loss,
        program.cut,
        program.normaliser,
        program.reduction,
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=str)
def test_decomposed_it_is_the_same_program(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batch = case.build(0, torch.float64)
    as_it_is = program_of(model, loss, batch, case.loss_kind)

    def decomposed_first(raw: ExportedProgram, active: object) -> ExportedProgram:
        rewritten = _decomposed(raw, set())
        return functional_form(rewritten, set(rewritten.graph.nodes))

    monkeypatch.setattr(export, "functional_form", decomposed_first)
    assert said(program_of(model, loss, batch, case.loss_kind)) == said(as_it_is)


@pytest.mark.parametrize("name", ["bench-vit", "resnet"])
def test_what_only_reads_is_traced_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decompositions are three quarters of the time of a capture. The residual net writes into new tensors."""
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    case = next(c for c in CASES if c.name == name)
    model, loss, batch = case.build(0, torch.float64)
    assert not any(op.external for op in program_of(model, loss, batch).ops)


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.write, self.out = nn.Linear(6, 4), write, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.write(self.first(x)))


def into_a_new_tensor(h: Tensor) -> Tensor:
    out = h * 2
    out += h
    return out.relu_() * out + h


def into_what_a_view_shows(h: Tensor) -> Tensor:
    view = h.reshape(-1)
    h.relu_()
    return view.reshape(h.shape) + h


def into_a_view(h: Tensor) -> Tensor:
    h[:, 1:3].relu_()
    return h


def into_what_dropout_gives(h: Tensor) -> Tensor:
    return F.dropout(h, training=False).relu_() + h


def into_what_has_the_type(h: Tensor) -> Tensor:
    return h.type_as(h * 2).relu_() + h


def into_what_was_read(h: Tensor) -> Tensor:
    square = h.square()
    return h.relu_() + square


def into_a_part(h: Tensor) -> Tensor:
    h[:, 1:3] = h[:, :2].clone()
    return h


def into_an_empty_tensor(h: Tensor) -> Tensor:
    out = h.new_empty(5, 4)
    out[:, :1], out[:, 1:] = h[:, 3:], h[:, :3].sin()
    return out


def without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.full((4,), 0.5).add_(1)
    return h * scale


def normed_by_the_batch(h: Tensor) -> Tensor:
    return F.batch_norm(h, None, None, training=True)


WRITES = [
    into_a_new_tensor,
    into_what_a_view_shows,
    into_a_view,
    into_what_dropout_gives,
    into_what_has_the_type,
    into_what_was_read,
    into_a_part,
    into_an_empty_tensor,
    without_gradient,
    normed_by_the_batch,
]


def of_the_type_of(h: Tensor) -> Tensor:
    numbers = torch.tensor([0.1, 1.0, 2.0, 3.0])
    return (h + numbers.type_as(h)) * (torch.arange(4) > 1).to(h) + torch.arange(4).type_as(h).exp() * h


@pytest.mark.parametrize("write", [*WRITES, of_the_type_of])
def test_what_writes_and_what_reads_a_type_alone(write: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Writes(write).double()
    batch = torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))
    program = program_of(model, F.cross_entropy, batch)
    assert not any(op.external for op in program.ops)
    constants = program.prelude.run(batch_leaves(batch), named_tensors(model, None))
    found = interpret(program, dict(model.named_parameters()), constants)[program.loss]
    expected = F.cross_entropy(model(batch[0]), batch[1])
    assert abs(found - expected) <= 100 * torch.finfo(torch.float64).eps * abs(expected)

"""What capture refuses, by name, and what verification catches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, selected
from torch import Tensor, nn

import flatcore as fc
from flatcore.capture import (
    VerificationError,
    batch_leaves,
    capture,
    interpret,
    named_tensors,
    verify,
)
from flatcore.capture.program import Program
from flatcore.errors import CaptureError, FlatcoreWarning


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def program_of(model: nn.Module, loss: Callable[..., Tensor], batch: Any) -> Program:
    return capture(model, loss, batch, selected=selected(model), loss_kind="output_target")


# --- refusals ---


class Inner(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(()))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Outer(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Sequential(Inner(forward))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def without_gradient(self: Inner, x: Tensor) -> Tensor:
    y = self.linear(x)
    with torch.no_grad():
        scale = y.abs().mean()
    return y / scale


def counting(self: Inner, x: Tensor) -> Tensor:
    self.count.add_(1)
    return self.linear(x)


def branching(self: Inner, x: Tensor) -> Tensor:
    y = self.linear(x)
    return y if y.sum() > 0 else -y


def hooked(self: Inner, x: Tensor) -> Tensor:
    y = self.linear(x)
    y.register_hook(lambda dy: 2 * dy)
    return y


def recurrent(m: Inner, x: Tensor, layers: int) -> Tensor:
    """Drops between its layers, as a net in train mode."""
    h = m.linear(x)[:, None]
    weights = [torch.eye(3)] * (2 * layers)
    return torch.rnn_tanh(h, torch.zeros(layers, 1, 3), weights, False, layers, 0.5, True, False, False)[0]


REFUSED: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "once": (lambda m, x: Once.apply(m.linear(x)), "Once.apply", "once only"),
    "item": (
        lambda m, x: m.linear(x) * m.linear(x).sum().item(),
        "aten._local_scalar_dense.default",
        "stops",
    ),
    "own functions": (
        lambda m, x: torch.cond(m.linear(x).sum() > 0, torch.sin, torch.cos, (m.linear(x),)),
        "cond",
        "functions of its own",
    ),
    "detach": (lambda m, x: m.linear(x).detach() * m.linear(x), "aten.detach.default", "stops the gradient"),
    "no_grad": (without_gradient, "torch.no_grad", "stops the gradient"),
    "dropout": (lambda m, x: F.dropout(m.linear(x)), "aten.dropout.default", "random"),
    "dropout between layers": (
        lambda m, x: recurrent(m, x, 2)[:, 0],
        "aten.rnn_tanh.input",
        "random",
    ),
    "noise": (lambda m, x: m.linear(x + torch.randn_like(x)), "aten.randn_like.default", "random"),
    "buffer": (counting, "aten.add.Tensor", "layer.0.count"),
    "cast": (lambda m, x: m.linear(x).half().float(), "aten.to.dtype", "precision"),
    "detached spectrum": (
        lambda m, x: torch.fft.rfft(m.linear(x)).detach().abs()[:, :1] * m.linear(x),
        "aten.detach.default",
        "stops the gradient",
    ),
    "half precision": (
        lambda m, x: torch.fft.rfft(m.linear(x)).abs().half().float(),
        "aten._to_copy.default",
        "prec",
    ),
}


def test_one_recurrent_layer_drops_nothing() -> None:
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    model = Outer(lambda m, x: recurrent(m, x, 1)[:, 0])
    program = program_of(model, nn.CrossEntropyLoss(), batch)
    assert [op.kind for op in program.ops].count("linear") == 7  # one for all inputs, one a step


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_operation_and_module(name: str) -> None:
    forward, op, reason = REFUSED[name]
    batch = torch.randn(5, 4).abs(), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(CaptureError, match=reason) as info:
        program_of(Outer(forward).eval(), nn.CrossEntropyLoss(), batch)
    assert (info.value.op, info.value.path) == (op, "layer.0")
    assert op in str(info.value)
    assert "'layer.0'" in str(info.value)


def test_batch_normalisation_in_training_mode_is_refused_by_name() -> None:
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(CaptureError, match=r"'layer\.0\.norm'.*model\.eval\(\)"):
        program_of(Outer(lambda m, x: m.norm(m.linear(x))).train(), nn.CrossEntropyLoss(), batch)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (hooked, r"Tensor\.register_hook in module 'layer\.0'"),
        (
            branching,
            r"cannot capture module 'layer\.0': its control flow depends on tensor values "
            r"\(test_capture_refusals\.py, line \d+\)",
        ),
        (lambda m, x: m.missing(x), r"cannot capture module 'layer\.0': .*no attribute 'missing'"),
    ],
)
def test_refusals_without_a_place_in_the_graph(
    forward: Callable[..., Tensor], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(CaptureError, match=reason) as info:
        program_of(Outer(forward).eval(), nn.CrossEntropyLoss(), batch)
    assert "\n" not in str(info.value)
    assert capfd.readouterr() == ("", "")


def test_module_hooks_are_refused() -> None:
    model = Outer(lambda m, x: m.linear(x)).eval()
    model.layer[0].linear.register_full_backward_hook(lambda m, before, after: None)
    with pytest.raises(
        CaptureError, match=r"BackwardHookFunction\.apply.*a hook that may alter the gradient"
    ):
        program_of(model, nn.CrossEntropyLoss(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))


def test_an_exception_in_the_loss_is_said_to_be_there() -> None:
    model, batch = nn.Linear(4, 3), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    with pytest.raises(CaptureError, match=r"cannot capture module 'loss': .*values"):
        program_of(model, lambda z, y: z.sum() if z.sum() > 0 else -z.sum(), batch)


def test_gradient_hooks_are_refused() -> None:
    model = Outer(lambda m, x: m.linear(x)).eval()
    model.layer[0].linear.weight.register_hook(lambda dw: 2 * dw)
    with pytest.raises(CaptureError, match=r"'layer\.0\.linear\.weight' has a gradient hook"):
        program_of(model, nn.CrossEntropyLoss(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))


def test_what_does_not_depend_on_the_parameters_is_not_refused() -> None:
    def forward(self: Inner, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.sort(1)[0].detach().abs().mean()
        y = self.linear(x)
        self.cache = y
        return y * scale + torch.ones_like(y) * y.new_full((3,), 2.0)

    model, loss = Outer(forward).eval(), nn.CrossEntropyLoss()
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    program = program_of(model, loss, batch)
    assert not hasattr(model.layer[0], "cache")
    constants = program.prelude.run(batch_leaves(batch), named_tensors(model, loss))
    values = interpret(program, dict(model.named_parameters()), constants)
    assert abs(values[program.loss] - loss(model(batch[0]), batch[1])) < 1e-6


@pytest.mark.parametrize(
    ("loss", "names", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), ["weight"], r"loss: expected one number, got .*\(5,\)"),
        (nn.CrossEntropyLoss(), ["wait"], "selected: expected names of parameters"),
        (nn.CrossEntropyLoss(), [], "selected: expected names of parameters"),
        (lambda o, t: t.float().mean(), ["weight"], "none that reaches it"),
    ],
)
def test_bad_input_is_a_value_error(loss: Callable[..., Tensor], names: list[str], message: str) -> None:
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match=message):
        capture(nn.Linear(4, 3), loss, batch, selected=names, loss_kind="output_target")


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"float32 or float64, got torch\.bfloat16"):
        program_of(
            nn.Linear(4, 3).bfloat16(),
            nn.MSELoss(),
            (torch.ones(5, 4).bfloat16(), torch.ones(5, 3).bfloat16()),
        )


# --- verification ---


@pytest.fixture(scope="module")
def verified() -> Program:
    model, loss, batch = next(case for case in CASES if case.name == "cnn").build(1, torch.float64)
    return program_of(model, loss, batch)


def with_op(program: Program, index: int, **changes: Any) -> Program:
    ops = list(program.ops)
    ops[index] = dataclasses.replace(ops[index], **changes)
    return dataclasses.replace(program, ops=tuple(ops))


def with_value(program: Program, index: int, **changes: Any) -> Program:
    values = list(program.values)
    values[index] = dataclasses.replace(values[index], **changes)
    return dataclasses.replace(program, values=tuple(values))


MUTATIONS: dict[str, tuple[Callable[[Program], Program], str]] = {
    "kind": (lambda p: with_op(p, 1, kind="rectify"), r"op 1 \(rectify, in module '1'\): unknown kind"),
    "arity": (lambda p: with_op(p, 0, inputs=p.ops[0].inputs[:2]), "expected inputs x, weight, bias"),
    "absent": (lambda p: with_op(p, 0, inputs=(None, *p.ops[0].inputs[1:])), "input x is absent"),
    "order": (lambda p: with_op(p, 1, inputs=(p.ops[3].output,)), "not computed before this op"),
    "twice": (lambda p: with_op(p, 1, output=p.ops[0].output), "computed twice"),
    "shape": (lambda p: with_value(p, p.ops[0].output, shape=(7, 4, 5, 5)), "yields"),
    "apply": (lambda p: with_op(p, 0, inputs=(*p.ops[0].inputs[1::-1], None)), "does not apply"),
    "dtype": (lambda p: with_value(p, p.ops[1].output, dtype=torch.float32), "float"),
    "names": (lambda p: with_op(p, 0, attrs={**p.ops[0].attrs, "bias": True}), "expected attributes"),
    "pair": (lambda p: with_op(p, 0, attrs={**p.ops[0].attrs, "stride": (2,)}), "stride: expected 2 ints"),
    "bool": (lambda p: with_op(p, 0, attrs={**p.ops[0].attrs, "groups": True}), "groups: expected int"),
    "real": (lambda p: with_op(p, 1, attrs={**p.ops[1].attrs, "a": 0}), "a: expected float"),
    "function": (
        lambda p: with_op(p, 1, attrs={**p.ops[1].attrs, "function": "rely"}),
        "unknown function 'rely'",
    ),
    "mass": (lambda p: with_op(p, -2, inputs=(p.ops[-2].inputs[0],) * 3), "mass must not depend"),
    "masses": (lambda p: with_op(p, -2, inputs=(*p.ops[-2].inputs[:2], None)), "mass must have the shape"),
    "loss": (lambda p: dataclasses.replace(p, loss=p.ops[-3].output), "loss: expected one number"),
    "cut": (lambda p: dataclasses.replace(p, cut=(0,)), "cut: expected the id of a computed activation"),
    "normaliser": (
        lambda p: dataclasses.replace(p, normaliser=0),
        "normaliser: expected the id of a constant",
    ),
    "ids": (lambda p: with_value(p, 3, id=4), "value 3: expected its position as id"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_verification_catches_a_mutated_program(verified: Program, name: str) -> None:
    verify(verified)
    mutate, message = MUTATIONS[name]
    with pytest.raises(VerificationError, match=message):
        verify(mutate(verified))


def test_a_program_prints_one_line_per_op(verified: Program) -> None:
    text = str(verified)
    lines = [line for line in text.splitlines() if " = " in line and line.startswith("  %")]
    assert len(lines) == len(verified.ops)
    assert "conv2d(%" in lines[0]
    assert lines[0].endswith("[0]")


def test_tensors_of_shapes_that_depend_on_values_are_broadcast() -> None:
    """Squared errors broadcast what they get; nothing may ask which of such shapes is the larger."""

    def some(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, target, mask = batch
        return nn.functional.mse_loss(model(x)[mask], target[mask])

    mask = torch.tensor([True, False, True, True, False])
    x, target = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    model, v = nn.Linear(4, 3).double(), torch.randn(15).double()
    H = fc.Hessian(fc.Objective(model, fc.ModelLoss(some), (x, target, mask)))
    with pytest.warns(FlatcoreWarning, match="runs through torch autograd inside the native program"):
        found = H @ v
    chosen = fc.Hessian(fc.Objective(model, nn.MSELoss(), (x[mask], target[mask]))) @ v
    assert torch.allclose(found, chosen, rtol=1e-12, atol=1e-14)


def test_a_shape_that_depends_on_values_is_named() -> None:
    """As where the loss looks at some of the nodes of a graph alone; and the warning points at this file."""

    def some(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, target, mask = batch
        return nn.functional.cross_entropy(model(x)[mask], target[mask])

    batch = (torch.randn(5, 4), torch.randint(3, (5,)), torch.tensor([True, False, True, True, False]))
    H = fc.Hessian(fc.Objective(nn.Linear(4, 3), fc.ModelLoss(some), batch))
    with pytest.warns(
        FlatcoreWarning, match="the shape of a tensor depends on the values of another"
    ) as told:
        H @ torch.ones(15)
    assert [warning.filename for warning in told] == [__file__]

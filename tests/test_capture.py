"""Capture and interpreter against the model itself, differentiated by torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, selected
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from flatcore.capture import (
    batch_leaves,
    capture,
    flatten_batch,
    interpret,
    named_tensors,
    split_batch,
)
from flatcore.capture.export import LossKind
from flatcore.capture.interpreter import meaning
from flatcore.capture.program import Program, depending

FLOAT64 = torch.float64
EPS = torch.finfo(FLOAT64).eps


@pytest.fixture(autouse=True)
def one_thread_and_fixed_seed() -> Iterator[None]:
    """Ops this small wait for each other's threads longer than they run."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):  # the only one with second derivatives
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def loss_of_model(model: nn.Module, loss: Callable[..., Tensor], batch: Any, kind: LossKind) -> Tensor:
    if kind == "model_batch":
        return loss(model, batch)
    args, kwargs, target = split_batch(batch)
    return loss(model(*args, **kwargs), target)


def program_of(
    model: nn.Module, loss: Callable[..., Tensor], batch: Any, kind: LossKind = "output_target"
) -> Program:
    return capture(model, loss, batch, selected=selected(model), loss_kind=kind)


@cache
def program_for(case: Case, dtype: torch.dtype = FLOAT64) -> Program:
    """Captured from the numbers of one seed; the tests use it with those of others."""
    return program_of(*case.build(1, dtype), case.loss_kind)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def constants_of(program: Program, model: nn.Module, loss: Any, batch: Any) -> dict[int, Tensor]:
    return program.prelude.run(batch_leaves(batch), named_tensors(model, loss))


def interpreted(program: Program, model: nn.Module, loss: Any, batch: Any) -> Tensor:
    """The loss, as a function of the parameters of the model."""
    values = interpret(program, dict(model.named_parameters()), constants_of(program, model, loss, batch))
    return values[program.loss]


def gradient(loss: Tensor, parameters: list[Tensor], create_graph: bool = False) -> Tensor:
    """Flat; zero for a parameter that the loss does not read."""
    parts = torch.autograd.grad(
        loss, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in parts])


def hessian(loss: Tensor, parameters: list[Tensor], one_by_one: bool = False) -> Tensor:
    """Reverse over reverse, all rows at once unless said otherwise."""
    first = gradient(loss, parameters, create_graph=True)
    if not first.requires_grad:
        return torch.zeros(len(first), len(first), dtype=first.dtype)
    if one_by_one:
        rows = [
            torch.autograd.grad(row, parameters, retain_graph=True, materialize_grads=True) for row in first
        ]
        return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    parts = torch.autograd.grad(
        first,
        parameters,
        grad_outputs=torch.eye(len(first), dtype=first.dtype),
        is_grads_batched=True,
        allow_unused=True,
    )
    zeros = [first.new_zeros(len(first), p.numel()) for p in parameters]
    rows = [z if part is None else part.reshape(z.shape) for part, z in zip(parts, zeros, strict=True)]
    return torch.cat(rows, dim=1)


def assert_close(actual: Tensor, expected: Tensor, terms: int) -> None:
    """Two orders of a sum over `terms` products differ by eps sqrt(terms) of its size, op by op."""
    depth = 32
    scale = expected.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(depth * EPS * terms**0.5 * scale))


# --- the program is the model ---


def test_value_and_gradient_are_the_models(case: Case) -> None:
    model, loss, batch = case.build(1, FLOAT64)
    program = program_for(case)
    parameters = [dict(model.named_parameters())[name] for name in program.parameters.values()]
    expected = loss_of_model(model, loss, batch, case.loss_kind)
    actual = interpreted(program, model, loss, batch)
    assert abs(actual - expected) <= 1e-12 * max(1.0, abs(expected))
    assert_close(gradient(actual, parameters), gradient(expected, parameters), terms=1000)


def test_hessian_is_the_models(case: Case) -> None:
    model, loss, batch = case.build(2, FLOAT64)
    program = program_for(case)
    parameters = [dict(model.named_parameters())[name] for name in program.parameters.values()]
    # torch.autograd cannot batch the second derivatives of a grouped transposed convolution and of the pooling of a
    # permuted image (2.13).
    one_by_one = case.name in ("image-norms", "extremes")
    expected = hessian(loss_of_model(model, loss, batch, case.loss_kind), parameters, one_by_one)
    actual = hessian(interpreted(program, model, loss, batch), parameters, one_by_one)
    assert expected.abs().max() > 0 or case.name == "l1"
    assert_close(actual, expected, terms=1000)


def test_torch_func_differentiates_the_interpreter_twice() -> None:
    model, loss, batch = case_named("mse").build(3, FLOAT64)
    program = program_of(model, loss, batch)
    constants = constants_of(program, model, loss, batch)
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def value(theta: dict[str, Tensor]) -> Tensor:
        return interpret(program, theta, constants)[program.loss]

    probe = {name: torch.randn_like(p) for name, p in theta.items()}
    (product,) = torch.func.vjp(torch.func.grad(value), theta)[1](probe)
    parameters = list(model.parameters())
    expected = hessian(loss(model(batch[0]), batch[1]), parameters)
    flat = torch.cat([v.reshape(-1) for v in probe.values()])
    assert_close(torch.cat([p.reshape(-1) for p in product.values()]), expected @ flat, terms=1000)


def test_weight_norm_has_the_hessian_of_its_definition() -> None:
    """Not compared with autograd: the second derivative of torch's fused weight_norm (2.13, CPU) is wrong."""
    torch.manual_seed(4)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)).double()
    batch = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    program = program_of(model, nn.MSELoss(), batch)
    parameters = list(model.parameters())
    bias, g, v = parameters
    written_out = F.linear(batch[0], g * v / v.square().sum(1, keepdim=True).sqrt(), bias)
    expected = hessian(F.mse_loss(written_out, batch[1]), parameters)
    assert_close(hessian(interpreted(program, model, nn.MSELoss(), batch), parameters), expected, terms=1000)


def test_float32_program_is_float32(case: Case) -> None:
    model, loss, batch = case.build(1, torch.float32)
    program = program_for(case, torch.float32)
    assert {value.dtype for value in program.values if value.dtype.is_floating_point} == {torch.float32}
    with torch.no_grad():
        expected = float(loss_of_model(model, loss, batch, case.loss_kind))
        actual = float(interpreted(program, model, loss, batch))
    assert abs(actual - expected) < 1000 * torch.finfo(torch.float32).eps * max(1.0, abs(expected))


def test_a_program_serves_other_batches_of_its_shapes_and_other_parameters(case: Case) -> None:
    model, loss, batch = case.build(1, FLOAT64)
    program = program_for(case)
    _, _, other = case.build(5, FLOAT64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
        for b in model.buffers():
            if b.is_floating_point():
                b.add_(0.1)
        expected = loss_of_model(model, loss, other, case.loss_kind)
        actual = interpreted(program, model, loss, other)
    assert flatten_batch(other)[1].key == flatten_batch(batch)[1].key
    assert abs(actual - expected) <= 1e-12 * max(1.0, abs(expected))


def test_capture_leaves_everything_as_it_was(case: Case) -> None:
    model, loss, batch = case.build(1, FLOAT64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: (id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    leaves = [t.clone() for t in batch_leaves(batch)]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = program_of(model, loss, batch, case.loss_kind)
        constants_of(program, model, loss, batch)
    for name, t in model.state_dict(keep_vars=True).items():
        assert before[name][:2] == (id(t), t._version)
        assert torch.equal(before[name][2], t)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(leaves, batch_leaves(batch), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_attributes_are_plain_data(case: Case) -> None:
    program = program_for(case)
    for op in program.ops:
        for value in op.attrs.values():
            assert type(value) in (bool, int, float, str, tuple)


# --- cut, normaliser, reduction ---


def test_the_cut_separates_parameters_from_loss(case: Case) -> None:
    model, loss, batch = case.build(1, FLOAT64)
    program = program_for(case)
    if case.name == "penalised":
        assert program.cut is None
        assert "another way" in program.cut_reason
        return
    assert program.cut
    constants = constants_of(program, model, loss, batch)
    values = interpret(program, dict(model.named_parameters()), constants)
    changed = {i: torch.rand_like(values[i]) for i in program.parameters} | constants
    changed |= {i: values[i] for i in program.cut}
    for op in program.ops:
        if op.output not in program.cut:
            inputs = [None if i is None else changed[i] for i in op.inputs]
            changed[op.output] = meaning(op.kind, op.attrs, inputs)
    assert torch.equal(changed[program.loss], values[program.loss])


def test_no_value_of_the_cut_depends_on_another(case: Case) -> None:
    """Else the adjoint of one would contain the adjoint of the other."""
    program = program_for(case)
    for i in program.cut or ():
        assert depending(program.ops, [i]) & set(program.cut or ()) == {i}


@pytest.mark.parametrize("name", ["mse", "cnn", "sequence", "ce-none", "heads", "ce-positions"])
def test_the_cut_is_the_models_output(name: str) -> None:
    case = case_named(name)
    model, loss, batch = case.build(1, FLOAT64)
    program = program_for(case)
    values = interpret(program, dict(model.named_parameters()), constants_of(program, model, loss, batch))
    args, kwargs, _ = split_batch(batch)
    outputs = pytree.tree_leaves(model(*args, **kwargs))
    assert program.cut is not None
    for i, output in zip(program.cut, outputs, strict=True):
        torch.testing.assert_close(values[i], output)


def test_a_mean_cross_entropy_carries_what_it_divides_by() -> None:
    wanted = {
        "mlp-tanh": 13.0,
        "ce-sum": None,
        "mse": None,
        "composite": None,
        "ce-soft": 13.0,
        "resnet": 7.0,
    }
    for case in CASES:
        if case.name not in {*wanted, "ce-ignore", "ce-weighted", "ce-positions"}:
            continue
        model, loss, batch = case.build(1, FLOAT64)
        program = program_for(case)
        constants = constants_of(program, model, loss, batch)
        if case.name in wanted:
            expected = wanted[case.name]
        else:
            counted = batch[1][batch[1] != -100]
            expected = float(counted.numel() if loss.weight is None else loss.weight[counted].sum())
        actual = None if program.normaliser is None else float(constants[program.normaliser])
        assert actual == pytest.approx(expected), case.name


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (nn.MSELoss(), "mean"),
        (nn.MSELoss(reduction="sum"), "sum"),
        (lambda o, t: F.mse_loss(o, t, reduction="none").sum(1).mean(), "mean"),
        (lambda o, t: -(0.5 * (o - t).square()).mean() / 3, "mean"),
        (lambda o, t: F.mse_loss(o, t) + 0.1 * o.abs().mean(), "mean"),
        (lambda o, t: F.mse_loss(o, t) + 0.1 * o.abs().sum(), "other"),
        (lambda o, t: (o - t).square().sum() / 13, "other"),
        (lambda o, t: (o - t).square().mean().sqrt(), "other"),
    ],
)
def test_reduction(loss: Callable[..., Tensor], expected: str) -> None:
    model = nn.Linear(4, 3).double()
    assert (
        program_of(model, loss, (torch.randn(13, 4).double(), torch.randn(13, 3).double())).reduction
        == expected
    )


# --- prelude ---


def test_frozen_layers_in_front_belong_to_the_prelude() -> None:
    model, loss, batch = case_named("frozen-front").build(1, FLOAT64)
    program = program_of(model, loss, batch)
    assert not [
        op for op in program.ops if op.kind in ("conv2d", "batch_norm")
    ]  # nor the LayerNorm, which has no rule
    constants = constants_of(program, model, loss, batch)
    features = model[2](model[1](model[0](batch[0]))).detach()
    assert any(t.shape == features.shape and torch.allclose(t, features) for t in constants.values())
    assert all(t.is_contiguous() and not t.requires_grad for t in constants.values())


def test_selection_decides_what_is_active() -> None:
    model, loss, batch = case_named("mlp-tanh").build(1, FLOAT64)
    program = capture(model, loss, batch, selected=["5.bias", "3.weight"], loss_kind="output_target")
    assert list(program.parameters.values()) == ["3.weight", "5.bias"]
    assert program.ops[0].path == "3"
    assert abs(interpreted(program, model, loss, batch) - loss(model(batch[0]), batch[1])) < 1e-12


def test_a_tied_parameter_is_one_value() -> None:
    model, loss, batch = case_named("tied").build(1, FLOAT64)
    program = program_of(model, loss, batch)
    assert list(program.parameters.values()) == [name for name, _ in model.named_parameters()]


def test_an_unused_parameter_is_listed() -> None:
    model, loss, batch = case_named("unused").build(1, FLOAT64)
    program = program_of(model, loss, batch)
    assert "spare.weight" in program.parameters.values()
    read = {i for op in program.ops for i in op.inputs}
    assert not {i for i, name in program.parameters.items() if "spare" in name} & read


def test_a_target_outside_the_classes_is_refused_when_the_prelude_runs() -> None:
    model, loss, batch = case_named("mlp-tanh").build(1, FLOAT64)
    program = program_of(model, loss, batch)
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        constants_of(program, model, loss, (batch[0], torch.full_like(batch[1], 3)))


class Attention(dict):  # a mapping type that torch's trees do not know
    def __getattr__(self, name: str) -> Tensor:
        return self[name]


def test_a_mapping_type_of_the_users_own_arrives_as_itself() -> None:
    model = nn.Linear(4, 3).double()
    batch = Attention(x=torch.randn(5, 4).double(), y=torch.tensor([0, 1, 2, 0, 1]), note="first")

    def loss(model: nn.Module, batch: Attention) -> Tensor:
        assert batch.note == "first"
        return F.cross_entropy(model(batch.x), batch.y)

    program = program_of(model, loss, batch, "model_batch")
    assert abs(interpreted(program, model, loss, batch) - loss(model, batch)) < 1e-12


@pytest.mark.parametrize(
    "batch", [{"x": torch.ones(2)}, {"y": 1, "label": 2}, (torch.ones(2),), "ab", torch.ones(2)]
)
def test_split_batch_says_what_it_expects(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch: expected .*, got .*ModelLoss"):
        split_batch(batch)

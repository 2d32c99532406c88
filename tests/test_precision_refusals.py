"""Where products cannot round their operands: refused or said, and computed in full precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_precision import OPERATORS, available, directions, problem
from torch import Tensor, nn

import flatcore as fc
from flatcore import precision
from flatcore._C import engine
from flatcore.errors import FlatcoreWarning


def test_other_names() -> None:
    for wrong in ("half", "float32", torch.bfloat16, None, 16):
        with pytest.raises(ValueError, match=r'^precision: expected "full", "tf32" or "bf16", got '):
            fc.Hessian(problem(20, 30, 10), precision=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", OPERATORS)
def test_float64_has_no_lower_precision(operator: type) -> None:
    objective = problem(20, 30, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^precision: expected .* torch.float64, got .*\.float\(\)"):
        operator(objective, precision="bf16")
    operator(objective, precision="full")


@pytest.mark.skipif(engine.gpu == "emulated", reason="the emulated GPU rounds to TF32")
def test_tf32_is_for_gpus() -> None:
    with pytest.raises(
        ValueError, match=r'^precision: expected "full" or "bf16" for parameters on cpu, got "tf32"'
    ):
        fc.Hessian(problem(20, 30, 10), precision="tf32")


@pytest.mark.parametrize("rounded", ["tf32", "bf16"])
def test_gpus_before_tensor_cores(rounded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = dataclasses.replace(problem(20, 30, 10).layout, device=torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(FlatcoreWarning, match=f'^precision="{rounded}": cuda:0 has no instructions for it'):
        assert precision.usable(rounded, layout) == "full"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert precision.usable(rounded, layout) == rounded
    assert precision.usable("full", layout) == "full"


def test_a_processor_without_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "bf16_available", lambda: False)
    objective = problem()
    with pytest.warns(FlatcoreWarning, match='^precision="bf16": cpu has no instructions') as said:
        B = fc.Hessian(objective, precision="bf16")
    assert len(said) == 1
    assert said[0].filename == __file__
    V = directions(B)
    assert (B.precision, B.plan().precision) == ("full", "full")
    assert torch.equal(B @ V, fc.Hessian(objective) @ V)


class Branching(nn.Module):
    """Without a program."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 96), nn.Linear(96, 80)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h) if bool(h.abs().sum() > 0) else h)


@available
def test_autograd_has_none() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 64), torch.randint(80, (64,))
    objective = fc.Objective(Branching(), nn.CrossEntropyLoss(), (x, y))
    A, B = fc.Hessian(objective), fc.Hessian(objective, precision="bf16")
    V = directions(B)
    with pytest.warns(FlatcoreWarning, match="run through torch autograd"):
        expected = A @ V
    with pytest.warns(
        FlatcoreWarning, match="^precision='bf16': products through torch autograd are in full prec"
    ):
        assert torch.equal(B @ V, expected)
    assert torch.equal(B @ V, expected)  # said once: any warning now is an error
    assert B.plan().precision == "full"
    assert B.precision_error().max == 0


def test_the_engine_refuses_too() -> None:
    program = engine.Program(
        [("parameter", [3]), ("activation", [])],
        [("sum", [0], 1, {"dims": [0], "keepdim": False, "scale": 1.0}, "")],
        {0: 0},
        3,
        1,
        [],
    )
    state = engine.Linearization(program, {0: torch.ones(3, dtype=torch.float64)}, 1.0)
    V = torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="precision: bf16 needs float32"):
        state.product(V, torch.empty_like(V), "hessian", False, 1, 1.0, "bf16")
    with pytest.raises(ValueError, match="precision: expected full, tf32 or bf16, got 'half'"):
        state.product(V, torch.empty_like(V), "hessian", False, 1, 1.0, "half")


@pytest.mark.parametrize(
    "use",
    [
        lambda A: fc.solve(A, torch.ones(A.shape[0]), damping=1.0),
        lambda A: fc.block_spectra(A),
        lambda A: fc.logdet(A, 1.0),
    ],
    ids=["solve", "block_spectra", "logdet"],
)
def test_what_takes_rounding_for_curvature_refuses(use):
    torch.manual_seed(0)
    batch = torch.randn(64, 40), torch.randint(5, (64,))
    objective = fc.Objective(nn.Linear(40, 5), nn.CrossEntropyLoss(), batch)
    A = fc.GGN(objective)
    A.precision = "bf16"  # whatever this processor can do
    with pytest.raises(
        ValueError, match='A: expected products in full precision, got an operator with precision="bf16"'
    ):
        use(A)

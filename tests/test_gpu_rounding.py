"""Products in bfloat16 on a GPU, or on its path emulated: what is rounded, how often, and the error of it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flatcore as fc
from flatcore._C import engine
from tests.gpu import DEVICE

EMULATED = engine.gpu == "emulated"
HERE = torch.device("cpu") if EMULATED else DEVICE
pytestmark = pytest.mark.skipif(
    not (EMULATED or torch.cuda.is_available()),
    reason="no CUDA device, and the engine is not the emulated one",
)

ROWS, WIDTH, CLASSES = 64, 96, 160
K = 3
# Of a factor rounded to eight binary digits. A term of a product passes four matrix products, two forward and two back,
# with two rounded factors each: at most eight roundings.
UNIT, ROUNDINGS = 2.0**-8, 8


class Roundings(TorchDispatchMode):
    """Counts the tensors rounded to bfloat16, by shape, whichever of its matrix' axes comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.to.dtype and result.dtype == torch.bfloat16:
            *batch, m, n = result.shape
            self.shapes[(*batch, min(m, n), max(m, n))] += 1
        return result


def objective(loss: nn.Module, targets: Tensor, dtype: torch.dtype, **options: Any) -> fc.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    return fc.Objective(model.to(HERE, dtype), loss, (x.to(HERE, dtype), targets.to(HERE)), **options)


def product(loss: nn.Module, targets: Tensor) -> tuple[Roundings, float, list[str]]:
    """Of one product with K directions: what it rounds, its error relative to float64, the kinds of its ops."""
    rounded = fc.Hessian(objective(loss, targets, torch.float32), precision="bf16")
    exact = fc.Hessian(objective(loss, targets, torch.float64))
    V = torch.randn(exact.shape[0], K, dtype=torch.float64).to(HERE)
    truth = exact @ V
    rounded @ V.float()  # makes the state
    with Roundings() as roundings:
        found = rounded @ V.float()
    return roundings, float((found - truth).norm() / truth.norm()), [row.kind for row in rounded.plan().rows]


def test_every_factor_of_a_layer_is_rounded_once_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatcore.native.pays", lambda *_: False)  # a replay shows nothing
    targets = torch.randn(ROWS, CLASSES)
    found, error, kinds = product(nn.MSELoss(), targets)
    assert "linear_cross_entropy" not in kinds
    first, last = (WIDTH, WIDTH), (WIDTH, CLASSES)
    assert found.shapes == {
        # tangent sweep: x V of the first layer; x V and tx W of the last
        # adjoint sweep: tdy x of the first layer; tdy W, dy V, tdy x and dy tx of the last
        (ROWS, WIDTH): 2 + 2,  # x, both layers, both sweeps
        (K, *first): 1,
        (K, *last): 2,
        last: 2,
        (K, ROWS, WIDTH): 2 + 1,  # tx of the last layer in both sweeps, tdy of the first
        (K, ROWS, CLASSES): 1,
        (ROWS, CLASSES): 1,
    }
    assert error <= ROUNDINGS * UNIT


def test_every_factor_of_a_head_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions go one by one; the loss' tangent is not needed, so there is one sweep."""
    monkeypatch.setattr("flatcore.native.pays", lambda *_: False)
    monkeypatch.setattr("flatcore.capture.fuse.LEAST_CLASSES", 2)
    found, error, kinds = product(nn.CrossEntropyLoss(), torch.arange(ROWS) % CLASSES)
    assert "linear_cross_entropy" in kinds
    weight = (WIDTH, CLASSES)
    assert found.shapes[weight] == 1 + K
    assert found.shapes[ROWS, WIDTH] == 2 + 1 + K  # x of the first layer in two sweeps; x and tx of the head
    assert found.shapes[ROWS, CLASSES] == K + 1  # tdz and dz
    assert error <= ROUNDINGS * UNIT


@pytest.mark.parametrize("precision", ["full", "bf16"])
@pytest.mark.parametrize("operator", [fc.Hessian, fc.GGN])
def test_a_head_in_several_pieces(precision: str, operator: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """So little memory that its rows go in four pieces, the last one shorter; with much they go in one."""
    monkeypatch.setattr("flatcore.capture.fuse.LEAST_CLASSES", 2)
    rows, classes = 450, 512
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, classes)).double()
    x, y = torch.randn(rows, 8, dtype=torch.float64), torch.randint(classes, (rows,))

    def of(dtype: torch.dtype, **options: Any) -> fc.Objective:
        batch = (x.to(HERE, dtype), y.to(HERE))
        return fc.Objective(copy.deepcopy(model).to(HERE, dtype), nn.CrossEntropyLoss(), batch, **options)

    exact = operator(of(torch.float64))
    V = torch.randn(exact.shape[0], K, dtype=torch.float64).to(HERE)
    truth = exact @ V
    kept = {}
    for memory in (1 << 20, 1 << 30):
        A = operator(of(torch.float32, memory=memory), precision=precision)
        error = float((A @ V.float() - truth).norm() / truth.norm())
        # In full precision a sum over WIDTH terms may lose as many units of rounding.
        assert error <= ROUNDINGS * (UNIT if precision == "bf16" else WIDTH * torch.finfo(torch.float32).eps)
        kept[memory] = A.plan().state_bytes
    assert kept[1 << 30] - kept[1 << 20] >= 4 * rows * classes  # the probabilities

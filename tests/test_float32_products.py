"""torch's settings for float32 on a GPU: set while a product runs, then as they were. Settings need no GPU."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatcore as fc
from flatcore import measures
from flatcore._C import engine
from flatcore.environment import full_float32
from flatcore.evaluate import plain_torch
from flatcore.report.autograd_loop import AutogradLoop
from flatcore.report.fit import fit

MATMUL, CONV, RNN = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def settings() -> dict[str, Any]:
    return {
        "matmul": MATMUL.fp32_precision,
        "convolution": CONV.fp32_precision,
        "recurrent": RNN.fp32_precision,
        "matmul, by its old name": torch.backends.cuda.matmul.allow_tf32,
        "old name": torch.get_float32_matmul_precision(),
        "cudnn, by its old name": torch.backends.cudnn.allow_tf32,
    }


def leave(name: str) -> None:
    if name in ("high", "medium"):
        torch.set_float32_matmul_precision(name)
    elif name == "exact convolutions":
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


USERS = ["default", "high", "medium", "exact convolutions"]


@pytest.mark.parametrize("precision", ["full", "tf32", "bf16"])
@pytest.mark.parametrize("user", USERS)
def test_set_and_put_back(user: str, precision: str) -> None:
    leave(user)
    before = settings()
    rounds = precision != "full"
    with engine.Float32Products("cuda:0", precision):
        inside = settings()  # torch's getters throw where its old and new settings differ
        assert (inside["matmul"] == "tf32") == rounds == inside["matmul, by its old name"]
        assert (inside["convolution"] == "tf32") == rounds == inside["cudnn, by its old name"]
        with engine.Float32Products("cuda:0", "full"):
            assert settings()["convolution"] != "tf32"
        assert settings() == inside
        with torch.backends.cudnn.flags(enabled=True):
            pass
    assert settings() == before


@pytest.mark.parametrize("surrounding", [plain_torch, full_float32])
@pytest.mark.parametrize("user", USERS)
def test_evaluations_are_in_full(user: str, surrounding: Callable[[torch.device], Any]) -> None:
    leave(user)
    before = settings()
    with surrounding(torch.device("cuda:0")):
        inside = settings()
        assert "tf32" not in inside.values()
        assert not inside["matmul, by its old name"]
        assert not inside["cudnn, by its old name"]
    assert settings() == before


class Watched(nn.Module):
    """Notes how convolutions are set to round wherever it is evaluated, or differentiated. It has no program."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.seen: set[str] = set()

    def note(self, _: Any = None) -> None:
        self.seen.add(str(CONV.fp32_precision))

    def forward(self, x: Tensor) -> Tensor:
        self.note()
        y = torch.tanh(self.convolution(x)).flatten(1)
        if y.requires_grad:
            y.register_hook(self.note)
        return self.linear(y) if float(x.sum()) < 1e30 else y  # no program decides by a number


def rows_of(objective: fc.Objective) -> list[Tensor]:
    return [unit.rows() for unit in fc.GGN(objective).output_rows().units()]


def ones(objective: fc.Objective) -> Tensor:
    return torch.ones(objective.layout.size, 1)


EVALUATIONS: dict[str, Callable[[fc.Objective], Any]] = {
    "loss": lambda o: o.loss(),
    "Hessian": lambda o: fc.Hessian(o) @ ones(o),
    "GGN": lambda o: fc.GGN(o) @ ones(o),
    "covariance": lambda o: fc.GradientCovariance(o) @ ones(o),
    "plan": lambda o: fc.Hessian(o).plan(),
    "rows of the outputs": rows_of,
    "extent of the rows": lambda o: fc.GGN(o).output_rows().extent,
    "fit": fit,
    "autograd loop": lambda o: AutogradLoop(o) @ ones(o),
    "SAM": measures.sam_sharpness,
    "adaptive sharpness": lambda o: measures.adaptive_sharpness_worst(o, 0.1, steps=2),
    "its average": lambda o: measures.adaptive_sharpness_average(o, 0.1, draws=2),
    "LPF": lambda o: measures.lpf(o, draws=2),
    "Fisher-Rao": measures.fisher_rao,
    "local energy": lambda o: measures.local_energy(o, draws=2),
    "local entropy": lambda o: measures.local_entropy(o, 10.0, 1.0, steps=40),
}


class Ordered:
    """In place of ONE_AT_A_TIME: two threads would wait for each other where both locks are not taken in one order."""

    def __init__(self) -> None:
        self.lock, self.guards = threading.RLock(), 0

    def __enter__(self) -> None:
        assert not self.guards or self.lock._is_owned()  # type: ignore[attr-defined]
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    @contextlib.contextmanager
    def full_float32(self, device: torch.device) -> Iterator[None]:
        """As if the CPU were a GPU."""
        with engine.Float32Products("cuda:0"):
            self.guards += 1
            try:
                yield
            finally:
                self.guards -= 1


@pytest.mark.parametrize("evaluation", EVALUATIONS.values(), ids=EVALUATIONS)
@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
def test_every_evaluation_is_in_full(
    evaluation: Callable[[fc.Objective], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's default lets convolutions round."""
    order = Ordered()
    for name in ("environment", "data", "native"):
        monkeypatch.setattr(f"flatcore.{name}.ONE_AT_A_TIME", order)
    for name in ("evaluate", "operators", "report.autograd_loop"):
        monkeypatch.setattr(sys.modules[f"flatcore.{name}"], "full_float32", order.full_float32)
    torch.manual_seed(0)
    model = Watched()
    objective = fc.Objective(model, nn.CrossEntropyLoss(), (torch.randn(4, 1, 4, 4), torch.randint(3, (4,))))
    assert model.seen == {"ieee"}
    model.seen.clear()
    with torch.no_grad():
        model.linear.bias.add_(1.0)  # what is known of the parameters before is not taken
    evaluation(objective)
    assert model.seen == {"ieee"}
    model.note()
    assert model.seen == {"ieee", "tf32"}


def test_nothing_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    with engine.Float32Products("cpu", "tf32"):
        assert settings() == before
    monkeypatch.setattr("flatcore.environment.engine", None)
    torch.manual_seed(0)
    objective = fc.Objective(
        nn.Linear(3, 2), nn.CrossEntropyLoss(), (torch.randn(5, 3), torch.randint(2, (5,)))
    )
    fc.GradientCovariance(objective) @ ones(objective)
    fc.GradientCovariance(objective).quadratic_form(ones(objective))
    objective.loss()

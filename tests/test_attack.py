"""Uses that once gave a wrong number or a bare error: threads, modes of torch, loaders, changes in place."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Reference
from torch import Tensor, nn
from untouched import one_thread, untouched

import flatcore as fc

__all__ = ["one_thread"]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

CE = nn.CrossEntropyLoss()
OPERATORS = [fc.Hessian, fc.GGN, fc.GradientCovariance]
RTOL = 1e-10  # float64 against torch.func: both are backward stable


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


class Foreign(nn.Module):
    """A model that has no program."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = mlp(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(1 + self.inner(x), 1)


def batch(n: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (n,), generator=generator)


def joined(*batches: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def close(found: Tensor, truth: Tensor) -> None:
    assert (found - truth).norm() <= RTOL * truth.norm()


def hessian(model: nn.Module, loss: Callable[..., Tensor], data: tuple[Tensor, ...]) -> Tensor:
    return Reference(model, loss, data, "output_target").hessian()


# --- modes of torch ---


@pytest.mark.parametrize("make", [mlp, Foreign])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mode", ["inference", "no_grad", "autocast"])
def test_modes_of_torch_change_no_number(make: Callable[..., nn.Module], operator: Any, mode: str) -> None:
    around = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[mode]
    model, data = make(torch.float32), batch(dtype=torch.float32)
    V = torch.randn(51, 3)
    truth = operator(fc.Objective(model, CE, data)) @ V
    with around():
        inside = operator(fc.Objective(model, CE, data)) @ V
    assert torch.equal(inside, truth)


def test_estimators_ignore_autocast() -> None:
    A = torch.randn(90, 90, generator=torch.Generator().manual_seed(0))
    A = A + A.T

    def numbers() -> list[np.ndarray]:
        return [
            fc.eigsh(A, 3, tol=1e-4).values.numpy(),
            fc.spectral_density(A, probes=2, steps=8).nodes,
            fc.diagonal(A, method="hutchinson", max_matvecs=16).value.numpy(),
        ]

    truth = numbers()
    with torch.autocast("cpu", torch.bfloat16):
        inside = numbers()
    for a, b in zip(inside, truth, strict=True):
        assert np.array_equal(a, b)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, data = mlp(), batch()
    close(fc.Hessian(fc.Objective(model, CE, data)).to_dense(), hessian(mlp(), CE, batch()))


# --- threads ---


@pytest.mark.parametrize("make", [mlp, Foreign])
def test_several_threads_with_one_model(make: Callable[[], nn.Module]) -> None:
    model, data = make(), batch()
    truth = fc.Hessian(fc.Objective(model, CE, data)).to_dense()
    shared = fc.Hessian(fc.Objective(model, CE, data))
    found: list[Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            found.append(shared.to_dense())
            found.append(fc.Hessian(fc.Objective(model, CE, data)).to_dense())
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # switch often
    try:
        with untouched(model, *data):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert len(found) == 8
    assert all(torch.equal(a, truth) for a in found)


# --- loaders and batches ---


class Refilling:
    """A loader that fills the same two tensors for every batch."""

    def __init__(self) -> None:
        self.source = [batch(5), batch(5)[::1], batch(5)]
        self.source = [(x * (i + 1), y.roll(i)) for i, (x, y) in enumerate(self.source)]
        self.memory = np.empty((5, 4))
        self.x, self.y = torch.from_numpy(self.memory), torch.empty(5, dtype=torch.long)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.source:
            self.memory[...] = x.numpy()
            self.y.copy_(y)
            yield self.x, self.y


@pytest.mark.parametrize("memory", [None, 8000])  # held, and read again on every pass
def test_a_loader_that_fills_the_same_tensors_again(memory: int | None) -> None:
    loader, model = Refilling(), mlp()
    H = fc.Hessian(fc.Objective(model, CE, loader, memory=memory))
    truth = hessian(model, CE, joined(*loader.source))
    close(H.to_dense(), truth)
    close(H.to_dense(), truth)


class Factor:
    """Two of them print alike."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Factor()"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, factor: Any) -> Tensor:
        return self.inner(x) * (factor.value if isinstance(factor, Factor) else torch.from_numpy(factor))


@pytest.mark.parametrize("make", [Factor, lambda value: np.full((9, 3), value)])
def test_batches_that_differ_in_what_is_no_tensor(make: Callable[[float], Any]) -> None:
    model, (x, y) = Scaled(), batch()
    H = fc.Hessian(fc.Objective(model, CE, [(x, make(1.0), y), (x, make(3.0), y)]))
    truth = sum(hessian(model, CE, (x, make(value), y)) / 2 for value in (1.0, 3.0))  # type: ignore[arg-type]
    close(H.to_dense(), truth)


# --- changes in place ---


def test_changed_class_weights_change_what_batches_count() -> None:
    model, loss, data = mlp(), nn.CrossEntropyLoss(torch.ones(3).double()), [batch(9), batch(2)]
    objective = fc.Objective(model, loss, data)
    H = fc.Hessian(objective)
    H.to_dense()
    loss.weight.copy_(torch.tensor([5.0, 1.0, 0.1]))
    close(H.to_dense(), hessian(model, loss, joined(*data)))
    whole = joined(*data)
    assert objective.loss() == pytest.approx(float(loss(model(whole[0]), whole[1])), rel=1e-12)


@pytest.mark.parametrize("ignored", [7, 9])
def test_changed_targets_change_what_batches_count(ignored: int) -> None:
    model, data = mlp(), [batch(9), batch(2)]
    objective = fc.Objective(model, CE, data)
    H = fc.Hessian(objective)
    H.to_dense()
    data[0][1][:ignored] = -100
    close(H.to_dense(), hessian(model, CE, joined(*data)))
    data[0][1][:] = -100
    data[1][1][:] = -100
    with pytest.raises(ValueError, match="data: expected at least one target"):
        H.to_dense()
    with pytest.raises(ValueError, match="data: expected at least one target"):
        objective.loss()


def test_a_changed_tensor_of_a_closure_is_seen_by_products() -> None:
    model, factor, (x, _) = mlp(), torch.tensor(1.0), batch()
    target = torch.ones(9, 3, dtype=torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output * factor, target)

    H = fc.Hessian(fc.Objective(model, loss, (x, target)))
    H.to_dense()
    factor.mul_(2)
    close(H.to_dense(), hessian(model, loss, (x, target)))


def test_a_model_moved_to_another_precision_is_refused() -> None:
    model = mlp(torch.float32)
    H = fc.Hessian(fc.Objective(model, CE, batch(dtype=torch.float32)))
    H @ torch.ones(51)
    model.double()
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=r"model: expected parameters of torch\.float32.*make a new"):
            H @ torch.ones(51, dtype=dtype)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3)

    def forward(self, i: Tensor) -> Tensor:
        return self.last(self.table(i).mean(1))


@pytest.mark.parametrize("params", [None, "last.*"])
def test_a_model_that_changes_its_parameters_is_refused_and_left_alone(params: str | None) -> None:
    torch.manual_seed(0)
    model, data = Lookup(), (torch.randint(0, 7, (9, 5)), batch()[1])
    with (
        untouched(model, *data),
        pytest.raises(ValueError, match=r"model: expected a forward pass.*'table\.weight'"),
    ):
        fc.Objective(model, CE, data, params)
    model(data[0])
    with untouched(model, *data), warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.errors.FlatcoreWarning)
        fc.Hessian(fc.Objective(model, CE, data, "last.*")).to_dense()


# --- programs that cannot be run ---


class ScalarBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(3, 4).double()),
            nn.Parameter(torch.ones(()).double()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).tanh()


class Bottleneck(nn.Module):
    """An inner dimension of size zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4, 0).double()), nn.Parameter(torch.ones(0, 3).double())
        self.c = nn.Parameter(torch.randn(3).double())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b + self.c


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).double() + 5 * torch.eye(4).double())

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.inv(self.weight)


class Selecting(nn.Module):
    """The number of rows it keeps depends on the numbers in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[x[:, 0] > -9]


@pytest.mark.parametrize("make", [ScalarBias, Bottleneck, Inverse, Selecting])
def test_a_program_that_does_not_run_leaves_it_to_autograd(make: Callable[[], nn.Module]) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.errors.FlatcoreWarning)
        close(fc.Hessian(fc.Objective(model, CE, batch())).to_dense(), hessian(model, CE, batch()))


# --- vectors ---


class Odd(nn.Module):
    """A parameter without axes and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.none = nn.Parameter(torch.ones(()).double()), nn.Parameter(torch.ones(2, 0).double())
        self.shift = nn.Parameter(torch.randn(4, 1).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x + self.shift.T) + self.none.sum()


@pytest.mark.parametrize("columns", [(), (0,), (1,), (3,)])
def test_dict_vectors_of_parameters_without_axes_or_elements(columns: tuple[int, ...]) -> None:
    model = Odd()
    H = fc.Hessian(fc.Objective(model, CE, batch()))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    V = {name: torch.randn((*p.shape, *columns)).double() for name, p in model.named_parameters()}

    def flat(parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([part.reshape(sizes[name], *columns) for name, part in parts.items()])

    found = H @ V
    assert {name: part.shape for name, part in found.items()} == {name: v.shape for name, v in V.items()}
    close(flat(found), hessian(model, CE, batch()) @ flat(V))


# --- arguments ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda A: fc.eigsh(A, 2, tol=None), "tol: expected a positive number, got None"),  # type: ignore[arg-type]
        (lambda A: fc.eigsh(A, 2, tol="a"), "tol: expected a positive number, got 'a'"),  # type: ignore[arg-type]
        (lambda A: fc.trace(A, rtol=None), "rtol: expected a positive number, got None"),  # type: ignore[arg-type]
        (lambda A: fc.eigsh(A, 2, v0="a"), "v0: expected a torch.Tensor, got str"),  # type: ignore[arg-type]
        (lambda A: fc.Objective(mlp(), fc.hf_loss, batch()), "loss: expected hf_loss()"),  # type: ignore[arg-type]
        (lambda A: fc.Objective(mlp(), fc.ModelLoss(3), batch()), "loss: expected ModelLoss of a callable"),  # type: ignore[arg-type]
        (
            lambda A: fc.Hessian(fc.Objective(mlp(), CE, batch())).to_scipy() @ (1j * np.ones(51)),
            "V: expected real numbers, got complex128",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(TypeError) as caught:
        call(torch.eye(5))
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)

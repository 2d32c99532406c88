"""Objective: forms of data, weights of batches, selection of parameters, and what happens when things change."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_operators import PROBLEMS, assert_close, build, joined, reference
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from untouched import one_thread, untouched

import flatcore as fc
from flatcore.errors import FlatcoreWarning

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = 1000  # bytes: not even the smallest data set is held


def dense(objective: fc.Objective) -> Tensor:
    return fc.Hessian(objective).to_dense()


class Reiterable:
    """A loader of the plainest kind."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield from self.batches


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("memory", [SMALL, None])
def test_loss_is_the_mean_over_all_examples(name: str, memory: int | None) -> None:
    model, loss, batches = build(name)
    x, y = joined(batches)
    expected = loss(model(x), y).item()
    for data in (batches, Reiterable(batches), (x, y), [(x, y)]):
        objective = fc.Objective(model, loss, data, memory=memory)
        assert objective.loss() == pytest.approx(expected, rel=1e-12)
        assert objective.examples == len(x)


def test_a_loader_is_held_where_it_fits_and_read_again_where_not() -> None:
    model, loss, batches = build("mlp-ce")
    expected = reference(fc.Hessian, model, loss, joined(batches))
    held, again = Reiterable(batches), Reiterable(batches)
    assert_close(dense(fc.Objective(model, loss, held)), expected)
    assert held.passes == 1
    assert_close(dense(fc.Objective(model, loss, again, memory=SMALL)), expected)
    assert again.passes > 2


@pytest.mark.parametrize("own_generator", [True, False])
def test_a_shuffling_loader_repeats_and_leaves_generators_alone(own_generator: bool) -> None:
    model, loss, batches = build("mlp-ce")
    generator = torch.Generator().manual_seed(1) if own_generator else None
    loader = DataLoader(TensorDataset(*joined(batches)), batch_size=3, shuffle=True, generator=generator)
    before = generator.get_state() if generator else None
    with untouched(model):
        objective = fc.Objective(model, loss, loader, memory=SMALL)
        V = torch.ones(objective.layout.size, 2, dtype=torch.float64)
        H = fc.Hessian(objective)
        assert torch.equal(H @ V, H @ V)
        assert_close(H @ V, reference(fc.Hessian, model, loss, joined(batches)) @ V)
    if generator:
        assert torch.equal(generator.get_state(), before)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Noise from all three generators, drawn anew each time an example is read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4) + np.random.rand() + random.random()  # noqa: NPY002
        return self.x[i] + noise, self.y[i]


def test_random_augmentation_repeats_in_every_pass() -> None:
    """The passes see what one pass with the generators as they stood would have seen."""

    def seed() -> None:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)

    model, loss, batches = build("mlp-ce")
    loader = DataLoader(Augmented(*joined(batches)), batch_size=4)
    seed()
    expected = reference(fc.Hessian, model, loss, joined([(x, y) for x, y in loader]))
    seed()
    with untouched(model):
        objective = fc.Objective(model, loss, loader, memory=SMALL)
    torch.manual_seed(4)
    with untouched(model):
        assert_close(dense(objective), expected)
        assert_close(dense(objective), expected)


class Inconsiderate(nn.Module):
    """Writes into its input, its buffer and its own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last_input = x
        return self.linear(x.mul_(0.5).tanh_())


def test_what_a_model_writes_reaches_nobody() -> None:
    _, loss, batches = build("mlp-ce")
    model = Inconsiderate().double()
    with warnings.catch_warnings(), untouched(model, *(t for batch in batches for t in batch)):
        warnings.simplefilter("ignore", FlatcoreWarning)
        A = fc.Hessian(fc.Objective(model, loss, batches))
        result = A.to_dense()
        result = A.to_dense()

    x, y = joined(batches)
    plain = nn.Sequential(nn.Tanh(), model.linear)
    assert_close(result, reference(fc.Hessian, plain, loss, (x * 0.5, y)))


def test_batches_without_a_counted_target_count_nothing() -> None:
    model, _, batches = build("mlp-ignore")
    x = torch.randn(3, 4, dtype=torch.float64)
    with_empty = [batches[0], (x, torch.full((3,), -100)), *batches[1:]]
    assert_close(
        dense(fc.Objective(model, F.cross_entropy, with_empty)),
        dense(fc.Objective(model, F.cross_entropy, batches)),
    )


def test_batches_of_other_loss_functions_count_by_examples() -> None:
    model, _, batches = build("mlp-ce")

    def penalised(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + 0.1 * z.square().mean()

    objective = fc.Objective(model, penalised, batches)
    assert objective.weights == pytest.approx([len(x) / objective.examples for x, _ in batches])
    assert_close(dense(objective), reference(fc.Hessian, model, penalised, joined(batches)))


def test_one_example_without_a_batch_axis() -> None:
    model, loss, batches = build("mlp-ce")
    x, y = joined(batches)
    assert_close(
        fc.GradientCovariance(fc.Objective(model, loss, (x[0], y[0])), centered=False).to_dense(),
        fc.GradientCovariance(fc.Objective(model, loss, (x[:1], y[:1])), centered=False).to_dense(),
    )


SELECTIONS: list[tuple[object, list[str]]] = [
    (None, ["0.weight", "0.bias", "4.weight", "4.bias"]),
    ("4.weight", ["4.weight"]),
    (["4.bias", "0.weight"], ["0.weight", "4.bias"]),
    ("*.bias", ["0.bias", "2.bias", "4.bias"]),
    (["0.*", "4.bias"], ["0.weight", "0.bias", "4.bias"]),
    (lambda name, p: p.dim() == 2, ["0.weight", "2.weight", "4.weight"]),
    ("2.weight", ["2.weight"]),
]


@pytest.mark.parametrize(("params", "names"), SELECTIONS)
def test_selection_is_a_block_of_the_whole(params: object, names: list[str]) -> None:
    model, loss, batches = build("mlp-ce")
    whole = fc.Hessian(fc.Objective(model, loss, batches))
    model[2].requires_grad_(False)
    chosen = fc.Hessian(fc.Objective(model, loss, batches, params))
    assert list(chosen.parameter_slices) == names
    where = torch.cat(
        [
            torch.arange(len(flat))[s]
            for flat in [whole.to_dense()]
            for s in map(whole.parameter_slices.get, names)
        ]
    )
    assert_close(chosen.to_dense(), whole.to_dense()[where][:, where])


def test_a_shared_parameter_answers_to_all_its_names() -> None:
    model, loss, batches = build("tied-ce")
    assert list(fc.Objective(model, loss, batches, "again.weight").parameter_slices) == ["first.weight"]
    assert list(fc.Objective(model, loss, batches, "again.*").parameter_slices) == [
        "first.weight",
        "first.bias",
    ]


def in_place(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(0.1)


def through_data(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    next(model.parameters()).data.mul_(1.5)


def new_storage(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    parameter = next(model.parameters())
    parameter.data = torch.randn_like(parameter)


def new_parameter(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))


def loaded(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def optimised(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    x, y = batches[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def data_in_place(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    batches[1][0].mul_(2)


def other_module(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    model[1] = nn.Sigmoid()


CHANGES: list[Callable[[nn.Module, list[tuple[Tensor, Tensor]]], None]] = [
    in_place,
    through_data,
    new_storage,
    new_parameter,
    loaded,
    optimised,
    data_in_place,
    other_module,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("operator", [fc.Hessian, fc.GradientCovariance])
def test_after_a_change_the_products_are_those_of_the_new_point(
    change: Callable[[nn.Module, list[tuple[Tensor, Tensor]]], None], operator: type
) -> None:
    model, loss, batches = build("mlp-ce")
    objective = fc.Objective(model, loss, batches)
    A = operator(objective)
    before, loss_before = A.to_dense(), objective.loss()
    change(model, batches)
    after = reference(operator, model, loss, joined(batches))
    assert (before - after).abs().max() > 1e-3 * after.abs().max()
    assert_close(A.to_dense(), after)
    x, y = joined(batches)
    assert objective.loss() == pytest.approx(loss(model(x), y).item(), rel=1e-12)
    assert objective.loss() != loss_before


def test_a_changed_buffer_is_seen() -> None:
    model, loss, batches = build("cnn-ce")
    H = fc.Hessian(fc.Objective(model, loss, batches))
    H.to_dense()
    model[2].running_var.mul_(3)
    assert_close(H.to_dense(), reference(fc.Hessian, model, loss, joined(batches)))


def test_the_state_is_kept_between_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatcore import native

    model, loss, batches = build("mlp-ce")
    objective = fc.Objective(model, loss, batches)
    V = torch.ones(objective.layout.size, dtype=torch.float64)
    fc.Hessian(objective) @ V
    monkeypatch.setattr(native.NativeBackend, "_linearize", None)  # would raise if it were called
    fc.Hessian(objective) @ V
    fc.GGN(objective) @ V


def test_a_compiled_module_counts_as_the_module_inside() -> None:
    model, loss, batches = build("mlp-ce")
    assert fc.Objective(torch.compile(model), loss, batches).model is model

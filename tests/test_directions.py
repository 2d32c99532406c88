"""Directions in pieces, and what happens where memory runs out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatcore as fc
from flatcore._C import engine
from flatcore.backend import native_backend
from flatcore.directions import Directions
from flatcore.example_sweeps import ExampleSweeps, sweeps_for
from flatcore.native import NativeBackend

CPU = torch.device("cpu")


def test_as_many_as_fit() -> None:
    directions = Directions([lambda K: 10 * K, lambda K: 30 * K], limit=100, device=CPU)
    assert directions.most == 3
    assert [(p.start, p.stop) for p in directions.pieces(7)] == [(0, 2), (2, 4), (4, 7)]


def test_one_at_least() -> None:
    assert Directions([lambda K: 10 * K], limit=5, device=CPU).most == 1


class Device:
    """Has room for so many directions at once, and for all the more where what is held was released."""

    def __init__(self, room: int, held: int = 0) -> None:
        self.room, self.held, self.widths = room, held, []

    def run(self, pieces: list[slice]) -> int:
        widest = max(p.stop - p.start for p in pieces)
        self.widths.append(widest)
        if widest > self.room - self.held:
            raise torch.OutOfMemoryError("no memory")
        return sum(p.stop - p.start for p in pieces)

    def release(self) -> bool:
        held, self.held = self.held, 0
        return held > 0


def test_half_as_many_until_it_works() -> None:
    directions, device = Directions([lambda K: K], 100, CPU), Device(room=3)
    assert directions.run(16, device.run, device.release, [8]) == 16
    assert device.widths == [16, 8, 4, 2]
    assert directions.run(16, device.run, device.release, [8]) == 16  # known from now on
    assert device.widths == [16, 8, 4, 2, 2]


@pytest.mark.parametrize(("K", "widths"), [(16, [16, 8, 4, 2]), (9, [9, 3]), (7, [7, 3])])
def test_those_that_must_go_together(K: int, widths: list[int]) -> None:
    """Pieces of two at least, so of three at most where the number is odd."""
    directions, device = Directions([lambda K: K], 100, CPU, "a sweep", least=2), Device(room=0)
    with pytest.raises(
        torch.OutOfMemoryError, match=rf"out of memory for a sweep with {widths[-1]} directions, "
    ):
        directions.run(K, device.run, device.release, [8])
    assert device.widths == widths
    assert all(p.stop - p.start >= 2 for p in directions.pieces(K))


def test_held_memory_goes_first() -> None:
    directions, device = Directions([lambda K: K], 100, CPU), Device(room=4, held=1)
    assert directions.run(4, device.run, device.release, [8]) == 4
    assert device.widths == [4, 4]


def test_what_is_held_again_is_not_released_for_ever() -> None:
    """A product that is done again may record what was given back for it."""
    directions, device = Directions([lambda K: K], 100, CPU), Device(room=1)
    assert directions.run(4, device.run, lambda: True, [8]) == 4
    assert device.widths == [4, 4, 4, 2, 2, 2, 1]


def test_not_even_one() -> None:
    directions, device = Directions([lambda K: 1 << 50], 100, CPU), Device(room=0)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"^cpu: out of memory for a product with one direction, whose buffers take 1048576.0 GiB while .* are "
        r"free; batches of about 1 examples instead of 8 would fit",
    ):
        directions.run(4, device.run, device.release, [8])


def test_a_product_finishes_with_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two batches runs out of memory, after the first was added: nothing counts twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(2, (n,))) for n in (5, 6)]
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), data))
    V = torch.randn(H.shape[0], 6, dtype=torch.float64)
    expected, form = H @ V, H.quadratic_form(V)
    run = NativeBackend._product

    def crowded(self: NativeBackend, state, batch, V, Y, mode, accumulate, *rest) -> None:
        if accumulate and V.shape[0] > 2:
            Y.add_(1.0)  # what a product writes before it fails
            raise torch.OutOfMemoryError("no memory")
        run(self, state, batch, V, Y, mode, accumulate, *rest)

    monkeypatch.setattr(NativeBackend, "_product", crowded)
    assert torch.equal(H @ V, expected) or torch.allclose(H @ V, expected, rtol=1e-13, atol=1e-15)
    assert H.plan().directions <= 2
    torch.testing.assert_close(H.quadratic_form(V), form, rtol=1e-13, atol=1e-15)


def test_states_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), (torch.randn(5, 3), torch.randint(2, (5,)))))
    v = torch.randn(H.shape[0])
    expected, failures = H @ v, []
    run = NativeBackend._product

    def crowded(self: NativeBackend, state, *rest) -> None:
        if self._states:
            failures.append(1)
            raise torch.OutOfMemoryError("no memory")
        run(self, state, *rest)

    monkeypatch.setattr(NativeBackend, "_product", crowded)
    torch.testing.assert_close(H @ v, expected, rtol=0, atol=0)
    assert failures == [1]
    torch.testing.assert_close(H @ v, expected, rtol=0, atol=0)
    assert failures == [1]


class Crowded:
    """In place of a sweep of the engine: has room for so many directions where nothing else is held, and in the second
    batch; what it adds before it fails must not count."""

    def __init__(self, sweep: Callable[..., None], backend: NativeBackend, room: int, place: int) -> None:
        self.sweep, self.backend, self.room, self.place = sweep, backend, room, place
        self.widths: list[int] = []

    def __call__(self, state: engine.Linearization, *arguments: Any) -> None:
        sums = arguments[self.place]
        self.widths.append(len(sums))
        self.sweep(state, *arguments)
        if sums.shape[-1] == 6 and (self.backend._states or len(sums) > self.room):
            raise torch.OutOfMemoryError("no memory")


@pytest.fixture
def two_batches() -> fc.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    data = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(5, (n,))) for n in (5, 6)]
    return fc.Objective(model, nn.CrossEntropyLoss(), data)


def crowded_sweeps(
    objective: fc.Objective, monkeypatch: pytest.MonkeyPatch, name: str, room: int
) -> tuple[ExampleSweeps, Crowded]:
    """After a product, whose states are held."""
    sweeps, backend = sweeps_for(objective, objective.snapshot()), native_backend(objective)
    assert isinstance(sweeps, ExampleSweeps)
    assert isinstance(backend, NativeBackend)
    fc.GGN(objective) @ torch.ones(objective.layout.size, dtype=torch.float64)
    assert backend._states
    place = {"example_pass": 1, "output_pass": 2}[name]
    crowded = Crowded(getattr(engine.Linearization, name), backend, room, place)
    monkeypatch.setattr(engine.Linearization, name, lambda state, *rest: crowded(state, *rest))
    return sweeps, crowded


def assert_same(a: Any, b: Any) -> None:
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("mode", "name"), [("hessian", "example_pass"), ("remainder", "example_pass"), ("ggn", "output_pass")]
)
def test_probes_finish_with_fewer(
    mode: Any, name: str, two_batches: fc.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(sweeps: ExampleSweeps) -> list[Tensor]:
        samples = sweeps.probe(mode, two_batches.snapshot(), 1, 3, 8)
        return [samples.mean, samples.variance, samples.fourth]

    expected = probe(sweeps_for(two_batches, two_batches.snapshot()))
    sweeps, crowded = crowded_sweeps(two_batches, monkeypatch, name, room=2)
    assert_same(probe(sweeps), expected)
    # The states of products go first; the first batch has room for all directions.
    assert crowded.widths == [8, 8, 8, 8, 4, 4, 4] + 8 * [2]
    assert_same(probe(sweeps), expected)
    assert crowded.widths[15:] == 8 * [2]


def test_a_diagonal_finishes_with_fewer(two_batches: fc.Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its probes go together, whose spread is the variance: as two rounds of two, where four do not fit."""
    at = two_batches.snapshot()
    sweeps = sweeps_for(two_batches, at)
    rounds = [sweeps.probe("hessian", at, 1, first, 2, diagonal=True) for first in (3, 5)]
    sweeps, crowded = crowded_sweeps(two_batches, monkeypatch, "example_pass", room=2)
    found = sweeps.probe("hessian", at, 1, 3, 4, diagonal=True)
    assert crowded.widths[-4:] == 4 * [2]
    mean = sum(one.diagonal for one in rounds) / 2
    assert_same(
        [found.diagonal, found.diagonal_variance], [mean, sum(one.diagonal_variance for one in rounds) / 4]
    )


@pytest.mark.parametrize("exact", ["exact_ggn", "exact_covariance"])
def test_exact_sums_finish_with_fewer(
    exact: str, two_batches: fc.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(sweeps: ExampleSweeps) -> Any:
        return getattr(sweeps, exact)(two_batches.snapshot(), diagonal=True)

    expected = found(sweeps_for(two_batches, two_batches.snapshot()))
    sweeps, crowded = crowded_sweeps(two_batches, monkeypatch, "output_pass", room=2)
    assert_same(found(sweeps), expected)
    # Of a cross-entropy with 5 classes each class is an output.
    once = {"exact_ggn": [5, 5, 5, 5, 1, 2, 2, 1, 2, 2], "exact_covariance": [1, 1, 1, 1]}[exact]
    assert crowded.widths == once


@pytest.mark.parametrize(("diagonal", "fewest"), [(False, "one direction"), (True, "2 directions")])
def test_not_even_one_probe(
    diagonal: bool, fewest: str, two_batches: fc.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps, _ = crowded_sweeps(two_batches, monkeypatch, "example_pass", room=0)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=rf"^cpu: out of memory for a sweep over the examples with {fewest}, whose buffers take .* while .* are "
        "free; ",
    ):
        sweeps.probe("hessian", two_batches.snapshot(), 0, 0, 4, diagonal=diagonal)

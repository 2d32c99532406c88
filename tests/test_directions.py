"""Directions in pieces, and what happens where memory runs out."""

import pytest
import torch
from torch import nn

import flatcore as fc
from flatcore.directions import Directions
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


def test_held_memory_goes_first() -> None:
    directions, device = Directions([lambda K: K], 100, CPU), Device(room=4, held=1)
    assert directions.run(4, device.run, device.release, [8]) == 4
    assert device.widths == [4, 4]


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

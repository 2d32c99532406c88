"""Recorded products: what is copied where, and when a product is recorded. A recorder on the CPU stands in for CUDA."""

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import flatcore as fc
from flatcore.backend import backend_for
from flatcore.graphs import MOST_GRAPHS, Graphs, pays
from flatcore.native import NativeBackend

CPU = torch.device("cpu")


class Recorder:
    """Repeats the work it was given: between the same tensors, as a graph does."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_product_of_the_vectors_given(accumulate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    recorder = Recorder()
    graphs = Graphs(CPU, recorder)

    def launch(V: Tensor, Y: Tensor) -> None:
        Y.copy_(V @ A)

    for repeat in range(4):
        # Directions of a larger matrix, as a piece of many directions is.
        V = torch.randn(3, 9, generator=generator, dtype=torch.float64)[:, :7]
        before = torch.randn(3, 7, generator=generator, dtype=torch.float64)
        Y = before.clone()
        graphs.run("product", launch, V, Y, accumulate)
        assert torch.equal(Y, before + V @ A if accumulate else V @ A)
        assert (recorder.captured, recorder.replayed) == (min(repeat, 1), repeat)


def test_each_kind_of_product_has_its_own() -> None:
    recorder = Recorder()
    graphs = Graphs(CPU, recorder)
    factors = {"hessian": 2.0, "ggn": 3.0}
    for _ in range(3):
        for name, factor in factors.items():
            for K in (1, 2):
                V, Y = torch.ones(K, 5), torch.empty(K, 5)

                def launch(rows: Tensor, into: Tensor, factor: float = factor) -> None:
                    into.copy_(rows * factor)

                graphs.run(name, launch, V, Y, False)
                assert torch.equal(Y, factor * V)
    assert recorder.captured == 4


def test_the_oldest_go() -> None:
    recorder = Recorder()
    graphs = Graphs(CPU, recorder)

    def launch(V: Tensor, Y: Tensor) -> None:
        Y.copy_(V)

    for K in range(1, MOST_GRAPHS + 2):
        for _ in range(2):
            graphs.run("product", launch, torch.ones(K, 1), torch.empty(K, 1), False)
    assert recorder.captured == MOST_GRAPHS + 1
    for K in (MOST_GRAPHS + 1, 1):  # the last is still there, the first is not
        graphs.run("product", launch, torch.ones(K, 1), torch.empty(K, 1), False)
    assert recorder.replayed == MOST_GRAPHS + 2


def test_not_on_the_cpu() -> None:
    assert not pays(torch.ones(1, 1))


def test_only_what_there_is_room_for() -> None:
    recorder = Recorder()
    graphs = Graphs(CPU, recorder)
    V, Y = torch.ones(1, 2), torch.empty(1, 2)
    size = 8 + 2 * 8  # of the work, and of the copies of V and Y
    for room in (size - 1, size - 1, size - 1, size, size, 0):
        graphs.run(
            "product", lambda rows, into: into.copy_(3 * rows), V, Y, False, lambda: 8, partial(int, room)
        )
        assert torch.equal(Y, 3 * V)
    assert (recorder.captured, recorder.replayed, graphs.bytes) == (1, 3, size)


def test_bytes_are_those_of_what_is_alive() -> None:
    """Product K holds K bytes and copies of V and Y, K floats each. Every third one cannot be recorded."""

    class Replay:
        def __init__(self, work: Callable[[], None], K: int) -> None:
            self.work, self.bytes = work, K + 2 * 4 * K

        def __call__(self) -> None:
            self.work()

    alive: weakref.WeakSet[Replay] = weakref.WeakSet()
    K = 0

    def capture(work: Callable[[], None], device: torch.device) -> Replay:
        replay = Replay(work, K)
        alive.add(replay)
        if K % 3 == 0:
            raise torch.OutOfMemoryError("no memory")
        return replay

    graphs = Graphs(CPU, capture)
    most = 0
    for K in range(1, 2 * MOST_GRAPHS):
        for _ in range(3):
            V, Y = torch.ones(K, 1), torch.empty(K, 1)
            graphs.run("product", lambda rows, into: into.copy_(3 * rows), V, Y, False, partial(int, K))
            assert torch.equal(Y, 3 * V)
            assert graphs.bytes == sum(replay.bytes for replay in alive)
            most = max(most, len(alive))
    assert most == MOST_GRAPHS


def test_bytes_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those given up, where memory runs out or the parameters change, leave nothing in the account."""
    monkeypatch.setattr("flatcore.native.pays", lambda V: True)
    monkeypatch.setattr("flatcore.native.Graphs", lambda device: Graphs(device, Recorder()))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(2, (n,))) for n in (5, 6)]
    objective = fc.Objective(model, nn.CrossEntropyLoss(), data)
    H, G = fc.Hessian(objective), fc.GGN(objective)
    backend = backend_for(objective, "hessian")
    assert isinstance(backend, NativeBackend)

    def recorded() -> int:
        return sum(graphs.bytes for _, graphs in backend._graphs.values())

    def held(A: fc.Hessian | fc.GGN, K: int) -> int:
        """A product of either batch with K directions, with copies of V and Y."""
        return 2 * (backend._directions_of(A.mode, "full").peak(K) + 2 * K * A.shape[0] * 8)

    expected = 0
    for A, K in ((H, 1), (H, 3), (G, 3)):
        V = torch.randn(A.shape[0], K, dtype=torch.float64)
        product = A @ V
        for _ in range(3):
            assert torch.equal(A @ V, product)
        expected += held(A, K)
        assert recorded() == expected
    assert backend._release()
    assert recorded() == 0
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    for _ in range(3):
        H @ V
    assert recorded() == held(H, 2)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    H @ V
    assert recorded() == 0

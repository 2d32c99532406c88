"""Recorded products: what is copied where, and when a product is recorded. A recorder on the CPU stands in for CUDA."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flatcore.graphs import MOST_GRAPHS, Graphs, pays

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
    for room in (7, 7, 7, 8, 8, 0):
        graphs.run("product", lambda rows, into: into.copy_(3 * rows), V, Y, False, 8, room)
        assert torch.equal(Y, 3 * V)
    assert (recorder.captured, recorder.replayed, graphs.bytes) == (1, 3, 8)

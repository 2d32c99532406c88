"""Products of small models on a GPU as CUDA graphs: their kernels take less time than launching them one by one.

A graph replays a product between the same addresses. So the vectors are copied in and the result is copied out, which
costs nothing beside the launches while both are small; larger products are launched as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Vectors and results up to this many bytes are copied: some 10 microseconds at 1 TB/s and more, the launches of two or
# three kernels. Counted, not measured.
LARGEST_BYTES = 1 << 23
# Each holds the buffers of its product.
MOST_GRAPHS = 16

Launch = Callable[[Tensor, Tensor], None]


class Capture(Protocol):
    """Runs ``work`` once or more, and returns what repeats it between the same addresses."""

    def __call__(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]: ...


def cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Follows torch's recipe: work of a warm-up on a stream of its own sets the libraries up, then one is recorded."""
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on to allocate and copy meanwhile.
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        work()
    return graph.replay


@dataclass(frozen=True)
class _Recorded:
    V: Tensor
    Y: Tensor
    replay: Callable[[], None]


class Graphs:
    """The recorded products of one state of a model."""

    def __init__(self, device: torch.device, capture: Capture = cuda_graph) -> None:
        self._device, self._capture = device, capture
        self._recorded: OrderedDict[Hashable, _Recorded | None] = OrderedDict()

    def run(self, key: Hashable, launch: Launch, V: Tensor, Y: Tensor, accumulate: bool) -> None:
        """Y (+)= A V, where launch(V, Y) starts Y = A V. ``key`` stands for all else that the work depends on.

        The first product of a key is launched as it is: many are never repeated.
        """
        key = (key, V.shape[0])
        if key not in self._recorded:
            self._add(key, None)
            recorded = None
        else:
            self._recorded.move_to_end(key)
            recorded = self._recorded[key] or self._record(key, launch, V)
        if recorded is None:
            if accumulate:
                part = torch.empty_like(Y)
                launch(V, part)
                Y.add_(part)
            else:
                launch(V, Y)
            return
        recorded.V.copy_(V)
        recorded.replay()
        if accumulate:
            Y.add_(recorded.Y)
        else:
            Y.copy_(recorded.Y)

    def _record(self, key: Hashable, launch: Launch, V: Tensor) -> _Recorded:
        into = torch.empty(V.shape, dtype=V.dtype, device=V.device)
        into.copy_(V)
        out = torch.empty_like(into)
        recorded = _Recorded(into, out, self._capture(lambda: launch(into, out), self._device))
        self._add(key, recorded)
        return recorded

    def _add(self, key: Hashable, recorded: _Recorded | None) -> None:
        self._recorded[key] = recorded
        self._recorded.move_to_end(key)
        while len(self._recorded) > MOST_GRAPHS:
            self._recorded.popitem(last=False)


def pays(V: Tensor) -> bool:
    """Is a product with these vectors on a GPU worth a graph?"""
    return V.is_cuda and V.numel() * V.element_size() <= LARGEST_BYTES

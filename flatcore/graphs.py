"""Products of small models on a GPU as CUDA graphs: their kernels take less time than launching them one by one.

A graph replays a product between the same addresses. So the vectors are copied in and the result is copied out, which
costs nothing beside the launches while both are small; larger products are launched as they are.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

# Vectors and results up to this many bytes are copied: some 70 microseconds at 4 TB/s, what 20 launches cost more one
# by one than within a graph. A net of two layers has as many, a transformer of four blocks some hundred a direction.
# Counted, not measured.
LARGEST_BYTES = 1 << 26
# Each holds the buffers of its product.
MOST_GRAPHS = 16

Launch = Callable[[Tensor, Tensor], None]


class Capture(Protocol):
    """Runs ``work`` once or more, and returns what repeats it between the same addresses."""

    def __call__(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]: ...


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: the libraries keep memory for each that they have seen."""
    return torch.cuda.Stream(device)


def cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Follows torch's recipe: work of a warm-up on a stream of its own sets the libraries up, then one is recorded."""
    current, aside = torch.cuda.current_stream(device), _aside(device)
    with torch.cuda.stream(current):  # where a recording fails, torch does not go back to it by itself
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            work()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # cuBLAS' workspace is to lie in the recording's own memory, as in torch's recordings of compiled functions:
        # these free any that lies elsewhere, and a replay would write into what others were given since.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may go on to allocate and copy meanwhile.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                work()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(aside)
    return graph.replay


@dataclass(frozen=True)
class _Recorded:
    V: Tensor
    Y: Tensor
    replay: Callable[[], None]
    bytes: int
    streams: set[int] = field(default_factory=set)  # that it was replayed on


class Graphs:
    """The recorded products of one state of a model. For threads and streams of any number: one replay after another.

    bytes: what those that are recorded now hold, their vectors and results with what ``run`` was told.
    """

    def __init__(self, device: torch.device, capture: Capture = cuda_graph) -> None:
        self._device, self._capture = device, capture
        self._recorded: OrderedDict[Hashable, _Recorded | None] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._lock = threading.RLock()
        self._stream: torch.cuda.Stream | None = None  # of the last replay
        self._ended: torch.cuda.Event | None = None  # with the last replay
        self.bytes = 0

    def run(
        self,
        key: Hashable,
        launch: Launch,
        V: Tensor,
        Y: Tensor,
        accumulate: bool,
        size: Callable[[], int] = lambda: 0,
        room: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """Y (+)= A V, where launch(V, Y) starts Y = A V and holds size() bytes for it. It is recorded where these and
        copies of V and Y take no more than room(). ``key`` stands for all else that the work depends on.

        The first product of a key is launched as it is: many are never repeated. So is one that cannot be recorded.
        """
        key = (key, V.shape[0])
        with self._lock:
            recorded = self._found(key, launch, V, size, room)
            if recorded is not None:
                self._replay(recorded, V, Y, accumulate)
                return
        if accumulate:
            part = torch.empty_like(Y)
            launch(V, part)
            Y.add_(part)
        else:
            launch(V, Y)

    def _found(
        self, key: Hashable, launch: Launch, V: Tensor, size: Callable[[], int], room: Callable[[], float]
    ) -> _Recorded | None:
        if key in self._refused:
            return None
        if key not in self._recorded:
            self._add(key, None)
            return None
        self._recorded.move_to_end(key)
        if found := self._recorded[key]:
            return found
        bytes_ = size() + 2 * V.numel() * V.element_size()
        return self._record(key, launch, V, bytes_) if bytes_ <= room() else None

    def _replay(self, recorded: _Recorded, V: Tensor, Y: Tensor, accumulate: bool) -> None:
        if V.is_cuda:
            self._go_to(torch.cuda.current_stream(V.device), recorded)
        recorded.V.copy_(V)
        recorded.replay()
        if accumulate:
            Y.add_(recorded.Y)
        else:
            Y.copy_(recorded.Y)
        if self._ended and self._stream:
            self._ended.record(self._stream)

    def _go_to(self, stream: torch.cuda.Stream, recorded: _Recorded) -> None:
        """All replays use the same memory: each waits for the one before, and the allocator, which gives away what
        is dropped, for the last on every stream."""
        if not self._ended:
            self._ended = torch.cuda.Event()
        elif stream != self._stream:
            stream.wait_event(self._ended)
        self._stream = stream
        if stream.cuda_stream not in recorded.streams:
            recorded.streams.add(stream.cuda_stream)
            recorded.V.record_stream(stream)
            recorded.Y.record_stream(stream)

    def _record(self, key: Hashable, launch: Launch, V: Tensor, size: int) -> _Recorded | None:
        into = torch.empty(V.shape, dtype=V.dtype, device=V.device)
        into.copy_(V)
        out = torch.empty_like(into)
        try:
            replay = self._capture(lambda: launch(into, out), self._device)
        except RuntimeError:  # no memory, which launches may still find, or a library that cannot be recorded
            self._refused.add(key)
            self._recorded.pop(key)
            return None
        recorded = _Recorded(into, out, replay, size)
        self._add(key, recorded)
        return recorded

    def _add(self, key: Hashable, recorded: _Recorded | None) -> None:
        self._recorded[key] = recorded
        self._recorded.move_to_end(key)
        while len(self._recorded) > MOST_GRAPHS:
            self._recorded.popitem(last=False)
        self.bytes = sum(one.bytes for one in self._recorded.values() if one is not None)


def pays(V: Tensor) -> bool:
    """Is a product with these vectors on a GPU worth a graph?"""
    return V.is_cuda and V.numel() * V.element_size() <= LARGEST_BYTES

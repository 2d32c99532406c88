"""How many directions a product or a sweep takes at once: as many as the budget holds, fewer where memory runs out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch

from flatcore.memory import free_bytes, readable

_Result = TypeVar("_Result")


_RELEASES = 2  # recorded products, states


@dataclass
class Directions:
    """The directions of one kind of product, or of what else takes many at once.

    peaks: for each program, the bytes that the buffers of a product with K directions hold.
    limit: the budget's bytes for them.
    work: its name in a sentence.
    least: directions that must go together, where there are that many.
    """

    peaks: Sequence[Callable[[int], int]]
    limit: int
    device: torch.device
    work: str = "a product"
    least: int = 1
    _most: int = field(default=0, init=False)

    @property
    def most(self) -> int:
        """The most directions whose buffers fit into the budget; one at least."""
        if not self._most:
            self._most = self._fitting()
        return self._most

    def peak(self, K: int) -> int:
        return max(peak(K) for peak in self.peaks)

    def pieces(self, K: int) -> list[slice]:
        """K directions in as few, nearly equal pieces as fit; of ``least`` at least, and then perhaps one too many."""
        if self.most >= K:
            return [slice(0, K)]
        count = min(-(-K // self.most), max(K // self.least, 1))
        bounds = [K * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(bounds)]

    def run(
        self,
        K: int,
        whole: Callable[[list[slice]], _Result],
        release: Callable[[], bool],
        examples: Sequence[int],
    ) -> _Result:
        """whole(pieces); where the device has no memory left for it, again without what is held for speed, then
        with half as many directions at once.

        release() gives back some of the former and says whether there was any. Raises torch.OutOfMemoryError with a
        sentence where not even ``least`` directions fit. ``examples``: of each batch.
        """
        released = 0
        while True:
            pieces = self.pieces(K)
            try:
                return whole(pieces)
            except torch.OutOfMemoryError as error:
                at_once = max(piece.stop - piece.start for piece in pieces)
                failure = error.with_traceback(None)  # the frames of the failed product hold its buffers
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            # Work that is done again may hold such things again: they do not go on being given back for ever.
            released += 1
            if released <= _RELEASES and release():
                continue
            released = 0
            if at_once // 2 < self.least:
                raise torch.OutOfMemoryError(self._sentence(at_once, max(examples))) from failure
            self._most = min(self.most, at_once // 2)  # another thread may have gone further

    def _sentence(self, K: int, examples: int) -> str:
        needed, free = self.peak(K), free_bytes(self.device)
        fitting = max(1, int(examples * 0.8 * free / max(needed, 1)))
        advice = (
            f"batches of about {fitting} examples instead of {examples} would fit"
            if fitting < examples
            else "free memory on the device, or pass smaller batches"
        )
        return (
            f"{self.device}: out of memory for {self.work} with {'one direction' if K == 1 else f'{K} directions'}, "
            f"whose buffers take {readable(needed)} while {readable(free)} are free; {advice}"
        )

    def _fitting(self) -> int:
        def too_many(K: int) -> bool:  # the peak moves from op to op as K grows: it is no line
            return any(peak(K) > self.limit for peak in self.peaks)

        most = 1
        while most < self.limit and not too_many(2 * most):
            most *= 2
        return most + bisect_left(range(most + 1, 2 * most), True, key=too_many)

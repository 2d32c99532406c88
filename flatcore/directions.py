"""How many directions a product takes at once: as many as the budget holds, fewer where memory runs out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch

from flatcore.memory import free_bytes, readable

_Result = TypeVar("_Result")


@dataclass
class Directions:
    """The directions of one kind of product.

    peaks: for each program, the bytes that the buffers of a product with K directions hold.
    limit: the budget's bytes for them.
    """

    peaks: Sequence[Callable[[int], int]]
    limit: int
    device: torch.device
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
        """K directions in as few, nearly equal pieces as fit."""
        count = -(-K // self.most)
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
        sentence where not even one direction fits. ``examples``: of each batch.
        """
        while True:
            try:
                return whole(self.pieces(K))
            except torch.OutOfMemoryError as error:
                at_once = min(self.most, K)
                needed = self.peak(1)
                failure = error.with_traceback(None)  # the frames of the failed product hold its buffers
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if release():
                continue
            if at_once > 1:
                self._most = at_once // 2
            else:
                raise torch.OutOfMemoryError(self._sentence(needed, max(examples))) from failure

    def _sentence(self, needed: int, examples: int) -> str:
        free = free_bytes(self.device)
        fitting = max(1, int(examples * 0.8 * free / max(needed, 1)))
        advice = (
            f"batches of about {fitting} examples instead of {examples} would fit"
            if fitting < examples
            else "free memory on the device, or pass smaller batches"
        )
        return (
            f"{self.device}: out of memory for a product with one direction, whose buffers take {readable(needed)} "
            f"while {readable(free)} are free; {advice}"
        )

    def _fitting(self) -> int:
        def too_many(K: int) -> bool:  # the peak moves from op to op as K grows: it is no line
            return any(peak(K) > self.limit for peak in self.peaks)

        most = 1
        while most < self.limit and not too_many(2 * most):
            most *= 2
        return most + bisect_left(range(most + 1, 2 * most), True, key=too_many)

"""Maps of batches that are kept between products, with the graphs behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatcore.autograd_maps import Map
from flatcore.environment import ONE_AT_A_TIME

if TYPE_CHECKING:
    from flatcore.objective import Snapshot


class KeptMaps:
    """The maps at one point, by kind of product and batch, up to a number of bytes.

    A point's first product keeps nothing: it may be the only one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._point: Snapshot | None = None
        self._maps: dict[tuple[str, int], Map] = {}
        self._held = 0
        self._seen: set[str] = set()

    def begin(self, at: Snapshot, mode: str) -> bool:
        """Called before each product: forgets what is of another point. Was there a product of this kind here?"""
        with ONE_AT_A_TIME:
            if self._point is not at:
                self._point = at
                self._maps, self._held, self._seen = {}, 0, set()
            again = mode in self._seen
            self._seen.add(mode)
        return again

    def find(self, at: Snapshot, mode: str, batch: int) -> Map | None:
        """The map of a batch, if it is kept."""
        return self._maps.get((mode, batch)) if self._point is at else None

    def keep(self, at: Snapshot, mode: str, batch: int, apply: Map, size: float) -> None:
        """Keeps a map of so many bytes, where there is room for it."""
        with ONE_AT_A_TIME:
            if self._point is at and (mode, batch) not in self._maps and self._held + size <= self._most:
                self._maps[mode, batch] = apply
                self._held += int(size)

    def forget(self, for_good: bool) -> bool:
        """Gives everything back; for_good: and keeps nothing again. Was there anything?"""
        with ONE_AT_A_TIME:
            held = bool(self._maps)
            self._maps, self._held = {}, 0
            if for_good:
                self._most = -1
        return held

# SPDX-License-Identifier: Apache-2.0
"""Foretells which tiles will be wanted, so that the link never idles. Pure bookkeeping."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from headinfer.layout import Tile


@dataclass(slots=True)
class Schedule:
    """Which tiles will be wanted after those being attended.

    Layers are attended in the same order in every forward pass, so the order of the last one
    foretells this one; keys of later layers do not depend on this layer's result, and after the
    last layer the first one's are already complete for the next pass.
    """

    tiles_of: Callable[[int], Iterator[Tile]]
    _order: list[int] = field(default_factory=list)
    _lap_known: bool = False
    _at: int = -1
    _ahead: int = -1
    _wrapped: bool = False
    _pending: deque[Tile] = field(default_factory=deque)

    def reached(self, layer: int) -> None:
        """Attention of `layer` begins."""
        if self._at + 1 < len(self._order) and self._order[self._at + 1] == layer:
            self._at += 1
        elif self._order and self._order[0] == layer:
            # A new pass. One that ended early, or the first, shows where the order ends.
            self._order = self._order[: self._at + 1]
            self._lap_known = True
            self._at, self._wrapped = 0, False
            self._ahead = min(self._ahead, len(self._order) - 1)
        else:
            self._order = [*self._order[: self._at + 1], layer]
            self._at += 1
            self._lap_known = False

    def restart(self, pending: deque[Tile]) -> None:
        """The ring was flushed; what comes next is `pending`, then the layers after this one."""
        self._pending = deque(pending)
        self._ahead, self._wrapped = self._at, False

    def stop(self) -> None:
        """Stored tokens changed: nothing is foretold until the next attention call."""
        self._pending.clear()
        self._ahead, self._wrapped = self._at, False

    def next_tile(self) -> Tile | None:
        """The next tile to stage, None if that cannot be said yet."""
        while not self._pending:
            following = self._ahead + 1
            wrapped = self._wrapped
            if following >= len(self._order):
                following, wrapped = 0, True
                if self._wrapped or not self._lap_known:
                    return None
            # A layer's tiles for the next pass are complete once this pass has extended it.
            if wrapped and following > self._at:
                return None
            self._ahead, self._wrapped = following, wrapped
            self._pending.extend(self.tiles_of(self._order[following]))
        return self._pending.popleft()

# SPDX-License-Identifier: Apache-2.0
"""How many offloaded heads of each layer the CPU attends in decode, while the others stream.

Both paths should end together: the link busy all the time, the CPU done when the last tile lands.
The share follows what forward passes took on this machine under this load. Counts heads, bytes
and seconds only.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_SHARE = 0.02
"""Some heads stay on the CPU while the share adapts: without them its rate would not be seen."""

BUSY = 0.95
"""A link that copied for this part of a pass had no more to give."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass took.

    Attributes:
        seconds: from the first layer's attention to the last one's.
        near_s: of these, what the CPU spent in its kernel.
        near_bytes: keys and values the CPU read.
        loaded_bytes: keys and values that were streamed.
        link_rate: measured, bytes/s; None if it is not known yet.
    """

    seconds: float
    near_s: float
    near_bytes: int
    loaded_bytes: int
    link_rate: float | None


@dataclass(slots=True)
class Balance:
    """The share of offloaded heads that the CPU attends.

    Attributes:
        share: 0 (all stream) to 1 (all on the CPU).
        adapts: `observe` moves the share; False keeps it, and so the arithmetic of a run, fixed.
    """

    share: float
    adapts: bool = False
    _gap_s: float = 0.0

    def heads(self, place: int, count: int) -> int:
        """Of `count` offloaded heads of layer number `place`, those attended on the CPU.

        Rounds so that the sum over layers follows the share, however few heads a layer has.
        """
        return int((place + 1) * count * self.share + 0.5) - int(place * count * self.share + 0.5)

    def observe(self, found: Pass) -> None:
        """Move the share towards where both paths take equally long.

        With `gap` for the time of a pass in which the CPU has no queries to attend, the CPU's
        path takes gap + share * all / cpu_rate and the link's (1 - share) * all / link_rate.
        """
        if not self.adapts or not found.link_rate or not found.near_bytes or found.near_s <= 0:
            return
        everything = found.near_bytes + found.loaded_bytes
        by_link = everything / found.link_rate
        by_cpu = everything * found.near_s / found.near_bytes
        gap = found.seconds - found.near_s
        if found.loaded_bytes / found.link_rate < BUSY * found.seconds:
            self._gap_s += (gap - self._gap_s) / 2
        else:  # part of the gap was waiting for the link; how much, a larger share will show
            self._gap_s = min(self._gap_s * 0.9, gap)
        target = (by_link - self._gap_s) / (by_link + by_cpu)
        self.share += (min(max(target, LEAST_SHARE), 1.0) - self.share) / 2

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


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass took.

    Attributes:
        seconds: from the first layer's queries to the last layer's answer of the CPU.
        near_s: of these, what the CPU spent in its kernel.
        near_bytes: keys and values the CPU read.
        slack_s: how much later than the last tile of its layer the CPU's answer came, summed over
            layers; negative where it came earlier.
        loaded_bytes: keys and values that were streamed.
        link_rate: of copies on their own, bytes/s; None if it is not known yet.
    """

    seconds: float
    near_s: float
    near_bytes: int
    slack_s: float
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

    def heads(self, before: int, count: int) -> int:
        """Of `count` offloaded heads of a layer, after `before` of the layers below it, those attended
        on the CPU.

        Rounds so that the sum over layers follows the share, however few heads a layer has; while the
        share adapts one head at least is attended there.
        """
        return self._in_all(before + count) - self._in_all(before)

    def _in_all(self, heads: int) -> int:
        least = min(heads, 1) if self.adapts and self.share > 0 else 0
        return max(int(heads * self.share + 0.5), least)

    def observe(self, found: Pass) -> None:
        """Move the share towards where both paths end together.

        A larger share makes the CPU's path longer by all / cpu_rate and the link's shorter by
        all / link_rate. Slack says which is behind. Where that is the link, it is the distance;
        where it is the CPU it is more, as the ring fills up meanwhile.
        """
        if not self.adapts or not found.near_bytes or found.near_s <= 0:
            return
        everything = found.near_bytes + found.loaded_bytes
        near_rate = found.near_bytes / found.near_s
        # A link that nothing has crossed yet is taken to be as fast: what it gets then will tell.
        slope = everything / (found.link_rate or near_rate) + everything / near_rate
        self.share = min(max(self.share - found.slack_s / slope / 2, LEAST_SHARE), 1.0)

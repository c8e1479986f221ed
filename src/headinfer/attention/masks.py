# SPDX-License-Identifier: Apache-2.0
"""Which keys a query row sees, answered block by block so that no mask of q x s ever exists.

A recipe cuts (query rows x key span) into blocks that are wholly visible, causal squares, or
carry a bias of bounded size; blocks nobody sees are left out. Rows count from the first query of
the call, keys from the first token of the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from headinfer.attention.types import Window

MASK_ELEMENTS = 2**22
"""Largest bias a recipe makes at once, in elements: 4 MiB of booleans."""


class Block(NamedTuple):
    """Query rows [r0, r1) against keys [k0, k1).

    `causal` blocks are square: row r0 + i sees keys k0..k0 + i. `bias` is [b or 1, h or 1,
    rows or 1, keys], boolean or additive; None means every row sees every key. `window`, counted
    from r0 and k0, hides keys on top of that; never together with `causal`.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    bias: Tensor | None = None
    window: Window | None = None


class MaskRecipe(Protocol):
    """Must not wait for the device in `blocks`: it runs inside the layer loop."""

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        """The visible blocks of rows x keys, each (row, key) pair in at most one."""
        ...


class Everything:
    """Every row sees every key."""

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        if keys[0] < keys[1] and rows[0] < rows[1]:
            yield Block(rows, keys)


class Causal:
    """Row i sees keys 0..offset + i."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        (r0, r1), (k0, k1) = rows, keys
        if r0 >= r1:
            return
        # Keys before these are seen by all rows; a single row's own key needs no causal kernel.
        past = min(k1, self.offset + r0 + (1 if r1 - r0 == 1 else 0))
        if k0 < past:
            yield Block(rows, (k0, past))
        start = max(k0, past)
        stop = min(k1, self.offset + r1)
        if start >= stop:
            return
        first, last = start - self.offset, stop - self.offset
        yield Block((first, last), (start, stop), causal=True)
        if last < r1:
            yield Block((last, r1), (start, stop))


class Padding:
    """The part of a [b, s] padding mask that hides something, known to the host.

    Reading the mask waits for the device once, when it is made, never per layer.

    Attributes:
        visible: [b, s] bool on the device.
        hull: keys outside [start, stop) are visible in every row.
    """

    def __init__(self, visible: Tensor, length: int) -> None:
        missing = length - visible.shape[1]
        if missing > 0:  # a mask shorter than the keys hides the rest
            visible = torch.nn.functional.pad(visible, (0, missing))
        self.visible = visible[:, :length]
        hidden = (~self.visible).any(dim=0).nonzero().flatten()
        first, last = torch.stack([hidden[0], hidden[-1]]).tolist() if len(hidden) else (0, -1)
        self.hull = (first, last + 1)
        self._twin: Padding | None = None

    def on_host(self) -> Padding:
        """The same in host memory; the first call waits for the device, once per mask."""
        if self._twin is None:
            self._twin = copy.copy(self)
            self._twin.visible = self.visible.cpu()
        return self._twin

    @property
    def hides(self) -> bool:
        return self.hull[0] < self.hull[1]


class PaddedCausal:
    """Causal, and keys that are padding are seen by nobody."""

    def __init__(self, offset: int, padding: Padding) -> None:
        self.offset = offset
        self.padding = padding
        self._causal = Causal(offset)

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        start, stop = self.padding.hull
        yield from self._causal.blocks(rows, (keys[0], min(keys[1], start)))
        yield from self._hidden(rows, (max(keys[0], start), min(keys[1], stop)))
        yield from self._causal.blocks(rows, (max(keys[0], stop), keys[1]))

    def _hidden(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        for block in self._causal.blocks(rows, keys):
            if block.causal:
                yield from self._square(block)
            else:
                yield from self._columns(block.rows, block.keys)

    def _square(self, block: Block) -> Iterator[Block]:
        """A causal square as slices of rows: what is left of the diagonal, then a small square."""
        (r0, _), (k0, k1) = block.rows, block.keys
        visible = self.padding.visible
        side = max(1, isqrt(MASK_ELEMENTS // visible.shape[0]))
        index = torch.arange(min(side, k1 - k0), device=visible.device)
        lower = index <= index[:, None]
        for start in range(0, k1 - k0, side):
            size = min(side, k1 - k0 - start)
            rows, here = (r0 + start, r0 + start + size), (k0 + start, k0 + start + size)
            yield from self._columns(rows, (k0, here[0]))
            seen = visible[:, None, None, slice(*here)]
            yield Block(rows, here, bias=seen & lower[:size, :size])

    def _columns(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        """Keys that differ by sequence only, not by row."""
        visible = self.padding.visible
        step = max(1, MASK_ELEMENTS // visible.shape[0])
        for start in range(*keys, step):
            stop = min(start + step, keys[1])
            yield Block(rows, (start, stop), bias=visible[:, None, None, start:stop])


class Sliding:
    """Row i sees keys offset + i - size < j <= offset + i, but for those that are padding.

    Its blocks carry windows, not masks: for devices on which a fused kernel takes them.
    """

    def __init__(self, offset: int, size: int, padding: Padding | None = None) -> None:
        self.offset = offset
        self.size = size
        self.padding = padding

    def hides_past(self, rows: int, first: int = 0) -> bool:
        """Whether some of the first `rows` rows no longer see key `first`."""
        return self.offset + rows - 1 - self.size >= first

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        padding = self.padding
        if padding is None:
            yield from self._visible(rows, keys)
            return
        start, stop = padding.hull
        yield from self._visible(rows, (keys[0], min(keys[1], start)))
        step = max(1, MASK_ELEMENTS // padding.visible.shape[0])
        for first in range(max(keys[0], start), min(keys[1], stop), step):
            last = min(first + step, stop, keys[1])
            for block in self._windows(rows, (first, last)):
                yield block._replace(bias=padding.visible[:, None, None, slice(*block.keys)])
        yield from self._visible(rows, (max(keys[0], stop), keys[1]))

    def _visible(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        if self.hides_past(rows[1], keys[0]):
            yield from self._windows(rows, keys)
        else:  # the window is no narrower than what there is: kernels without windows are faster
            yield from Causal(self.offset).blocks(rows, keys)

    def _windows(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        """At most one block: the rows that see any of `keys`, and the keys that they see."""
        offset, size = self.offset, self.size
        first = max(rows[0], keys[0] - offset)
        last = min(rows[1], keys[1] - offset + size - 1)
        start = max(keys[0], offset + first - size + 1)
        stop = min(keys[1], offset + last)
        if first >= last or start >= stop:
            return
        sees_all = offset + first >= stop - 1 and offset + last - 1 - size < start
        window = None if sees_all else Window(offset + first - start, size)
        yield Block((first, last), (start, stop), window=window)


class Given:
    """A mask somebody made in full: [b or 1, h or 1, t, s], boolean or additive."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        stop = min(keys[1], self._mask.shape[-1])  # keys past the mask are hidden
        if keys[0] >= stop or rows[0] >= rows[1]:
            return
        part = self._mask[..., keys[0] : stop]
        if part.shape[-2] != 1:
            part = part[..., rows[0] : rows[1], :]
        yield Block(rows, (keys[0], stop), bias=part)


def on_host(recipe: MaskRecipe) -> MaskRecipe | None:
    """`recipe` for queries and keys in host memory; None where only the device knows the mask."""
    if isinstance(recipe, PaddedCausal):
        return PaddedCausal(recipe.offset, recipe.padding.on_host())
    return recipe if isinstance(recipe, (Causal, Everything)) else None


class Rows:
    """Another recipe seen from its row `start` on."""

    def __init__(self, recipe: MaskRecipe, start: int) -> None:
        self._recipe = recipe
        self._start = start

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        start = self._start
        for block in self._recipe.blocks((rows[0] + start, rows[1] + start), keys):
            yield block._replace(rows=(block.rows[0] - start, block.rows[1] - start))


class Biased:
    """Another recipe with a position bias [b or 1, h, t, s] added to the scores."""

    def __init__(self, recipe: MaskRecipe, bias: Tensor) -> None:
        self._recipe = recipe
        self._bias = bias

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        for block in self._recipe.blocks(rows, keys):
            (r0, r1), (k0, k1) = block.rows, block.keys
            bias = self._bias[..., k0:k1]
            if bias.shape[-2] != 1:
                bias = bias[..., r0:r1, :]
            if block.causal:
                index = torch.arange(k1 - k0, device=bias.device)
                bias = bias.masked_fill(index > index[: r1 - r0, None], -torch.inf)
            if block.bias is not None and block.bias.dtype == torch.bool:
                bias = bias.masked_fill(~block.bias, -torch.inf)
            elif block.bias is not None:
                bias = bias + block.bias
            yield Block(block.rows, block.keys, bias=bias, window=block.window)

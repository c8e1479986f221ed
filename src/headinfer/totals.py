# SPDX-License-Identifier: Apache-2.0
"""One attention call and the sum of what its query heads find, piece by piece.

Pieces of the context come from wherever they lie; their partials merge at once, or, when outputs
are small, all together at the end. Knows no tiers and no tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from headinfer.attention import native, packed
from headinfer.attention.api import (
    AUTO,
    SHORT_QUERY_TOKENS,
    attend,
    built_per_shape,
    choose,
    grows_with_keys,
    spec_of,
)
from headinfer.attention.few_shapes import fills_alone, key_spans
from headinfer.attention.masks import Block, Causal, MaskRecipe
from headinfer.attention.merge import FEW, identity, merge_all, merge_into, write_merged
from headinfer.attention.types import AttentionSpec, Partial, Window
from headinfer.heads import PackedPiece, Piece

EXPAND_BYTES = 64 * 2**20
"""Latent keys and values are expanded, and those with softcap copied where no kernel fuses it, this much at once."""

DECODED_BYTES = 512 * 2**20
"""Packed keys and values that no kernel reads as they are get decoded this much at once."""

PENDING_BYTES = 2 * 2**20
"""Partials that wait for each other, per head group: a few, or the context would decide."""

HELD_BYTES = 40 * 2**20
"""Partials that a GPU holds to merge them at once; more is merged two by two, as on a CPU."""

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Query:
    """One attention call against a layer.

    Attributes:
        q: [b, h * q_per_kv, t, d].
        scale: factor on q k^T.
        recipe: which keys each row sees.
        softcap: see `AttentionImpl`.
        sink: [h * q_per_kv] logits with zero value, or None.
        expand: turns stored latents [b, 1, t, r] into keys and values of every query head.
        value_dim: width of the output.
    """

    q: Tensor
    scale: float
    recipe: MaskRecipe
    value_dim: int
    softcap: float | None = None
    sink: Tensor | None = None
    expand: Expand | None = None


def attend_in_memory(query: Query, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `query` over plain k, v [b, h, s, d], [b, t, h, d]: the same arithmetic as over
    a cache, for what the fused kernels of transformers do not take."""
    batch, heads, rows, _ = query.q.shape
    total = Total(query, query.q, (0, heads), AUTO, collect=False)
    total.add(Piece(0, k, v))
    out = query.q.new_empty(batch, rows, heads, query.value_dim)
    total.finish(out)
    return out


def heads_apart(query: Query, kv_heads: int, impl: str) -> bool:
    """Whether every KV head is better attended in a call of its own: calls over different numbers of
    heads would be as many shapes, and one head's rows fill the device."""
    batch, per_kv = query.q.shape[0], query.q.shape[1] // kv_heads
    if query.q.device.type != "cuda" or query.expand is not None:
        return False
    # Masks and windows go to other kernels; of several sequences a tile has as many strides as lengths.
    if batch > 1 or not isinstance(query.recipe, Causal):
        return False
    if not fills_alone(per_kv * query.q.shape[2], _multiprocessors(query.q.device)):
        return False
    spec = AttentionSpec(
        device=query.q.device.type,
        dtype=query.q.dtype,
        key_dim=query.q.shape[-1],
        value_dim=query.value_dim,
        q_per_kv=per_kv,
        query_tokens=SHORT_QUERY_TOKENS,
        causal=False,
        biased=False,
        softcap=query.softcap is not None,
        gradient=torch.is_grad_enabled() and query.q.requires_grad,
    )
    return built_per_shape(spec, impl)


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Total:
    """Partials of some query heads, merged as they come or, when small, all at the end."""

    def __init__(
        self, query: Query, q: Tensor, heads: tuple[int, int], impl: str, collect: bool
    ) -> None:
        self._query = query
        self._q = q[:, heads[0] : heads[1]]
        self._heads = heads
        self._impl = impl
        self._collect = collect
        self._parts: list[Partial] = []  # each over all rows
        self._owned = False  # whether the first part may be merged into

    @property
    def partial(self) -> Partial:
        """Everything added so far; an identity if nothing was."""
        if not self._parts:
            batch, heads, rows, _ = self._q.shape
            shape = (batch, heads, rows, self._query.value_dim)
            self._parts, self._owned = [identity(shape, device=self._q.device)], True
        elif len(self._parts) == 2 and self._owned:
            merge_into(self._parts[0], self._parts.pop())
        elif len(self._parts) > 1:
            self._parts, self._owned = [merge_all(self._parts)], True
        return self._parts[0]

    def add(self, piece: Piece | PackedPiece) -> None:
        """Attend a piece of the context and merge what every row sees of it."""
        rows = 0, self._q.shape[2]
        if isinstance(piece, PackedPiece):
            for block in self._query.recipe.blocks(rows, (piece.start, piece.stop)):
                self._add_packed(piece, block)
            return
        for block in self._query.recipe.blocks(rows, (piece.start, piece.start + piece.k.shape[2])):
            self._add_block(piece, block)

    def _add_block(self, piece: Piece, block: Block) -> None:
        start, stop = block.keys[0] - piece.start, block.keys[1] - piece.start
        for first, last in self._spans(piece, block, start, stop):
            bias = block.bias
            if bias is not None and last - first < stop - start:
                bias = bias[..., first - start : last - start]
            k, v = piece.k[:, :, first:last], piece.v[:, :, first:last]
            window = block.window
            if window is not None:
                window = window._replace(offset=window.offset - (first - start))
            self._add(block.rows, k, v, block.causal, bias, window)

    def _spans(
        self, piece: Piece, block: Block, start: int, stop: int
    ) -> Sequence[tuple[int, int]]:
        """Where the keys [start, stop) of `piece` are cut, for the sake of memory or of few shapes."""
        if block.causal:
            return [(start, stop)]
        if self._query.expand is not None or self._grows(piece, block):
            step = min(stop - start, self._expand_tokens(piece))
            return [(first, min(first + step, stop)) for first in range(start, stop, step)]
        rows = block.rows[1] - block.rows[0]
        if rows < SHORT_QUERY_TOKENS or not self._built_per_shape(piece.k, piece.v, block):
            return [(start, stop)]
        cut = key_spans(piece.k[:, :, start:stop], rows)
        return [(start + first, start + last) for first, last in cut]

    def _built_per_shape(self, k: Tensor, v: Tensor, block: Block) -> bool:
        """Whether what attends k, v is built anew for every shape."""
        spec = spec_of(
            self._q,
            k,
            v,
            biased=block.bias is not None,
            softcap=self._query.softcap is not None,
            windowed=block.window is not None,
        )
        return built_per_shape(spec, self._impl)

    def _add_packed(self, piece: PackedPiece, block: Block) -> None:
        """Like `_add_block`; decoded first unless the native kernel reads it as it lies."""
        start, stop = block.keys[0] - piece.start, block.keys[1] - piece.start
        q = self._q[:, :, block.rows[0] : block.rows[1]]
        if start or block.causal or not self._reads_packed(piece, block, q):
            self._add_decoded(piece, block, start, stop)
            return
        bias = block.bias
        if bias is not None and bias.shape[1] != 1:
            bias = bias[:, self._heads[0] : self._heads[1]]
        self._make_room()
        part = packed.attend(
            q,
            piece.packed_k,
            piece.packed_v,
            *(piece.tail or (None, None)),
            keys=stop,
            scale=self._query.scale,
            bias=bias,
            softcap=self._query.softcap,
        )
        self._merge(block.rows, part)

    def _add_decoded(self, piece: PackedPiece, block: Block, start: int, stop: int) -> None:
        """Some heads at a time where all of them decoded would be large."""
        size = piece.nbytes * 4 // 3 * (stop - start) // max(piece.stop - piece.start, 1)
        step = max(1, piece.heads * DECODED_BYTES // max(size, 1))
        if step >= piece.heads or self._query.expand is not None:
            self._add_block(piece.plain(start, stop), block)
            return
        per_kv, first = self._q.shape[1] // piece.heads, self._heads[0]
        groups: list[Total] = []
        for head in range(0, piece.heads, step):
            last = min(head + step, piece.heads)
            group = Total(self._query, self._q, (head * per_kv, last * per_kv), self._impl, True)
            group._heads = first + head * per_kv, first + last * per_kv  # in a bias of all heads
            group._add_block(piece.plain(start, stop, slice(head, last)), block)
            groups.append(group)
        self._make_room()
        self.join(groups)

    def _reads_packed(self, piece: PackedPiece, block: Block, q: Tensor) -> bool:
        query = self._query
        spec = AttentionSpec(
            device=q.device.type,
            dtype=q.dtype,
            key_dim=q.shape[-1],
            value_dim=query.value_dim,
            q_per_kv=q.shape[1] // piece.heads,
            query_tokens=min(q.shape[2], SHORT_QUERY_TOKENS),
            causal=False,
            biased=block.bias is not None,
            softcap=query.softcap is not None,
            windowed=block.window is not None,
            gradient=torch.is_grad_enabled() and q.requires_grad,
        )
        return query.expand is None and choose(spec, self._impl).name == native.NAME

    def accept(self, partial: Partial) -> None:
        """Add what was found elsewhere, for all rows of these heads."""
        self._merge((0, self._q.shape[2]), partial)

    def join(self, groups: Sequence[Total]) -> None:
        """Add what `groups` found, each for its share of these heads, in order."""
        if not groups:
            return
        most = max(len(group._parts) for group in groups)
        for over_heads in zip(*(group._padded(most) for group in groups), strict=True):
            if len(over_heads) == 1:
                self._parts.append(over_heads[0])
                continue
            outs, lses = zip(*over_heads, strict=True)
            self._parts.append(Partial(torch.cat(outs, dim=1), torch.cat(lses, dim=1)))
        self._owned = False

    def finish(self, out: Tensor) -> None:
        """Write the result into out [b, t, h, d]."""
        parts, sink = self._parts or [self.partial], self._query.sink
        if sink is not None:
            sink = sink[self._heads[0] : self._heads[1]]
        write_merged(parts, out[:, :, self._heads[0] : self._heads[1]].transpose(1, 2), sink=sink)

    def _padded(self, count: int) -> list[Partial]:
        """The parts, and identities up to `count`: cheaper than merging what is merged anyway."""
        missing = count - len(self._parts)
        if not missing:
            return self._parts
        shape = (*self._q.shape[:3], self._query.value_dim)
        out = self._q.new_zeros(()).expand(shape)
        lse = self._q.new_full((), -torch.inf, dtype=torch.float32).expand(shape[:3])
        return [*self._parts, *([Partial(out, lse)] * missing)]

    def _add(
        self,
        rows: tuple[int, int],
        k: Tensor,
        v: Tensor,
        causal: bool,
        bias: Tensor | None,
        window: Window | None,
    ) -> None:
        query = self._query
        if query.expand is not None:
            k, v = query.expand(k, v)
        if bias is not None and bias.shape[1] != 1:
            bias = bias[:, self._heads[0] : self._heads[1]]
        self._make_room()
        part = attend(
            self._q[:, :, rows[0] : rows[1]],
            k,
            v,
            scale=query.scale,
            causal=causal,
            bias=bias,
            softcap=query.softcap,
            window=window,
            impl=self._impl,
        )
        self._merge(rows, part)

    def _merge(self, rows: tuple[int, int], part: Partial) -> None:
        if rows == (0, self._q.shape[2]):
            if self._collect and len(self._parts) * part.out.nbytes > PENDING_BYTES:
                self._parts = [self.partial]
            # One more part waits, so that the last merge can be written where it is wanted.
            self._parts.append(part)
            return
        total = self.partial
        if not self._owned:
            total = Partial(total.out.to(torch.float32, copy=True), total.lse.clone())
            self._parts, self._owned = [total], True
        here = slice(rows[0], rows[1])
        merge_into(Partial(total.out[:, :, here], total.lse[:, :, here]), part)

    def _make_room(self) -> None:
        """What is held is merged if another part would be one too many."""
        if not self._collect and len(self._parts) > 1 and self._full():
            _ = self.partial

    def _full(self) -> bool:
        last, held = self._parts[-1].out, len(self._parts)
        return not last.is_cuda or held >= FEW or (held + 1) * last.nbytes > HELD_BYTES

    def _grows(self, piece: Piece, block: Block) -> bool:
        """Whether a softcap leaves these keys to an implementation whose memory they decide."""
        if self._query.softcap is None:
            return False
        biased, windowed = block.bias is not None, block.window is not None
        spec = spec_of(self._q, piece.k, piece.v, biased=biased, softcap=True, windowed=windowed)
        return grows_with_keys(spec, self._impl)

    def _expand_tokens(self, piece: Piece) -> int:
        batch, heads, _, dim = self._q.shape
        width = heads * (dim + self._query.value_dim) * piece.k.element_size()
        return max(1, EXPAND_BYTES // (batch * width))

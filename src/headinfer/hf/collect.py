# SPDX-License-Identifier: Apache-2.0
"""What of a cache goes to disk next: views of whole blocks, copies of what will change.

Blocks stay where they are and are read by the writer's thread; tails, windows and states are
cloned on their device, which takes no wait. Made on the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headinfer.errors import CacheStateError
from headinfer.heads import DirectHeads, OffloadedHeads
from headinfer.hf.cache import HeadCache, HeadLayer, HybridHeadLayer
from headinfer.hf.states import state_of
from headinfer.layer import Layer
from headinfer.layout import BLOCK_TOKENS, Span
from headinfer.snapshot import LayerRecord, Manifest, Run, Step
from headinfer.transfer import Ticket, TransferEngine

PADDING = "padding"
"""Name in the state file of the mask [row, token], uint8, there only if some of it is 0."""

Waits = list[tuple[TransferEngine, Ticket]]


def collect(cache: HeadCache, since: Manifest, tokens: int) -> Step:
    """What a context that holds what `since` says needs to hold the first `tokens` tokens.

    Raises:
        CacheStateError: layers hold different lengths, or cannot go back to `tokens`.
    """
    stored = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    records: list[LayerRecord] = []
    runs: list[Run] = []
    state: dict[str, Tensor] = {}
    waits: Waits = []
    for index, layer in enumerate(cache.layers):
        held = _held(cache, layer)
        record = LayerRecord("heads")
        if held is not None:
            _check_length(held, tokens)
            record = _record(held)
            runs += _runs(held, Span(since.stored_tokens, stored), waits, cache)
            if tokens > stored:
                tails = _tails(held, Span(stored, tokens))
                state |= {f"{index}.tail.{name}": found for name, found in tails.items()}
        if has_stock_state(layer):
            if tokens != cache.get_seq_length():
                raise CacheStateError(
                    f"layer {index} ({type(layer).__name__}) has states of token "
                    f"{cache.get_seq_length()}, which cannot go back to {tokens}"
                )
            tensors, values = state_of(layer)
            state |= {f"{index}.stock.{name}": found for name, found in tensors.items()}
            record = _with_stock(record, held, type(layer).__name__, values)
        records.append(record)
    padding = cache.log.padding(tokens)
    if padding is not None:
        state[PADDING] = padding[:, :tokens]
    ids = cache.log.ids(tokens)
    flat = None if ids is None else np.ascontiguousarray(ids.T.numpy().astype("<i4"))
    return Step(tokens, tuple(records), tuple(runs), state, flat, _ready(cache, waits))


def has_stock_state(layer: Any) -> bool:
    """Whether a layer keeps something besides head-wise keys and values."""
    return not isinstance(layer, HeadLayer) or isinstance(layer, HybridHeadLayer)


def rows_of(cache: HeadCache) -> int:
    """Sequences in a cache that is not empty."""
    for layer in cache.layers:
        held = _held(cache, layer)
        if held is not None:
            return held.batch
    for layer in cache.layers:  # no layer keeps every token
        for tensor in state_of(layer)[0].values():
            if tensor.ndim > 2:
                return tensor.shape[0]
    raise CacheStateError("the cache holds nothing that tells how many sequences it has")


def _held(cache: HeadCache, layer: Any) -> Layer | None:
    """The runner's record of a head-wise layer that holds tokens."""
    runner = cache.backing.runner
    if runner is None or not isinstance(layer, HeadLayer) or not layer.length:
        return None
    return runner.layers.get(layer.index)


def _check_length(held: Layer, tokens: int) -> None:
    if held.length == tokens or (held.length > tokens and not tokens % BLOCK_TOKENS):
        return
    raise CacheStateError(
        f"layer {held.index} holds {held.length} tokens and {tokens} are to be saved: a forward pass "
        "failed midway. Call crop_to_complete() or reset() first"
    )


def _record(held: Layer) -> LayerRecord:
    shape = held.shape
    cuts: tuple[int, ...] = (0,)
    room = 0
    for heads in held.ranges:
        if isinstance(heads, DirectHeads):
            segments = heads.store.segments
            cuts = tuple(segment.start for segment in segments)
            room = segments[-1].start + segments[-1].capacity
    return LayerRecord(
        "heads",
        shape.num_kv_heads,
        shape.key_dim,
        shape.value_dim,
        str(shape.dtype).removeprefix("torch."),
        cuts,
        room,
    )


def _with_stock(
    record: LayerRecord, held: Layer | None, name: str, values: dict[str, Any]
) -> LayerRecord:
    return LayerRecord(
        "stock" if held is None else "both",
        record.num_kv_heads,
        record.key_dim,
        record.value_dim,
        record.dtype,
        record.cuts,
        record.room,
        name,
        values,
    )


def _runs(held: Layer, span: Span, waits: Waits, cache: HeadCache) -> list[Run]:
    found: list[Run] = []
    if not span.tokens:
        return found
    for heads in held.ranges:
        if isinstance(heads, OffloadedHeads):
            waits.append((heads.engine, heads.last_write))
        found += [
            Run(held.index, heads.heads.start, piece.start, piece.k, piece.v, piece.read)
            for piece in heads.stored_pieces(span)
        ]
    return found


def _tails(held: Layer, span: Span) -> dict[str, Tensor]:
    """k and v [row, head, token, dim] of the unfinished block, all heads."""
    parts = [heads.unfinished(span) for heads in held.ranges]
    return {
        "k": torch.cat([part.k for part in parts], dim=1),
        "v": torch.cat([part.v for part in parts], dim=1),
    }


def _ready(cache: HeadCache, waits: Waits) -> Callable[[], None]:
    """For the writer's thread: wait until everything collected is there."""
    runner = cache.backing.runner
    if runner is None:
        return lambda: None
    for link in runner.links:
        waits.append((link.engine, link.engine.fence()))
    devices = [link.device for link in runner.links if link.device.type == "cuda"]

    def wait() -> None:
        for device in devices:  # on a stream of its own, not behind the model's work
            torch.cuda.set_stream(torch.cuda.Stream(device))
        for engine, ticket in waits:
            engine.done(ticket, block=True)

    return wait

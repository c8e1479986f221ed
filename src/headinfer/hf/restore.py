# SPDX-License-Identifier: Apache-2.0
"""A cache from a saved context: blocks mapped or read, tails appended, states put back."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedModel

from headinfer.errors import SnapshotError
from headinfer.geometry import EXACT
from headinfer.heads import Guard, KVShape, Mapped, SavedLayer
from headinfer.hf.cache import HeadCache, HeadLayer
from headinfer.hf.collect import PADDING, has_stock_state
from headinfer.hf.states import put_back
from headinfer.hf.tokens import TokenLog
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span
from headinfer.runner import Runner, Unfilled
from headinfer.snapshot import Context, LayerRecord
from headinfer.snapshot.mapping import PAGE, Piece, mapped, mappings_left
from headinfer.snapshot.reader import places

_log = logging.getLogger(__name__)

THREADS = min(8, os.cpu_count() or 1)
AHEAD_LAYERS = 3
"""Layers whose blocks are checked while an earlier one is attended."""

BOUNCE_BYTES = 16 * 2**20
"""Keys and values for a device are read this much at a time."""


def restore(model: PreTrainedModel, cache: HeadCache, context: Context, *, verify: str) -> None:
    """The empty `cache` holds what `context` does.

    Raises:
        SnapshotError: the model's layers are of other kinds.
        SnapshotCorrupt: a block is not what was written (not lazily, or not at all: see `verify`).
    """
    manifest = context.manifest
    _check_layers(cache, context)
    stored = manifest.kv_format, manifest.block_tokens
    known = EXACT.name, BLOCK_TOKENS
    if stored != known:
        raise SnapshotError(
            f"{context.folder} is stored as {stored[0]} in blocks of {stored[1]} tokens, and this "
            f"version reads {known[0]} in blocks of {known[1]}; read it with the one that wrote it"
        )
    devices = layer_devices(model, len(cache.layers))
    geometry, first = cache.backing.geometry, devices[0]
    if geometry is None:
        raise SnapshotError("a cache without a config cannot hold a saved context")
    dtypes = [getattr(torch, layer.dtype) for layer in manifest.layers if layer.has_blocks]
    with torch.inference_mode(False), torch.no_grad():  # what is stored outlives the call
        if dtypes:
            runner = cache.backing.begin(geometry, first, dtypes[0], batch=manifest.rows)
            _restore_blocks(runner, context, devices, verify)
        for index, layer in enumerate(cache.layers):
            _restore_layer(cache, index, layer, context, devices[index])
    ids, padding = context.token_ids, context.state.get(PADDING)
    found = None if ids is None else torch.from_numpy(ids.T.astype("int64"))
    cache.log = TokenLog(found, padding)
    cache.log.known = found is not None


def layer_devices(model: PreTrainedModel, count: int) -> list[torch.device]:
    """The device that computes attention of each layer."""
    found = [model.device] * count
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        parameter = next(module.parameters(), None)
        if isinstance(index, int) and index < count and parameter is not None:
            if parameter.device.type != "meta":
                found[index] = parameter.device
    return found


def _check_layers(cache: HeadCache, context: Context) -> None:
    records = context.manifest.layers
    same = len(records) == len(cache.layers)
    for layer, record in zip(cache.layers, records, strict=False):
        stock = type(layer).__name__ if has_stock_state(layer) else ""
        same = same and record.stock == stock
        same = same and (isinstance(layer, HeadLayer) or not record.has_blocks)
    if not same:
        saved = ", ".join(dict.fromkeys(record.stock or "heads" for record in records))
        here = ", ".join(dict.fromkeys(type(layer).__name__ for layer in cache.layers))
        raise SnapshotError(
            f"{context.folder} holds {len(records)} layers ({saved}), and this transformers makes "
            f"{len(cache.layers)} ({here}) of the same config; use the version it was saved with"
        )


def _restore_blocks(
    runner: Runner, context: Context, devices: list[torch.device], verify: str
) -> None:
    manifest = context.manifest
    if not manifest.stored_tokens:
        return
    if verify == "now":
        _check_everything(context)
    verifier = _Verifier(context)
    enough = _mappings(context) < mappings_left() // 2
    if not enough:
        _log.info("%s is read into memory: too many pieces to be mapped", context.folder)
    with ThreadPoolExecutor(THREADS, "headinfer-load") as pool:
        jobs: list[Future[None]] = []
        for index, record in enumerate(manifest.layers):
            if not record.has_blocks:
                continue
            saved = SavedLayer(
                shape=_shape(record),
                device=devices[index],
                batch=manifest.rows,
                tokens=manifest.stored_tokens,
                cuts=record.cuts,
                room=record.room,
                adopt=_mapper(context, index) if enough else lambda heads, capacity: None,
                guard=verifier.guard(index) if verify == "lazy" else _trusting,
            )
            for part in runner.restore(index, saved):
                for place in range(part.heads.heads):
                    args = context, index, part, place, verify == "lazy"
                    jobs.append(pool.submit(_read_head, *args))
        for job in jobs:
            job.result()


def _restore_layer(
    cache: HeadCache, index: int, layer: Any, context: Context, device: torch.device
) -> None:
    record, state = context.manifest.layers[index], context.state
    if record.stock:
        prefix = f"{index}.stock."
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        put_back(layer, tensors, record.values, device)
    if not record.has_blocks or not isinstance(layer, HeadLayer):
        return
    layer.dtype, layer.device = _shape(record).dtype, device
    layer.is_initialized = True
    layer.length = context.manifest.stored_tokens
    if f"{index}.tail.k" in state and cache.backing.runner is not None:
        k, v = state[f"{index}.tail.k"].to(device), state[f"{index}.tail.v"].to(device)
        layer.length = cache.backing.runner.append(index, k, v)


def _shape(record: LayerRecord) -> KVShape:
    return KVShape(
        record.num_kv_heads, record.key_dim, record.value_dim, getattr(torch, record.dtype)
    )


def _read_head(context: Context, layer: int, part: Unfilled, place: int, verify: bool) -> None:
    """One head of `part` is filled; for a device in pieces, through host memory."""
    k, v, head = part.k[place], part.v[place], part.heads.start + place
    if k.device.type == "cpu":
        context.fill(layer, head, k, v, Span(0, k.shape[1]), verify=verify)
        return
    per_token = (k[:, :1].numel() + v[:, :1].numel()) * k.element_size()
    block = context.manifest.block_tokens
    step = max(BOUNCE_BYTES // per_token // block, 1) * block
    for start in range(0, k.shape[1], step):
        span = Span(start, min(start + step, k.shape[1]))
        here = slice(span.start, span.stop)
        host_k, host_v = (
            torch.empty(t[:, here].shape, dtype=t.dtype, device="cpu") for t in (k, v)
        )
        context.fill(layer, head, host_k, host_v, span, verify=verify)
        part.put(k[:, here], host_k)
        part.put(v[:, here], host_v)


def _mapper(context: Context, index: int) -> Callable[[HeadGroup, int], Mapped | None]:
    """Makes memory of a layer's files; None where their pages do not meet."""
    record, rows = context.manifest.layers[index], context.manifest.rows
    shape = _shape(record)
    widths = [dim * shape.dtype.itemsize for dim in (shape.key_dim, shape.value_dim)]
    unit = math.lcm(*(PAGE // math.gcd(width, PAGE) for width in widths if width))

    def adopt(heads: HeadGroup, capacity: int) -> Mapped | None:
        room = -(-capacity // unit) * unit
        runs = heads.heads * rows
        bases = [0, runs * room * widths[0]]
        pieces: list[Piece] = []
        for file, span in context.parts(index):
            descriptor = context.descriptor(file)
            for which, base, width in places(context.manifest, record, file):
                for run in range(runs if width else 0):
                    there = base + (heads.start * rows + run) * file.capacity * width
                    here = bases[which] + (run * room + span.start) * width
                    pieces.append(Piece(here, descriptor, there, span.tokens * width))
        if any(piece.offset % PAGE or piece.file_offset % PAGE for piece in pieces):
            return None
        total = sum(runs * room * width for width in widths)
        memory = mapped(total, pieces)
        k, v = (
            memory[base : base + runs * room * width]
            .view(shape.dtype)
            .view(heads.heads, rows, room, dim)
            for base, width, dim in zip(
                bases, widths, (shape.key_dim, shape.value_dim), strict=True
            )
        )
        return Mapped(memory, k, v, total - sum(piece.nbytes for piece in pieces))

    return adopt


def _mappings(context: Context) -> int:
    manifest = context.manifest
    return sum(
        2 * manifest.rows * manifest.layers[file.layer].num_kv_heads for file in manifest.files
    )


def _check_everything(context: Context) -> None:
    span = Span(0, context.manifest.stored_tokens)
    with ThreadPoolExecutor(THREADS, "headinfer-verify") as pool:
        jobs = [
            pool.submit(context.check, index, HeadGroup(head, head + 1), span)
            for index, record in enumerate(context.manifest.layers)
            for head in range(record.num_kv_heads)
        ]
        for job in jobs:
            job.result()


def _trusting(heads: HeadGroup, span: Span) -> bool:
    return True


class _Verifier:
    """Checks blocks before they are first read, the next layers' while a layer is attended."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(THREADS, "headinfer-verify")
        self._jobs: dict[int, list[Future[None]]] = {}

    def guard(self, layer: int) -> Guard:
        def look(heads: HeadGroup, span: Span) -> bool:
            stored = Span(0, self._context.manifest.stored_tokens)
            if not span.clip(stored).tokens:
                return False
            for ahead in range(layer, layer + AHEAD_LAYERS):
                self._begin(ahead)
            jobs = self._jobs[layer]
            for head in range(heads.start, heads.stop):
                jobs[head].result()
            return all(job.done() and job.exception() is None for job in jobs)

        return look

    def _begin(self, layer: int) -> None:
        records = self._context.manifest.layers
        if layer in self._jobs or layer >= len(records) or not records[layer].has_blocks:
            return
        span = Span(0, self._context.manifest.stored_tokens)
        self._jobs[layer] = [
            self._pool.submit(self._context.check, layer, HeadGroup(head, head + 1), span)
            for head in range(records[layer].num_kv_heads)
        ]

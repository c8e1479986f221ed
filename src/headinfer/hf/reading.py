# SPDX-License-Identifier: Apache-2.0
"""A text is read into a context on disk, and reading goes on where it was interrupted.

Checkpoints are made between chunks; a run that goes on begins at a chunk's border with the bytes
of the run before, so keys, values and answers are bit for bit those of a run never interrupted.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Unpack

from headinfer.errors import CacheStateError, InputError, SnapshotError, SnapshotMismatch
from headinfer.hf.backing import CacheOptions
from headinfer.hf.cache import HeadCache
from headinfer.hf.collect import collect, has_stock_state
from headinfer.hf.contexts import (
    Folder,
    Saved,
    check_room,
    disk_bytes,
    first_manifest,
    new_cache,
    new_writer,
    prepare_folder,
    writer_of,
)
from headinfer.hf.fingerprint import check_fingerprint, fingerprint_of
from headinfer.hf.prefill import chunk_of, prefill
from headinfer.hf.restore import restore
from headinfer.layout import BLOCK_TOKENS
from headinfer.snapshot import Context, ContextWriter, WriterLock, durable, exists, size_of
from headinfer.snapshot.manifest import NAME

OnStart = Callable[[int, int], None]
"""Told how many tokens are there already, and how many there will be."""


@dataclass(frozen=True, slots=True)
class Every:
    """When a checkpoint is due: after `seconds` or after `tokens`, the other is None."""

    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str | int | Every) -> Every:
        """From "30s", "5m", "512" or a number of tokens.

        Raises:
            InputError: neither a time nor a number of tokens.
        """
        if isinstance(text, Every):
            return text
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|)\s*", str(text))
        unit = {"s": 1, "m": 60, "h": 3600}
        if match is not None and match[2]:
            return cls(seconds=float(match[1]) * unit[match[2]])
        if match is not None and match[1].isdigit() and int(match[1]) >= 1:
            return cls(tokens=int(match[1]))
        raise InputError(
            f"checkpoint_every={text!r} is neither a time nor a number of tokens; write for example "
            "30s, 5m or 4096"
        )


def read_context(
    model: PreTrainedModel,
    input_ids: Tensor,
    path: Folder,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    checkpoint_every: str | int | Every = "30s",
    restart: bool = False,
    other_versions: bool = False,
    on_start: OnStart | None = None,
    prompt: dict[str, Any] | None = None,
    **options: Unpack[CacheOptions],
) -> HeadCache:
    """A cache that holds `input_ids`, and the same on disk at `path`, durably.

    If `path` holds the beginning of the same text, interrupted or complete, reading goes on from
    there. If it holds a text that begins like this one, the whole chunks that both share are kept
    and the rest is read again. Another text is refused.

    Args:
        model: runs with attn_implementation "headinfer", which `headinfer.attach` sets.
        input_ids: token ids [batch, tokens].
        path: a folder that is not there or empty, or a context.
        attention_mask: 0 for padding, of the shape of `input_ids`.
        tokenizer: also goes into the fingerprint.
        checkpoint_every: a time ("30s", "5m") or a number of tokens, rounded up to whole chunks.
        restart: forget what is at `path`.
        other_versions: also go on with what other versions of torch and transformers computed.
        on_start: told, before the first forward pass, the tokens that are there already.
        prompt: plain values kept in the manifest for whoever frames questions.
        options: see `CacheOptions`; those of the session attached to the model by default.

    Raises:
        SnapshotError: another text is there, or something that is no context.
        SnapshotMismatch: the context there belongs to another model.
        SnapshotLocked: another process writes to it.
        SnapshotWriteError: no room, or no permission.
        InputError, BudgetTooSmall, GpuOutOfMemory: as `headinfer.prefill`.
    """
    every = Every.parse(checkpoint_every)
    folder = Path(path)
    cache = new_cache(model, options)
    lock = prepare_folder(folder)
    try:
        job = _Reading(model, input_ids, attention_mask, folder, cache)
        writer = job.begin(lock, tokenizer, prompt or {}, restart, other_versions)
    except BaseException:
        lock.release()
        raise
    try:
        done = cache.get_seq_length()
        if on_start is not None:
            on_start(done, input_ids.shape[1])
        job.read(writer, every)
    finally:
        writer.close()
        if cache.backing.runner is not None:
            cache.backing.runner.before_change = _nothing
    cache.saved = Saved(folder, writer.manifest.id)
    return cache


class _Reading:
    """One text on its way into one context."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        folder: Path,
        cache: HeadCache,
    ) -> None:
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise InputError(f"input_ids of shape {tuple(input_ids.shape)}: give [batch, tokens]")
        self.model = model
        self.ids = input_ids
        self.mask = attention_mask
        self.folder = folder
        self.cache = cache
        self.chunk = chunk_of(model, cache, batch=input_ids.shape[0])

    @property
    def total(self) -> int:
        return int(self.ids.shape[1])

    @property
    def grid(self) -> int:
        """Multiples of this end a chunk and a block."""
        return math.lcm(self.chunk, BLOCK_TOKENS)

    def begin(
        self,
        lock: WriterLock,
        tokenizer: Any,
        prompt: dict[str, Any],
        restart: bool,
        other_versions: bool,
    ) -> ContextWriter:
        """The writer; the cache holds what can be kept of what is there."""
        if exists(self.folder) and not restart:
            return self._go_on(lock, tokenizer, prompt, other_versions)
        first = first_manifest(
            self.model,
            tokenizer,
            rows=self.ids.shape[0],
            wanted_tokens=self.total,
            chunk_tokens=self.chunk,
        )
        needed = disk_bytes(self.model, self.cache, self.total, rows=first.rows)
        check_room(self.folder, needed - size_of(self.folder))
        durable.remove(self.folder / NAME)
        durable.sync_folder(self.folder)
        return new_writer(self.folder, replace(first, prompt=prompt), lock)

    def read(self, writer: ContextWriter, every: Every) -> None:
        """Read what is missing; a checkpoint whenever one is due, and at the end."""
        done = self.cache.get_seq_length()
        points = _Checkpoints(self.cache, writer, every, done, self.grid)
        if done < self.total:
            try:
                prefill(
                    self.model,
                    self.ids[:, done:].to(self.model.device),
                    self.cache,
                    None if self.mask is None else self.mask.to(self.model.device),
                    self.chunk,
                    on_chunk=points.after_chunk,
                )
            except BaseException:
                points.interrupted()
                raise
        points.finish(self.total)

    def _go_on(
        self, lock: WriterLock, tokenizer: Any, prompt: dict[str, Any], other_versions: bool
    ) -> ContextWriter:
        context = Context(self.folder)
        manifest = context.manifest
        here = fingerprint_of(self.model, tokenizer)
        try:
            check_fingerprint(
                self.folder, manifest.fingerprint, here, other_versions=other_versions
            )
        except SnapshotMismatch as error:
            raise SnapshotMismatch(
                f"{error}, or begin again there with --restart (restart=True)",
                differences=error.differences,
            ) from error
        if manifest.chunk_tokens and self.cache.backing.options.chunk_tokens is None:
            self.chunk = manifest.chunk_tokens  # another would round differently
        keep = self._kept_tokens(context)
        missing = self.total - keep
        needed = disk_bytes(self.model, self.cache, missing, rows=manifest.rows)
        check_room(self.folder, needed)
        writer = writer_of(context, lock)
        if keep < manifest.tokens:
            records = [replace(layer, cuts=(0,), room=0) for layer in manifest.layers]
            writer.shorten(keep, {}, records)
            context = Context(self.folder)
        if context.manifest.tokens:
            restore(self.model, self.cache, context, verify="lazy")
        wanted = replace(writer.manifest, wanted_tokens=self.total, prompt=prompt)
        writer.manifest = replace(wanted, chunk_tokens=self.chunk)
        return writer

    def _kept_tokens(self, context: Context) -> int:
        """Of the tokens in `context`, those that reading this text goes on from.

        Raises:
            SnapshotError: it holds something else.
        """
        manifest = context.manifest
        common = self._common(context)
        if common == manifest.tokens and (common == self.total or not common % self.chunk):
            return common
        states = any(layer.stock for layer in manifest.layers)
        if common == manifest.tokens and states:
            return common  # off the grid of chunks: equal within rounding
        if manifest.prompt.get("turns"):
            raise SnapshotError(
                f"{self.folder} holds {manifest.tokens} tokens, questions and answers among them that "
                "reading the text again would drop; ask with --context, or begin again with "
                "--restart (restart=True)"
            )
        keep = 0 if states else common // self.grid * self.grid
        if not keep and manifest.tokens:
            why = "its windows or states cannot go back" if states and common else "nothing whole"
            raise SnapshotError(
                f"{self.folder} holds another text: {common} of its {manifest.tokens} tokens are "
                f"the first of these {self.total}, of which {why} can be kept. Save to another "
                "folder, or begin again with --restart (restart=True)"
            )
        return keep

    def _common(self, context: Context) -> int:
        """How many tokens both begin with."""
        saved, rows = context.token_ids, self.ids.shape[0]
        if saved is None or context.manifest.rows != rows:
            return 0
        count = min(len(saved), self.total)
        new = self.ids[:, :count].T.cpu().numpy().astype(np.int32)
        same = (new == saved[:count]).all(axis=1)
        padding = context.state.get("padding")
        if padding is not None or self.mask is not None:
            was = torch.ones(rows, count, device="cpu") if padding is None else padding[:, :count]
            now = (
                torch.ones(rows, count, device="cpu")
                if self.mask is None
                else self.mask[:, :count].cpu()
            )
            same &= (was.bool() == now.bool()).all(dim=0).numpy()
        return count if same.all() else int(same.argmin())


class _Checkpoints:
    """Decides when; the writer's thread does it."""

    def __init__(
        self, cache: HeadCache, writer: ContextWriter, every: Every, done: int, grid: int
    ) -> None:
        self._cache = cache
        self._writer = writer
        self._every = every
        self._complete = self._submitted = done
        self._grid = grid
        self._since = time.monotonic()

    def after_chunk(self, tokens: int) -> None:
        """`tokens` are complete."""
        runner = self._cache.backing.runner
        if runner is not None:
            runner.before_change = self._writer.settle
        self._complete = tokens
        # A number of tokens is a promise, and waits for the step before; a time is not.
        if self._due() and (self._every.tokens is not None or not self._writer.busy):
            self._submit(tokens)

    def finish(self, tokens: int) -> None:
        """Everything is durable."""
        self._writer.wait()
        manifest = self._writer.manifest
        if manifest.tokens < tokens or not manifest.serial:
            self._submit(tokens)
        self._writer.wait()

    def interrupted(self) -> None:
        """Whatever whole chunks there are become durable, if they can be told apart from what
        came after; the error that is on its way says more than one from here."""
        with contextlib.suppress(Exception):
            self._writer.wait()
            if any(map(has_stock_state, self._cache.layers)):
                return  # a pass that broke off has changed some windows and states already
            for tokens in (self._complete, self._complete // self._grid * self._grid):
                if tokens > self._writer.manifest.tokens:
                    with contextlib.suppress(CacheStateError):  # its tail is overwritten
                        self._submit(tokens)
                        self._writer.wait()

    def _due(self) -> bool:
        if self._every.tokens is not None:
            return self._complete - self._submitted >= self._every.tokens
        return time.monotonic() - self._since >= (self._every.seconds or 0.0)

    def _submit(self, tokens: int) -> None:
        self._writer.wait()
        self._writer.submit(collect(self._cache, self._writer.manifest, tokens))
        self._submitted, self._since = tokens, time.monotonic()


def _nothing() -> None:
    pass

# SPDX-License-Identifier: Apache-2.0
"""Writes a context while it grows: blocks from the memory they lie in, then the manifest.

One thread of its own does it, one step at a time, so that the model never waits for a disk; a
step that is not over makes the next one wait its turn, which bounds memory. Order within a step:
blocks, sums, token ids and state, all synced; then the manifest, which makes them count; then what
the old manifest alone referred to is removed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from headinfer.layout import BLOCK_TOKENS, Span
from headinfer.snapshot import durable
from headinfer.snapshot.blocks import Bytes, Run, add_sums, on_host, pieces_of
from headinfer.snapshot.lock import WriterLock
from headinfer.snapshot.manifest import RUN_TOKENS, BlockFile, LayerRecord, Manifest, Stream
from headinfer.snapshot.sums import SUMS, Running, sha256

FILE_BYTES = 2**30
"""A block file grows to this, if a run of tokens of one layer is not larger."""

SUMS_NAME, TOKENS_NAME = "sums.u32", "tokens.i32"


@dataclass(frozen=True, slots=True)
class Step:
    """What a context is to hold next.

    Attributes:
        tokens: its length.
        layers: records, with the stock values of this moment.
        runs: whole blocks from what is stored to the new length, every layer and head.
        state: tensors of the state file.
        token_ids: int32 [tokens, rows], all of them; None if they are not known.
        ready: returns when runs and state may be read; called on the writer's thread.
    """

    tokens: int
    layers: tuple[LayerRecord, ...]
    runs: tuple[Run, ...]
    state: Mapping[str, Tensor]
    token_ids: np.ndarray[Any, Any] | None
    ready: Callable[[], None] = lambda: None


class ContextWriter:
    """The one writer of a context, until `close`.

    Args:
        folder: exists.
        manifest: what it holds; of a new context, nothing, and not written yet.
        lock: held by the caller until now.
        kept: bytes of the sums and the token ids that the manifest counts.

    Attributes:
        manifest: what is durable.
        written_bytes: of blocks, by this writer.
        seconds: spent writing, on the thread; `cpu_seconds`: of those, computing.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, lock: WriterLock, kept: tuple[bytes, bytes | None]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.written_bytes = 0
        self.seconds = self.cpu_seconds = 0.0
        self._lock = lock
        self._sums, self._ids = Running(), Running()
        self._sums.add(kept[0])
        self._ids.add(kept[1] or b"")
        self._thread = ThreadPoolExecutor(1, "headinfer-save")
        self._step: Future[None] | None = None
        self._failed: BaseException | None = None
        self._open: dict[str, int] = {}
        self._clear_leftovers()

    @property
    def busy(self) -> bool:
        return self._step is not None and not self._step.done()

    def submit(self, step: Step) -> None:
        """Begin a step; waits for the one before.

        Raises:
            SnapshotWriteError: of the step before.
        """
        self.wait()
        self._step = self._thread.submit(self._run, step)

    def wait(self) -> None:
        """What was submitted is durable.

        Raises:
            SnapshotWriteError: it is not.
        """
        step, self._step = self._step, None
        if step is not None:
            self._failed = step.exception()
        if self._failed is not None:  # sums and ids may be ahead of the manifest: no more steps
            raise self._failed

    def settle(self) -> None:
        """Nothing is read from memory any more; an error waits for `wait`."""
        if self._step is not None:
            self._step.exception()

    def close(self) -> None:
        """End without another step; others may write from now on."""
        self.settle()
        self._thread.shutdown()
        for descriptor in self._open.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._open.clear()
        self._lock.release()

    def shorten(
        self, tokens: int, state: Mapping[str, Tensor], layers: Sequence[LayerRecord]
    ) -> None:
        """The context holds its first `tokens` tokens only, a multiple of the block.

        Bytes beyond stay as they are for whoever reads them now: what follows goes to new files.
        """
        self.wait()
        old = self.manifest
        files = tuple(
            replace(file, stop=min(file.stop, tokens)) for file in old.files if file.start < tokens
        )
        blocks = tokens // BLOCK_TOKENS
        self._sums = self._kept(SUMS_NAME, blocks * old.row_sums * SUMS.itemsize)
        self._ids = self._kept(TOKENS_NAME, tokens * old.rows * 4)
        manifest = replace(
            old, tokens=tokens, stored_tokens=tokens, files=files, layers=tuple(layers)
        )
        self._commit(manifest, state)

    def _run(self, step: Step) -> None:
        started, computed = time.perf_counter(), time.thread_time()
        step.ready()
        self._write_step(step)
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.thread_time() - computed

    def _write_step(self, step: Step) -> None:
        old = self.manifest
        stored = step.tokens // BLOCK_TOKENS * BLOCK_TOKENS
        manifest = replace(
            old,
            tokens=step.tokens,
            stored_tokens=stored,
            wanted_tokens=max(old.wanted_tokens, step.tokens),
            layers=step.layers,
        )
        if stored > old.stored_tokens:
            manifest, sums = self._write_blocks(
                manifest, step.runs, Span(old.stored_tokens, stored)
            )
            self._append(SUMS_NAME, self._sums, sums.tobytes())
        if step.token_ids is not None:
            there = self._ids.nbytes // (4 * old.rows)
            self._append(TOKENS_NAME, self._ids, step.token_ids[there : step.tokens].tobytes())
        self._commit(manifest, step.state, known=step.token_ids is not None)

    def _commit(
        self, manifest: Manifest, state: Mapping[str, Tensor], *, known: bool | None = None
    ) -> None:
        old = self.manifest
        serial = old.serial + 1
        known = manifest.token_ids is not None if known is None else known
        data = save({name: on_host(tensor) for name, tensor in state.items()})
        name = f"state-{serial:06d}.safetensors"
        durable.replace(self.folder / name, data)
        sums = Stream(SUMS_NAME, self._sums.nbytes, self._sums.hex)
        ids = Stream(TOKENS_NAME, self._ids.nbytes, self._ids.hex) if known else None
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        manifest = replace(
            manifest,
            serial=serial,
            sums=sums,
            token_ids=ids,
            state=Stream(name, len(data), sha256(data)),
            updated=now,
            created=manifest.created or now,
        )
        manifest.write(self.folder)
        self.manifest = manifest
        held = {file.name for file in manifest.files}
        gone = [file.name for file in old.files if file.name not in held]
        for unused in [*gone, old.state.name]:
            if unused and unused != name:
                self._forget(unused)
                durable.remove(self.folder / unused)

    def _write_blocks(
        self, manifest: Manifest, runs: Sequence[Run], span: Span
    ) -> tuple[Manifest, np.ndarray[Any, Any]]:
        """The blocks of `span` are in files, synced; their sums [block, head of all layers]."""
        first, blocks = span.start // BLOCK_TOKENS, span.tokens // BLOCK_TOKENS
        sums = np.zeros((blocks, manifest.row_sums), dtype=SUMS)
        files = list(manifest.files)
        slots = manifest.slots
        touched: set[str] = set()
        for index, layer in enumerate(manifest.layers):
            if not layer.has_blocks:
                continue
            mine = [run for run in runs if run.layer == index]
            position = span.start
            while position < span.stop:
                file = self._file_for(manifest, files, index, position, span.stop)
                stop = min(span.stop, file.stop)
                for start, head, k, v in pieces_of(mine, Span(position, stop)):
                    self._write_piece(file, layer, manifest.rows, start, head, k, v)
                    add_sums(sums[start // BLOCK_TOKENS - first :, slots[index] + head :], k, v)
                touched.add(file.name)
                position = stop
        for name in sorted(touched):
            durable.sync(self._descriptor(name), self.folder / name)
        durable.sync_folder(self.folder)
        return replace(manifest, files=tuple(files)), sums

    def _write_piece(
        self,
        file: BlockFile,
        layer: LayerRecord,
        rows: int,
        start: int,
        head: int,
        k: Bytes,
        v: Bytes,
    ) -> None:
        """k, v uint8 [row, head, token, bytes] from token `start` and head `head` on."""
        descriptor, path = self._descriptor(file.name), self.folder / file.name
        base = 0
        for part in (k, v):
            width = part.shape[3]
            for row in range(rows):
                for place in range(part.shape[1]):
                    run = (head + place) * rows + row
                    offset = base + (run * file.capacity + start - file.start) * width
                    if width:
                        durable.write_at(descriptor, part[row, place], offset, path)
            self.written_bytes += part.nbytes
            base = layer.num_kv_heads * rows * file.capacity * width

    def _file_for(
        self, manifest: Manifest, files: list[BlockFile], layer: int, token: int, stop: int
    ) -> BlockFile:
        """The file that takes token `token`; made if there is none with room."""
        for file in files:
            if file.layer == layer and file.start <= token < file.stop:
                return file
        record = manifest.layers[layer]
        itemsize = getattr(torch, record.dtype).itemsize
        width = (record.key_dim + record.value_dim) * itemsize
        per_token = record.num_kv_heads * manifest.rows * width
        wanted = max(manifest.wanted_tokens, stop) - token
        # Without a length beforehand files double, so that there are few of them.
        wanted = max(wanted, token)
        most = max(FILE_BYTES // per_token // RUN_TOKENS, 1)
        capacity = min(-(-wanted // RUN_TOKENS), most) * RUN_TOKENS
        name = f"layer-{layer:03d}-token-{token:09d}-{manifest.serial:06d}.kv"
        file = BlockFile(name, layer, token, capacity, token + capacity)
        files.append(file)
        return file

    def _append(self, name: str, stream: Running, data: bytes) -> None:
        path = self.folder / name
        durable.write_at(self._descriptor(name), data, stream.nbytes, path)
        durable.sync(self._descriptor(name), path)
        stream.add(data)

    def _kept(self, name: str, nbytes: int) -> Running:
        """The first `nbytes` of a stream, as it is now."""
        found = Running()
        path = self.folder / name
        if path.exists():
            with path.open("rb") as file:
                found.add(file.read(nbytes))
        return found

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = durable.open_for_writing(self.folder / name)
        return self._open[name]

    def _forget(self, name: str) -> None:
        descriptor = self._open.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def _clear_leftovers(self) -> None:
        """What an interrupted writer left and no manifest names."""
        named = {file.name for file in self.manifest.files} | {self.manifest.state.name}
        for path in self.folder.iterdir():
            ours = path.name.endswith((".kv", ".safetensors", durable.UNFINISHED))
            if ours and path.name not in named:
                durable.remove(path)

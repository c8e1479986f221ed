# SPDX-License-Identifier: Apache-2.0
"""Reads a saved context: small files at once and checked, blocks when they are wanted.

Any number of readers, in any process, while one writes: a manifest read once stays true, because
what it counts is never changed. Blocks go into memory through `fill`, or are looked at where they
are through `check`; both compare them with their checksums.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from headinfer.errors import SnapshotCorrupt, SnapshotError
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span
from headinfer.snapshot.manifest import BlockFile, LayerRecord, Manifest, Stream
from headinfer.snapshot.sums import SUMS, sha256

READ_BYTES = 4 * 2**20
"""Read in one call at most."""

TRIES = 3
"""A writer may replace the manifest, and remove what the old one named, while we read."""


class Context:
    """A context as its manifest was when this was made.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
        token_ids: int32 [token, row]; None if they are not known.

    Raises:
        SnapshotError: there is none, or it cannot be read.
        SnapshotCorrupt: a file is missing, too short, or not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for left in reversed(range(TRIES)):
            self.manifest = Manifest.read(folder)
            try:
                self._read_small()
                break
            except SnapshotCorrupt:
                if not left or Manifest.read(folder).serial == self.manifest.serial:
                    raise
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def _read_small(self) -> None:
        manifest = self.manifest
        self.sums_bytes = self._stream(manifest.sums)
        self.sums = np.frombuffer(self.sums_bytes, dtype=SUMS).reshape(-1, manifest.row_sums or 1)
        self.ids_bytes: bytes | None = None
        self.token_ids: np.ndarray[Any, Any] | None = None
        if manifest.token_ids is not None:
            self.ids_bytes = self._stream(manifest.token_ids)
            self.token_ids = np.frombuffer(self.ids_bytes, "<i4").reshape(-1, manifest.rows)
        self.state: dict[str, Tensor] = load(self._stream(manifest.state))
        for file in manifest.files:
            self._check_size(file)

    def close(self) -> None:
        """Close the files; what is mapped stays."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def descriptor(self, file: BlockFile) -> int:
        """Of a block file, open for reading as long as this is."""
        with self._lock:
            if file.name not in self._descriptors:
                path = self.folder / file.name
                with self._named(path):
                    self._descriptors[file.name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file.name]

    def check(self, layer: int, heads: HeadGroup, span: Span) -> None:
        """The blocks of `span` are what was written.

        Raises:
            SnapshotCorrupt: the first that is not, by file, head and tokens.
        """
        for head in range(heads.start, heads.stop):
            self._scan(layer, head, span, None, verify=True)

    def fill(
        self, layer: int, head: int, k: Tensor, v: Tensor, span: Span, *, verify: bool
    ) -> None:
        """k, v [row, token, dim], contiguous in host memory, hold the blocks of `span`.

        Raises:
            SnapshotCorrupt: they are not what was written.
        """
        self._scan(layer, head, span, (_bytes(k), _bytes(v)), verify=verify)

    def check_all(self) -> Iterator[int]:
        """Check every block; yields the index of each layer that is sound.

        Raises:
            SnapshotCorrupt: the first block that is not.
        """
        for index, layer in enumerate(self.manifest.layers):
            if layer.has_blocks:
                span = Span(0, self.manifest.stored_tokens)
                self.check(index, HeadGroup(0, layer.num_kv_heads), span)
            yield index

    def parts(self, layer: int) -> list[tuple[BlockFile, Span]]:
        """The files of a layer and the stored tokens that each holds."""
        stored = Span(0, self.manifest.stored_tokens)
        found = [
            (file, Span(file.start, file.stop).clip(stored))
            for file in self.manifest.files_of(layer)
        ]
        return [(file, span) for file, span in found if span.tokens]

    def _scan(
        self,
        layer: int,
        head: int,
        span: Span,
        into: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None,
        *,
        verify: bool,
    ) -> None:
        record = self.manifest.layers[layer]
        for file, there in self.parts(layer):
            part = there.clip(span)
            if not part.tokens:
                continue
            blocks = range(part.start // BLOCK_TOKENS, part.stop // BLOCK_TOKENS)
            values = [0] * len(blocks)
            for which, base, width in places(self.manifest, record, file):
                for row in range(self.manifest.rows if width else 0):
                    run = base + (head * self.manifest.rows + row) * file.capacity * width
                    target = None
                    if into is not None:
                        rows = into[which][row]
                        target = rows[part.start - span.start : part.stop - span.start]
                    self._read_run(file, run, width, part, target, values if verify else None)
            if verify:
                self._compare(file, layer, head, blocks, values)

    def _read_run(
        self,
        file: BlockFile,
        run: int,
        width: int,
        part: Span,
        target: np.ndarray[Any, Any] | None,
        values: list[int] | None,
    ) -> None:
        """Tokens `part` of a run that begins at byte `run`, `width` bytes each."""
        step = max(READ_BYTES // (BLOCK_TOKENS * width), 1) * BLOCK_TOKENS
        if target is None:
            scratch = np.empty((min(step, part.tokens), width), dtype=np.uint8)
        for start in range(0, part.tokens, step):
            count = min(step, part.tokens - start)
            piece = scratch[:count] if target is None else target[start : start + count]
            self._read(file, run + (part.start - file.start + start) * width, piece)
            if values is not None:
                add_sums(values, start // BLOCK_TOKENS, piece)

    def _read(self, file: BlockFile, offset: int, piece: np.ndarray[Any, Any]) -> None:
        view, path = piece.data.cast("B"), self.folder / file.name
        descriptor, done = self.descriptor(file), 0
        with self._named(path):
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if not count:
                    raise SnapshotCorrupt(
                        f"{path} ends {len(view) - done} bytes too early, at byte {offset + done}: "
                        f"it was cut short. {_remedy(self.folder)}",
                        path=str(path),
                    )
                done += count

    def _compare(
        self, file: BlockFile, layer: int, head: int, blocks: range, values: list[int]
    ) -> None:
        slot = self.manifest.slots[layer] + head
        for block, value in zip(blocks, values, strict=True):
            expected = int(self.sums[block, slot])
            if value != expected:
                path = self.folder / file.name
                first = block * BLOCK_TOKENS
                raise SnapshotCorrupt(
                    f"{path} is damaged: tokens {first} to {first + BLOCK_TOKENS - 1} of layer "
                    f"{layer}, KV head {head}, have checksum {value:08x} instead of "
                    f"{expected:08x}. {_remedy(self.folder)}",
                    path=str(path),
                )

    def _stream(self, stream: Stream) -> bytes:
        """What counts of a small file."""
        if not stream.nbytes:
            return b""  # there is no file before the first whole block
        path = self.folder / stream.name
        with self._named(path), path.open("rb") as file:
            data = file.read(stream.nbytes)
        if len(data) != stream.nbytes:
            raise SnapshotCorrupt(
                f"{path} has {len(data)} of {stream.nbytes} bytes: it was cut short. "
                f"{_remedy(self.folder)}",
                path=str(path),
            )
        if sha256(data) != stream.sha256:
            raise SnapshotCorrupt(
                f"{path} is damaged: its SHA-256 is not the one in the manifest. "
                f"{_remedy(self.folder)}",
                path=str(path),
            )
        return data

    def _check_size(self, file: BlockFile) -> None:
        path, record = self.folder / file.name, self.manifest.layers[file.layer]
        tokens = Span(file.start, file.stop).clip(Span(0, self.manifest.stored_tokens)).tokens
        needed = 0
        for _, base, width in places(self.manifest, record, file):
            runs = record.num_kv_heads * self.manifest.rows
            if width and tokens:
                needed = base + ((runs - 1) * file.capacity + tokens) * width
        with self._named(path):
            size = path.stat().st_size
        if size < needed:
            raise SnapshotCorrupt(
                f"{path} has {size} bytes, {needed} are counted: it was cut short. "
                f"{_remedy(self.folder)}",
                path=str(path),
            )

    @contextlib.contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise SnapshotCorrupt(
                f"{path} is missing, and the manifest counts on it. {_remedy(self.folder)}",
                path=str(path),
            ) from error
        except PermissionError as error:
            raise SnapshotError(f"{path} cannot be read: {error.strerror}") from error
        except OSError as error:
            raise SnapshotCorrupt(
                f"{path} cannot be read: {error.strerror}. {_remedy(self.folder)}", path=str(path)
            ) from error


def places(
    manifest: Manifest, record: LayerRecord, file: BlockFile
) -> Iterator[tuple[int, int, int]]:
    """For keys and for values: 0 or 1, first byte in the file, bytes of a token of one row."""
    itemsize = getattr(torch, record.dtype).itemsize
    base = 0
    for which, dim in enumerate((record.key_dim, record.value_dim)):
        yield which, base, dim * itemsize
        base += record.num_kv_heads * manifest.rows * file.capacity * dim * itemsize


def add_sums(values: list[int], first: int, piece: np.ndarray[Any, Any]) -> None:
    """Carry the sums of the blocks from `first` on over `piece` [token, byte]."""
    for place in range(piece.shape[0] // BLOCK_TOKENS):
        block = piece[place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS]
        values[first + place] = zlib.crc32(block.data, values[first + place])


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    if not tensor.numel():
        return np.empty(tensor.shape, dtype=np.uint8)
    found: np.ndarray[Any, Any] = tensor.view(torch.uint8).numpy()
    return found


def _remedy(folder: Path) -> str:
    return (
        f"Restore the file from a backup, or remove the context (headinfer contexts remove "
        f"{folder}) and read the text again"
    )

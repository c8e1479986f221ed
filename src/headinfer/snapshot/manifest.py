# SPDX-License-Identifier: Apache-2.0
"""The manifest of a saved context: what is valid, where it lies, which model it belongs to.

Everything else in the folder counts only as far as the manifest says, and the manifest is
replaced in one step; so a crash leaves the context as it was, with bytes beyond it that nobody
refers to. docs/contexts.md describes every field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from headinfer.errors import SnapshotCorrupt, SnapshotError
from headinfer.layout import BLOCK_TOKENS
from headinfer.snapshot import durable

NAME = "manifest.json"
FORMAT = "headinfer context"
VERSION = 1
PAGE_BYTES = 4096
RUN_TOKENS = 2048
"""Capacities are multiples of this, so that the run of every head begins at a page."""


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One layer.

    Attributes:
        kind: "heads" (blocks, per KV head), "stock" (tensors in the state file alone) or "both".
        num_kv_heads, key_dim, value_dim, dtype: of a layer with blocks; 0 and "" if it is empty.
        cuts: first tokens of the runs it was attended in, so that sums keep their order; the last
            had room up to token `room`.
        stock: class of the layer as transformers names it, "" without stock state.
        values: what the stock layer holds besides tensors.
    """

    kind: str
    num_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    dtype: str = ""
    cuts: tuple[int, ...] = (0,)
    room: int = 0
    stock: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def has_blocks(self) -> bool:
        return self.num_kv_heads > 0


@dataclass(frozen=True, slots=True)
class BlockFile:
    """One file of one layer: keys [heads, rows, capacity, key_dim], then values.

    Attributes:
        name: in the context's folder.
        layer: index.
        start: first token.
        capacity: tokens there is room for.
        stop: tokens from here on are elsewhere, even if there is room.
    """

    name: str
    layer: int
    start: int
    capacity: int
    stop: int


@dataclass(frozen=True, slots=True)
class Stream:
    """A file that is only added to; its first `nbytes` bytes count."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a context holds; see docs/contexts.md.

    Attributes:
        id: names the context, whatever its folder is called.
        serial: counts manifests; also used for names that must be new.
        tokens: length, unfinished blocks included.
        stored_tokens: of those, the ones in block files: whole blocks.
        wanted_tokens: length when what is being read is complete.
        rows: sequences.
        chunk_tokens: tokens per forward pass of the prefill.
        kv_format: how keys and values are stored.
        layers, files: see there.
        sums: a CRC-32 per block, layer and head.
        token_ids: int32 [token, row]; None if they are not known.
        state: what changes with every token: tails, windows, recurrent states.
        fingerprint: which model it belongs to.
        prompt: how the command line framed the text; not read here.
        created, updated, writer: for people.
    """

    id: str
    serial: int
    tokens: int
    stored_tokens: int
    wanted_tokens: int
    rows: int
    chunk_tokens: int
    kv_format: str
    layers: tuple[LayerRecord, ...]
    files: tuple[BlockFile, ...]
    sums: Stream
    token_ids: Stream | None
    state: Stream
    fingerprint: dict[str, Any]
    prompt: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    updated: str = ""
    writer: str = ""
    block_tokens: int = BLOCK_TOKENS

    @property
    def complete(self) -> bool:
        return self.tokens >= self.wanted_tokens

    @property
    def slots(self) -> list[int]:
        """Per layer, the place of its first head in a row of sums."""
        found, place = [], 0
        for layer in self.layers:
            found.append(place)
            place += layer.num_kv_heads
        return found

    @property
    def row_sums(self) -> int:
        """Sums per block."""
        return sum(layer.num_kv_heads for layer in self.layers)

    def files_of(self, layer: int) -> list[BlockFile]:
        """In order of their tokens."""
        return sorted((f for f in self.files if f.layer == layer), key=lambda f: f.start)

    def to_bytes(self) -> bytes:
        """As the file holds it: JSON whose last entry is the SHA-256 of the others."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body["sha256"] = _digest(body)
        return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()

    def write(self, folder: Path) -> None:
        """The context is from now on what this says, durably."""
        durable.replace(folder / NAME, self.to_bytes())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest in `folder`.

        Raises:
            SnapshotError: there is no context, or one of a version that is not known.
            SnapshotCorrupt: it is not what was written.
        """
        path = folder / NAME
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SnapshotError(_no_context(folder)) from error
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read: {error.strerror}") from error
        return cls._parse(path, data)

    @classmethod
    def _parse(cls, path: Path, data: bytes) -> Self:
        try:
            body = json.loads(data)
        except ValueError as error:
            raise _damaged(path, f"it is not JSON ({error})") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise SnapshotError(
                f"{path.parent} is not a saved context: its {NAME} has another purpose"
            )
        version = body.get("version")
        if version != VERSION:
            raise SnapshotError(
                f"{path.parent} has version {version} of the format; this headinfer reads version "
                f"{VERSION}. It was written by headinfer {body.get('writer') or 'of unknown version'}"
                ": use that version or a newer one"
            )
        expected = body.pop("sha256", None)
        if expected != _digest(body):
            raise _damaged(path, "its checksum is another")
        try:
            return cls._from(body)
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"fields are missing or strange ({error})") from error

    @classmethod
    def _from(cls, body: Mapping[str, Any]) -> Self:
        given = {item.name: body[item.name] for item in fields(cls)}
        given["layers"] = tuple(
            LayerRecord(**{**layer, "cuts": tuple(layer["cuts"])}) for layer in given["layers"]
        )
        given["files"] = tuple(BlockFile(**found) for found in given["files"])
        for name in ("sums", "token_ids", "state"):
            given[name] = None if given[name] is None else Stream(**given[name])
        return cls(**given)


def exists(folder: Path) -> bool:
    """Whether `folder` is, or looks like, a context."""
    return (folder / NAME).is_file()


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _no_context(folder: Path) -> str:
    if not folder.exists():
        return (
            f"there is no context {folder}; make one with headinfer run MODEL FILE --save {folder}"
        )
    if not folder.is_dir():
        return f"{folder} is a file; a saved context is a folder with a {NAME}"
    return f"the folder {folder} is not a saved context: it has no {NAME}"


def _damaged(path: Path, why: str) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        f"{path} is damaged: {why}. Restore it from a backup, or remove the context "
        f"(headinfer contexts remove {path.parent}) and read the text again",
        path=str(path),
    )

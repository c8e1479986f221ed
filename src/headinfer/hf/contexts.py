# SPDX-License-Identifier: Apache-2.0
"""Saved contexts for users: a cache goes to disk and comes back without a prefill.

Loading maps the files where the CPU reads host memory in place, and reads them in parallel where
it is page-locked or on a device. What comes after goes to fresh memory, so any number of questions
leave a context as it is.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Unpack

import headinfer
from headinfer.budget import format_bytes
from headinfer.errors import CacheStateError, InputError, SnapshotError, SnapshotWriteError
from headinfer.geometry import EXACT
from headinfer.hf.attach import session_of
from headinfer.hf.backing import CacheOptions
from headinfer.hf.cache import HeadCache
from headinfer.hf.collect import collect, has_stock_state, rows_of
from headinfer.hf.fingerprint import check_fingerprint, fingerprint_of
from headinfer.hf.geometry import weight_bytes_of
from headinfer.hf.restore import restore
from headinfer.snapshot import (
    Context,
    ContextWriter,
    Manifest,
    Stream,
    WriterLock,
    durable,
    exists,
    is_ours,
)
from headinfer.snapshot.writer import SUMS_NAME

Verify = Literal["lazy", "now", "never"]
Folder = str | os.PathLike[str]


@dataclass(slots=True)
class Saved:
    """The context a cache came from or went to.

    Attributes:
        folder, id: which.
        writer: while the cache may extend it.
    """

    folder: Path
    id: str
    writer: ContextWriter | None = None

    def close(self) -> None:
        """The cache extends the context no more; others may write to it."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        return Saved(self.folder, self.id)  # one writer


def save_context(
    model: PreTrainedModel,
    cache: HeadCache,
    path: Folder,
    *,
    tokenizer: Any = None,
    token_ids: Tensor | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> None:
    """The context that `cache` holds is on disk at `path`, durably.

    A new folder is made; the context that `cache` was loaded from, or saved to, is extended.

    Args:
        model: whose context it is.
        cache: not empty, between forward passes.
        path: a folder that is not there or empty, or the context the cache belongs to.
        tokenizer: also goes into the fingerprint.
        token_ids: ids [b, t] of what the cache holds, if no session saw them.
        prompt: plain values kept in the manifest for whoever frames questions.

    Raises:
        CacheStateError: the cache is empty, or a forward pass failed midway.
        InputError: `token_ids` of another length.
        SnapshotError: another context is there, or this cache has gone another way since.
        SnapshotLocked: another process writes to it.
        SnapshotWriteError: the disk is full, or there is no permission.
    """
    folder = Path(path)
    tokens = cache.get_seq_length() if isinstance(cache, HeadCache) else 0
    if not tokens:
        raise CacheStateError("there is nothing to save: give a HeadCache that holds tokens")
    if cache.log.passing and any(map(has_stock_state, cache.layers)):
        raise CacheStateError(
            "the last forward pass broke off and left windows or states of different tokens: call "
            "reset() and prefill again"
        )
    _take_ids(cache, token_ids, tokens)
    writer, held = _writer_for(model, cache, folder, tokenizer)
    if prompt is not None:
        writer.manifest = replace(writer.manifest, prompt=dict(prompt))
    try:
        writer.submit(collect(cache, writer.manifest, tokens))
        writer.wait()
    finally:
        if not held:
            writer.close()
    cache.saved = Saved(folder, writer.manifest.id, writer if held else None)


def load_context(
    model: PreTrainedModel,
    path: Folder,
    *,
    tokenizer: Any = None,
    append: bool = False,
    verify: Verify = "lazy",
    other_versions: bool = False,
    **options: Unpack[CacheOptions],
) -> HeadCache:
    """A cache that holds the saved context, to be passed to the model.

    Its `token_ids` are those of the context: `generate()` wants them in front of the new ones.

    Args:
        model: the one the context was made with; it has to run with attn_implementation
            "headinfer", which `headinfer.attach` sets.
        path: the context's folder.
        tokenizer: compared with the one the context was made with.
        append: hold the writer's lock, so that `save_context` can extend it.
        verify: compare blocks with their checksums before they are first read ("lazy"), before
            this returns ("now"), or not at all ("never").
        other_versions: also accept other versions of torch and transformers.
        options: see `CacheOptions`; those of the session attached to the model by default.

    Raises:
        SnapshotError: there is no context, or of a newer version.
        SnapshotMismatch: it belongs to another model; says what differs.
        SnapshotCorrupt: a file is missing, cut short or changed.
        SnapshotLocked: `append`, and another process writes to it.
        TierFull, BudgetTooSmall: it does not fit.
    """
    if verify not in ("lazy", "now", "never"):
        raise InputError(f"verify={verify!r} is not known; use 'lazy', 'now' or 'never'")
    folder = Path(path)
    if append and not exists(folder):
        Manifest.read(folder)  # says what is there instead
    lock = WriterLock(folder) if append else None
    try:
        context = Context(folder)
        here = fingerprint_of(model, tokenizer)
        check_fingerprint(folder, context.manifest.fingerprint, here, other_versions=other_versions)
        cache = new_cache(model, options)
        restore(model, cache, context, verify=verify)
        cache.saved = Saved(folder, context.manifest.id)
        if lock is not None:
            cache.saved.writer = writer_of(context, lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return cache


def new_cache(model: PreTrainedModel, options: CacheOptions) -> HeadCache:
    """An empty cache for `model`, with the options of its session below those given."""
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder: its text goes through the encoder, "
            "which keeps no cache that could be saved"
        )
    session = session_of(model)
    if session is not None:
        return session.new_cache(**options)
    weights = weight_bytes_of(model, model.device)
    return HeadCache(model.config, weight_bytes=weights, **options)


def writer_of(context: Context, lock: WriterLock) -> ContextWriter:
    """Goes on with `context`."""
    kept = context.sums_bytes, context.ids_bytes
    return ContextWriter(context.folder, context.manifest, lock, kept)


def new_writer(folder: Path, first: Manifest, lock: WriterLock) -> ContextWriter:
    """Begins a context in `folder`, which is locked."""
    return ContextWriter(folder, first, lock, (b"", b""))


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises SnapshotWriteError if `folder` has no room for `needed_bytes` more."""
    free = durable.free_bytes(folder)
    if needed_bytes > free:
        raise SnapshotWriteError(
            f"the context {folder} will take {format_bytes(needed_bytes)} on disk, and "
            f"{format_bytes(free)} are free there. Free {format_bytes(needed_bytes - free)}, name "
            "a folder on another disk, or shorten the text",
            path=str(folder),
            code=errno.ENOSPC,
        )


def first_manifest(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    rows: int,
    wanted_tokens: int,
    chunk_tokens: int,
) -> Manifest:
    """Of a context that holds nothing yet."""
    return Manifest(
        id=uuid.uuid4().hex,
        serial=0,
        tokens=0,
        stored_tokens=0,
        wanted_tokens=wanted_tokens,
        rows=rows,
        chunk_tokens=chunk_tokens,
        kv_format=EXACT.name,  # decoded: any cache can hold it again
        layers=(),
        files=(),
        sums=Stream(SUMS_NAME, 0, ""),
        token_ids=None,
        state=Stream("", 0, ""),
        fingerprint=fingerprint_of(model, tokenizer),
        writer=headinfer.__version__,
    )


def prepare_folder(folder: Path) -> WriterLock:
    """`folder` is there, nobody else's, and locked.

    Raises:
        SnapshotError: something else is there.
        SnapshotLocked: another process writes to it.
        SnapshotWriteError: it cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise SnapshotError(f"{folder} is a file; name a folder for the context")
    with durable.explained(folder, "made"):
        there = list(folder.iterdir()) if folder.exists() else []
        # Without a manifest: what a writer leaves that was stopped before it had begun.
        strange = [item.name for item in there if not is_ours(item.name)]
        if strange and not exists(folder):
            raise SnapshotError(
                f"the folder {folder} is not a saved context and not empty ({strange[0]} is in "
                "it); name a folder that is not there yet"
            )
        folder.mkdir(parents=True, exist_ok=True)
    return WriterLock(folder)


def _take_ids(cache: HeadCache, token_ids: Tensor | None, tokens: int) -> None:
    if token_ids is None:
        return
    if token_ids.ndim != 2 or token_ids.shape[1] != tokens:
        raise InputError(
            f"token_ids of shape {tuple(token_ids.shape)}: the cache holds {tokens} tokens of "
            f"{rows_of(cache)} sequences"
        )
    cache.log.clear()
    cache.log.note(0, token_ids, None)


def _writer_for(
    model: PreTrainedModel, cache: HeadCache, folder: Path, tokenizer: Any
) -> tuple[ContextWriter, bool]:
    """The writer, and whether the cache held it already."""
    saved = cache.saved
    if saved is not None and saved.writer is not None and saved.folder == folder:
        _check_same_way(cache, saved.writer.manifest, folder, _ids_of(saved.writer))
        return saved.writer, True
    lock = prepare_folder(folder)
    try:
        if exists(folder):
            context = Context(folder)
            if saved is None or saved.id != context.manifest.id:
                raise SnapshotError(
                    f"{folder} holds another context already; name another folder, or remove it "
                    f"(headinfer contexts remove {folder})"
                )
            _check_same_way(cache, context.manifest, folder, context.token_ids)
            return writer_of(context, lock), False
        tokens, plan = cache.get_seq_length(), cache.plan
        first = first_manifest(
            model,
            tokenizer,
            rows=rows_of(cache),
            wanted_tokens=tokens,
            chunk_tokens=0 if plan is None else plan.chunk_tokens,
        )
        check_room(folder, disk_bytes(model, cache, tokens, rows=first.rows))
        return new_writer(folder, first, lock), False
    except BaseException:
        lock.release()
        raise


def disk_bytes(model: PreTrainedModel, cache: HeadCache, tokens: int, *, rows: int) -> int:
    """What `tokens` tokens of a cache take on disk, nearly."""
    geometry = cache.backing.geometry
    if geometry is None:
        return 0
    return replace(geometry, itemsize=model.dtype.itemsize).kv_bytes(tokens, batch=rows)


def _check_same_way(cache: HeadCache, manifest: Manifest, folder: Path, saved_ids: Any) -> None:
    """The context is the beginning of what the cache holds."""
    tokens = cache.get_seq_length()
    held = cache.log.ids(tokens)
    if held is not None and saved_ids is not None and tokens >= manifest.tokens:
        beginning = held[:, : manifest.tokens].T.to(torch.int32)
        if torch.equal(beginning, torch.from_numpy(saved_ids.copy())):
            return
    raise SnapshotError(
        f"{folder} holds {manifest.tokens} tokens that are not the first of the {tokens} in this "
        "cache, as far as they are known: it was cropped, or went another way. Save to another folder"
    )


def _ids_of(writer: ContextWriter) -> Any:
    return Context(writer.folder).token_ids if writer.manifest.serial else None

# SPDX-License-Identifier: Apache-2.0
"""What lies where in a context: the page in docs is enough to read one, and versions are told apart."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.errors import SnapshotCorrupt, SnapshotError
from headinfer.snapshot import Context, Manifest, manifest
from headinfer.snapshot import writer as writing


def read_as_a_stranger(folder: Path, layer: int, head: int) -> tuple[list[int], Any]:
    """Token ids, and keys of one head, of row 0, of the tokens in blocks: docs/contexts.md alone."""
    told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    ids = np.fromfile(folder / told["token_ids"]["name"], "<i4").reshape(-1, told["rows"])
    record = told["layers"][layer]
    width = record["key_dim"] * np.dtype(record["dtype"]).itemsize
    keys = np.zeros((told["stored_tokens"], record["key_dim"]), record["dtype"])
    for file in told["files"]:
        stop = min(file["stop"], told["stored_tokens"])
        if file["layer"] != layer or stop <= file["start"]:
            continue
        with (folder / file["name"]).open("rb") as opened:
            opened.seek(head * told["rows"] * file["capacity"] * width)
            data = opened.read((stop - file["start"]) * width)
        found = np.frombuffer(data, record["dtype"]).reshape(-1, record["key_dim"])
        keys[file["start"] : stop] = found
    return ids[: told["tokens"], 0].tolist(), keys


def test_a_stranger_can_read_ids_and_keys(
    context: Path, llama: Any, attached: Any, ids: Tensor
) -> None:
    cache = headinfer.load_context(llama, context)
    found, keys = read_as_a_stranger(context, 1, 1)
    assert found == ids[0, :300].tolist()
    expected = cache.layers[1].gather(256, values=False)[0, 1]
    assert torch.equal(torch.from_numpy(keys), expected)


def test_sums_are_crc32_of_keys_then_values(context: Path) -> None:
    told = Context(context)
    record = told.manifest.layers[0]
    k = torch.empty(1, 128, record.key_dim)
    v = torch.empty(1, 128, record.value_dim)
    told.fill(0, 1, k, v, writing.Span(128, 256), verify=True)
    expected = zlib.crc32(v.numpy().tobytes(), zlib.crc32(k.numpy().tobytes()))
    assert int(told.sums[1, 1]) == expected


def test_runs_begin_at_pages(context: Path) -> None:
    told = Manifest.read(context)
    for file in told.files:
        record = told.layers[file.layer]
        assert file.capacity % manifest.RUN_TOKENS == 0
        for dim in (record.key_dim, record.value_dim):
            assert file.capacity * dim * 4 % manifest.PAGE_BYTES == 0


def test_a_manifest_survives_its_own_reading(context: Path) -> None:
    told = Manifest.read(context)
    assert told.to_bytes() == (context / "manifest.json").read_bytes()
    assert told.complete
    assert told.tokens == 300
    assert told.stored_tokens == 256


def test_a_newer_version_names_who_wrote_it(context: Path) -> None:
    path = context / "manifest.json"
    told = json.loads(path.read_text())
    told["version"], told["writer"] = 2, "9.1.0"
    path.write_text(json.dumps(told))
    with pytest.raises(SnapshotError, match=r"version 2 .* reads version 1.*headinfer 9\.1\.0"):
        Manifest.read(context)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "there is no context"),
        (lambda folder: folder.write_text("hi"), "is a file"),
        (lambda folder: folder.mkdir(), "it has no manifest.json"),
        (
            lambda folder: (folder.mkdir(), (folder / "manifest.json").write_text("{}")),
            "another purpose",
        ),
    ],
)
def test_what_is_no_context_is_said_to_be_none(tmp_path: Path, make: Any, says: str) -> None:
    folder = tmp_path / "x.ctx"
    make(folder)
    with pytest.raises(SnapshotError, match=says):
        Manifest.read(folder)


def test_a_changed_manifest_is_damaged(context: Path) -> None:
    path = context / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 300', '"tokens": 301'))
    with pytest.raises(SnapshotCorrupt, match="checksum is another"):
        Manifest.read(context)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SnapshotCorrupt, match="not JSON"):
        Manifest.read(context)


def test_large_layers_spread_over_files(
    llama: Any,
    attached: Any,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: Any,
) -> None:
    monkeypatch.setattr(writing, "FILE_BYTES", 1)
    monkeypatch.setattr(writing, "RUN_TOKENS", 128)
    cache = headinfer.read_context(llama, ids, tmp_path / "a.ctx", checkpoint_every=64)
    assert len(Manifest.read(tmp_path / "a.ctx").files) == 2 * 3
    loaded = headinfer.load_context(llama, tmp_path / "a.ctx")
    assert all(map(torch.equal, bits(cache), bits(loaded)))

# SPDX-License-Identifier: Apache-2.0
"""Models whose keys and values lie on disk: what is refused, what survives a disk that fails."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.errors import BudgetTooSmall, DiskError, InputError
from headinfer.hf import geometry
from headinfer.hf.cache_name import cache_argument
from headinfer.runner import Runner
from headinfer.testing.disks import Trouble
from headinfer.testing.graphs import TapeRecorder
from headinfer.testing.zoo import ZOO

ALL_ON_DISK = {"chunk_tokens": 64, "resident_heads": 0, "tile_bytes": 2**13, "num_slots": 3}


@pytest.fixture(scope="module")
def llama() -> Any:
    return ZOO["llama"].build()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(5, 99, (1, 420), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Trouble:
    """Every disk of this test."""
    made = Trouble(seed=1, slow_s=0.001)
    defaults = Runner.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "disk_queue", made.queue)
    return made


def generated(model: Any, ids: Tensor, count: int, **more: Any) -> list[int]:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **more,
    )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


@torch.no_grad()
def test_without_a_length_layers_leave_host_memory_as_it_fills(
    llama: Any, ids: Tensor, tmp_path: Path
) -> None:
    demoted = []
    with headinfer.attach(
        llama, disk=tmp_path, host_memory="600KiB", tile_bytes=2**13, num_slots=3
    ) as run:
        cache = run.new_cache()
        for start in range(0, 2048, 128):
            chunk = ids[:, start % 256 : start % 256 + 128]
            logits = llama(chunk, **cache_argument(llama, cache)).logits
            demoted.append(run.stats.demoted_heads)
            stats = run.stats
            assert stats.host_bytes + stats.staging_bytes + stats.tail_bytes <= 600 * 1024
    with headinfer.attach(llama) as run:
        cache = run.new_cache()
        for start in range(0, 2048, 128):
            chunk = ids[:, start % 256 : start % 256 + 128]
            expected = llama(chunk, **cache_argument(llama, cache)).logits
    assert demoted[0] == 0
    assert demoted[-1] > 0
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_a_disk_that_fails_is_named_and_generation_goes_on_from_what_is_complete(
    llama: Any, ids: Tensor, tmp_path: Path, trouble: Trouble
) -> None:
    with headinfer.attach(llama, disk=tmp_path, **ALL_ON_DISK) as run:
        whole = generated(llama, ids, 12)
        trouble.read_code, trouble.spare_reads = errno.EIO, trouble.reads // 3
        with pytest.raises(DiskError, match=r"layer \d, head \d: (keys|values)") as caught:
            generated(llama, ids, 12)
        trouble.read_code = None
        assert caught.value.code == errno.EIO
        assert str(tmp_path) in str(caught.value)
        assert run.cache is not None
        kept = run.cache.crop_to_complete()
        assert 0 < kept < 432
        run.cache.crop(min(kept, 419) - kept or 0)
        assert generated(llama, ids, 12, **cache_argument(llama, run.cache)) == whole


def test_what_could_not_be_written_never_answers(
    llama: Any, ids: Tensor, tmp_path: Path, trouble: Trouble
) -> None:
    with headinfer.attach(llama, disk=tmp_path, **ALL_ON_DISK) as run:
        whole = generated(llama, ids, 12)
        assert run.cache is not None
        assert run.cache.backing.runner is not None
        assert run.cache.backing.runner.complete_tokens() is None  # no write is left to fail
        trouble.write_code, trouble.spare_writes = errno.ENOSPC, trouble.writes // 2
        with pytest.raises(DiskError, match=os.strerror(errno.ENOSPC)) as caught:
            generated(llama, ids, 12)
        trouble.write_code = None
        cache = run.cache
        assert cache is not None
        assert cache.crop_to_complete() == caught.value.start < 420
        assert generated(llama, ids, 12, **cache_argument(llama, cache)) == whole


def test_a_copy_of_a_cache_on_disk_is_independent(llama: Any, ids: Tensor, tmp_path: Path) -> None:
    with headinfer.attach(llama, disk=tmp_path, **ALL_ON_DISK) as run:
        whole = generated(llama, ids, 8)
        cache = run.new_cache()
        headinfer.prefill(llama, ids[:, :-1], cache)
        twin = copy.deepcopy(cache)
        assert generated(llama, ids, 8, **cache_argument(llama, cache)) == whole
        cache.close()
        assert generated(llama, ids, 8, **cache_argument(llama, twin)) == whole
        assert twin.stats().disk_bytes > 0
        twin.close()


def test_whole_layers_are_read_from_disk_for_the_models_own_attention(
    llama: Any, ids: Tensor, tmp_path: Path
) -> None:
    with headinfer.attach(llama) as run:
        whole = generated(llama, ids, 8)
    with headinfer.attach(llama, disk=tmp_path, on_unsupported="materialize", **ALL_ON_DISK) as run:
        assert generated(llama, ids, 8) == whole
        assert run.stats.disk_bytes > 0
        assert run.stats.host_bytes == 0


def test_a_disk_that_fails_while_a_step_is_recorded_is_no_failed_recording(
    llama: Any, ids: Tensor, trouble: Trouble, tmp_path: Path
) -> None:
    with headinfer.attach(llama, disk=tmp_path, **ALL_ON_DISK) as run, torch.inference_mode():
        run.replay_with(TapeRecorder)
        cache = run.new_cache()
        llama(input_ids=ids, **cache_argument(llama, cache))
        for link in cache.backing.runner.links:
            link.drain()  # a write that begins or ends within a block reads it, and would be lost
        trouble.read_code = errno.EIO
        with pytest.raises(DiskError, match="Input/output error"):
            llama(input_ids=ids[:, :1], **cache_argument(llama, cache))
        assert run.graphs is not None
        assert run.graphs.refused == ""
        trouble.read_code = None
        cache.crop(ids.shape[1])
        for _ in range(4):
            llama(input_ids=ids[:, :1], **cache_argument(llama, cache))
        assert run.graphs.replayed > 0


def test_no_space_is_told_before_anything_runs(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "free_bytes", lambda folder: 100_000)
    with pytest.raises(BudgetTooSmall, match=r"95\.70 KiB are allowed or free there") as caught:
        headinfer.attach(llama, disk=tmp_path, expected_tokens=4000, **ALL_ON_DISK)
    assert caught.value.tier == "disk"
    monkeypatch.setattr(geometry, "free_bytes", lambda folder: 2 * caught.value.needed_bytes)
    headinfer.attach(llama, disk=tmp_path, expected_tokens=4000, **ALL_ON_DISK).close()


def test_what_cannot_be_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder for it"):
        headinfer.attach(llama, disk_memory="1GiB")
    with pytest.raises(InputError, match=r"near_data=0\.5 was given, but on a CPU"):
        headinfer.attach(llama, disk=tmp_path, near_data=0.5, expected_tokens=100)
    missing = tmp_path / "missing"
    with pytest.raises(InputError, match="does not exist"):
        headinfer.attach(llama, disk=missing, expected_tokens=100)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder"):
        headinfer.attach(llama, disk=tmp_path / "file", expected_tokens=100)

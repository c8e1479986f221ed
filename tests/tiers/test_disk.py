# SPDX-License-Identifier: Apache-2.0
"""The disk tier and both of its queues: places, budgets, odd sizes, order, and what is refused."""

from __future__ import annotations

import errno
import itertools
import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headinfer.attention import native
from headinfer.errors import DiskError, InputError, TierClosed, TierFull
from headinfer.spill import queue_for
from headinfer.tiers import disk as disk_module
from headinfer.tiers.disk import ALIGNMENT, DiskTier, Place, op_of
from headinfer.tiers.disk_queue import Op, ThreadQueue

built = pytest.mark.skipif(
    native.why_absent() is not None, reason="the native library is not built"
)
QUEUES = [pytest.param(queue_for, marks=built, id="native"), pytest.param(ThreadQueue, id="python")]


@pytest.fixture(params=QUEUES)
def tier(request, tmp_path):
    made = DiskTier(tmp_path, queue=request.param)
    yield made
    made.close()


def numbers(count, *, offset=0):
    """A tensor whose memory does not begin on a block."""
    whole = torch.arange(offset, offset + count + 3, dtype=torch.int64)
    return whole[3:].clone() if count % 2 else whole[3:]


def test_the_native_library_does_the_work_where_it_is_built(tmp_path):
    made = DiskTier(tmp_path, queue=queue_for)
    expected = "NativeQueue" if native.why_absent() is None else "ThreadQueue"
    assert type(made.queue).__name__ == expected
    made.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([1, 7, 511, 512, 4096, 300_000]),
    start=st.integers(0, 600),
    count=st.sampled_from([0, 1, 2, 511, 512, 513, 5000, 299_000]),
)
def test_any_part_of_an_extent_is_written_and_read(tier, size, start, count):
    """Also where neither place nor memory nor size are whole blocks; neighbours stay."""
    start, size = min(start, size - 1), size
    count = min(count, size - start)
    extent = tier.allocate(size * 8)
    whole = tier.view(extent, 0, (size,), torch.int64)
    before, part = numbers(size), numbers(count, offset=10**6)
    tier.store(whole, before)
    if count:
        tier.store(whole[start : start + count], part)
    expected = torch.cat([before[:start], part, before[start + count :]])
    found = torch.zeros(size + 1, dtype=torch.int64)
    tier.fill(found[1:], whole)
    assert torch.equal(found[1:], expected)
    assert found[0] == 0
    tier.free(extent)


def test_partial_blocks_written_side_by_side_all_arrive(tier):
    extent = tier.allocate(64 * 1000)
    view = tier.view(extent, 0, (1000, 8), torch.int64)
    rows = [numbers(8, offset=100 * row) for row in range(1000)]
    jobs = [tier.write([op_of(tier, row, view[place])]) for place, row in enumerate(rows)]
    for job in jobs:
        tier.over(job, block=True)
    found = torch.zeros(1000, 8, dtype=torch.int64)
    tier.fill(found, view)
    assert torch.equal(found, torch.stack(rows))


def test_a_read_waits_for_the_writes_it_names(tier):
    """The write is numbered first and begun last, by another thread."""
    extent = tier.allocate(2**20)
    view = tier.view(extent, 0, (2**17,), torch.int64)
    tier.store(view, torch.zeros(2**17, dtype=torch.int64))
    later, found = numbers(2**17), torch.zeros(2**17, dtype=torch.int64)
    write = tier.queue.job(write=True)
    read = tier.read([op_of(tier, found, view)], after=write)
    begun = threading.Timer(0.1, lambda: tier.begin_write(write, [op_of(tier, later, view)]))
    begun.start()
    assert not tier.over(read, block=False)
    assert tier.over(read, block=True)
    assert torch.equal(found, later)
    begun.join()


def test_a_write_that_never_begins_fails_and_its_place_is_lost(tier):
    extent = tier.allocate(3 * ALIGNMENT)
    view = tier.view(extent, 0, (3 * ALIGNMENT,), torch.uint8)
    memory = torch.ones(3 * ALIGNMENT, dtype=torch.uint8)
    tier.store(view, memory)
    job = tier.queue.job(write=True)
    middle = view[ALIGNMENT : 2 * ALIGNMENT]
    tier.queue.fail(job, errno.EIO, [op_of(tier, memory[:ALIGNMENT], middle)])
    with pytest.raises(DiskError, match="Input/output error"):
        tier.over(job, block=True)
    tier.fill(memory[:ALIGNMENT], view[:ALIGNMENT])
    with pytest.raises(DiskError) as caught:
        tier.fill(memory, view)
    assert caught.value.code == errno.EIO
    tier.store(middle, memory[:ALIGNMENT])  # written again, it is there again
    tier.fill(memory, view)


def test_what_shares_a_block_with_a_write_that_failed_is_lost_with_it(tmp_path):
    """A block of the file that was to be changed in part may hold nothing any more."""
    codes = [None]

    def write(descriptor, buffers, offset):
        if codes[0] is not None:
            raise OSError(codes[0], "no")
        return os.pwritev(descriptor, buffers, offset)

    tier = DiskTier(tmp_path, queue=lambda *how: ThreadQueue(*how, write=write))
    if tier.direct_refused is not None:
        pytest.skip(f"blocks of the file do not matter here: {tier.direct_refused}")
    extent = tier.allocate(4 * ALIGNMENT)
    view = tier.view(extent, 0, (4 * ALIGNMENT,), torch.uint8)
    memory = torch.ones(4 * ALIGNMENT, dtype=torch.uint8)
    tier.store(view, memory)
    assert tier.queue.lost() == []
    codes[0] = errno.EIO
    part = slice(ALIGNMENT + 100, 3 * ALIGNMENT + 50)
    with pytest.raises(DiskError):
        tier.store(view[part], memory[part])
    codes[0] = None
    start = tier.place_of(view)
    lost = sorted((fault.offset - start, fault.nbytes) for fault in tier.queue.lost())
    assert lost[0][0] == ALIGNMENT
    assert lost[-1][0] + lost[-1][1] == 4 * ALIGNMENT
    tier.fill(memory[:ALIGNMENT], view[:ALIGNMENT])
    for place in (ALIGNMENT, 4 * ALIGNMENT - 1):  # its neighbours on either side
        with pytest.raises(DiskError):
            tier.fill(memory[:1], view[place : place + 1])
    tier.store(view[ALIGNMENT:], memory[ALIGNMENT:])
    assert tier.queue.lost() == []
    tier.fill(memory, view)
    tier.close()


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_token_lost_is_named_whichever_part_of_a_write_fails_first(tmp_path, first):
    """Parts of a write fail in any order, and so may other writes that are under way."""
    order = [threading.Event(), threading.Event()]
    order[0].set()
    failing = threading.Event()

    def write(descriptor, buffers, offset):
        if not failing.is_set():
            return os.pwritev(descriptor, buffers, offset)
        place = offset // ALIGNMENT
        mine = 0 if place == first else 1
        assert order[mine].wait(10)
        order[1].set()
        raise OSError(errno.EIO, "no")

    tier = DiskTier(tmp_path, queue=lambda *how: ThreadQueue(*how, write=write))
    extent = tier.allocate(2 * ALIGNMENT)
    tier.name_extent(
        extent, lambda offset, nbytes: Place(0, f"bytes {offset}", offset // ALIGNMENT)
    )
    view = tier.view(extent, 0, (2, ALIGNMENT), torch.uint8)
    memory = torch.ones(2, ALIGNMENT, dtype=torch.uint8)
    failing.set()
    jobs = [tier.write([op_of(tier, memory[place], view[place])]) for place in range(2)]
    with pytest.raises(
        DiskError, match=f"bytes {first * ALIGNMENT} could .* before token 0 is"
    ) as caught:
        tier.over(jobs[first], block=True)
    assert caught.value.start == 0
    assert sorted(place.start for place in tier.lost()) == [0, 1]
    tier.free(extent)
    assert tier.lost() == []
    tier.close()


@pytest.mark.parametrize("queue", QUEUES)
def test_a_read_of_what_was_lost_names_that_alone(tmp_path, queue):
    tier = DiskTier(tmp_path, queue=queue)
    extent = tier.allocate(4 * ALIGNMENT)
    tier.name_extent(extent, lambda offset, nbytes: Place(0, f"{nbytes} from {offset}", offset))
    view = tier.view(extent, 0, (4 * ALIGNMENT,), torch.uint8)
    memory = torch.ones(4 * ALIGNMENT, dtype=torch.uint8)
    tier.store(view, memory)
    job = tier.queue.job(write=True)
    there = slice(2 * ALIGNMENT, 3 * ALIGNMENT)
    tier.queue.fail(job, errno.EIO, [op_of(tier, memory[there], view[there])])
    assert [tuple(fault)[1:3] for fault in tier.queue.lost()] == [
        (tier.place_of(view[there]), ALIGNMENT)
    ]
    with pytest.raises(DiskError, match=f"^{ALIGNMENT} from {2 * ALIGNMENT} could") as caught:
        tier.fill(memory, view)
    assert caught.value.start == 2 * ALIGNMENT
    tier.close()


def test_the_end_of_the_file_is_an_error(tier):
    memory = torch.zeros(ALIGNMENT, dtype=torch.uint8)
    job = tier.read([Op(2**30, memory.data_ptr(), ALIGNMENT)])
    with pytest.raises(DiskError, match="the file ends there, after 0 of 4,096 bytes") as caught:
        tier.over(job, block=True)
    assert caught.value.code == 0


def test_extents_are_whole_blocks_and_places_are_used_again(tier):
    first, second, third = (tier.allocate(nbytes) for nbytes in (1, ALIGNMENT + 1, 5))
    assert [extent.nbytes for extent in (first, second, third)] == [4096, 8192, 4096]
    assert tier.used_bytes == 16384
    tier.free(second)
    assert tier.allocate(ALIGNMENT).offset == second.offset
    tier.free(first)
    assert tier.used_bytes == 8192


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40_000)), max_size=40))
def test_no_byte_is_owned_twice(tmp_path, steps):
    tier, held = DiskTier(tmp_path), []
    for free, nbytes in steps:
        if free and held:
            tier.free(held.pop(nbytes % len(held)))
        else:
            held.append(tier.allocate(nbytes))
        spans = sorted((extent.offset, extent.offset + extent.nbytes) for extent in held)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert tier.used_bytes == sum(extent.nbytes for extent in held)
    for extent in held:
        tier.free(extent)
    assert tier.allocate(1).offset == 0
    tier.close()


def test_the_budget_is_a_hard_cap_and_the_message_names_what_works(tmp_path):
    tier = DiskTier(tmp_path, budget_bytes=8192)
    tier.allocate(4096)
    with pytest.raises(TierFull, match="raise disk_memory to 16384 bytes") as caught:
        tier.allocate(4097 + 4096)
    assert (caught.value.tier, caught.value.budget_bytes) == ("disk", 8192)
    tier.close()
    enough = DiskTier(tmp_path, budget_bytes=16384)
    enough.allocate(4096)
    enough.allocate(4097 + 4096)
    enough.close()


def test_a_computed_tensor_is_never_taken_for_a_place(tier):
    extent = tier.allocate(ALIGNMENT)
    view = tier.view(extent, 0, (64, 8), torch.int64)
    with pytest.raises(TypeError, match="is not one place of this disk"):
        tier.place_of(view + 1)
    with pytest.raises(TypeError, match="is not one place of this disk"):
        tier.place_of(torch.zeros(4))
    assert tier.place_of(view[3]) == extent.offset + 3 * 64


def test_after_close_nothing_is_handed_out(tmp_path):
    tier = DiskTier(tmp_path)
    tier.close()
    tier.close()
    with pytest.raises(TierClosed):
        tier.allocate(1)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        DiskTier(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder"):
        DiskTier(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no file can be made there: Permission denied"):
        DiskTier(tmp_path)


def test_a_read_only_file_system_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(disk_module.tempfile, "mkstemp", refuse)
    with pytest.raises(InputError, match="Read-only file system"):
        DiskTier(tmp_path)


def test_without_nameless_files_the_name_is_removed_at_once(tmp_path, monkeypatch):
    real = os.open

    def old(path, flags, *rest, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", old)
    tier = DiskTier(tmp_path)
    assert os.listdir(tmp_path) == []
    view = tier.view(tier.allocate(8), 0, (1,), torch.int64)
    tier.store(view, torch.tensor([5]))
    found = torch.zeros(1, dtype=torch.int64)
    tier.fill(found, view)
    assert found.item() == 5
    tier.close()


@pytest.mark.parametrize("queue", QUEUES)
def test_without_direct_io_the_reason_is_said_and_the_bytes_are_right(
    tmp_path, monkeypatch, caplog, queue
):
    real = os.pwritev

    def no_direct(descriptor, buffers, offset, *rest):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwritev", no_direct)
    tier = DiskTier(tmp_path, queue=queue)
    monkeypatch.setattr(os, "pwritev", real)
    assert "refuses direct I/O (Invalid argument)" in (tier.direct_refused or "")
    assert "through the system's page cache" in caplog.text
    view = tier.view(tier.allocate(24), 0, (3,), torch.int64)
    tier.store(view, torch.tensor([1, 2, 3]))
    tier.store(view[1:2], torch.tensor([7]))
    found = torch.zeros(3, dtype=torch.int64)
    tier.fill(found, view)
    assert found.tolist() == [1, 7, 3]
    tier.close()


def test_no_room_is_told_with_numbers(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tier = DiskTier(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TierFull, match=r"has [\d.]+ \wiB free; .* larger disk with disk="):
        tier.allocate(2**30)
    assert tier.used_bytes == 0
    tier.close()

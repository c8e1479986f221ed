# SPDX-License-Identifier: Apache-2.0
"""The lossless format does not change the answer: the same plan gives the same bits, whatever is done
to the cache, with copies as late as allowed, and bytes as bad as they come."""

from __future__ import annotations

import errno
import os
import re
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headinfer.attention import native
from headinfer.attention.masks import Causal
from headinfer.blocks import CHUNK_BYTES
from headinfer.errors import DiskError, LosslessCorrupt, TierFull
from headinfer.formats.lossless import BlockLayout
from headinfer.heads import Codec, PackedHeads, PackedInPlace
from headinfer.layer import DiskSettings, RunnerSettings
from headinfer.layout import aligned
from headinfer.runner import Runner
from headinfer.testing.blocks import bits_of
from headinfer.testing.disks import Trouble
from headinfer.testing.engines import DeferredEngine, DelayedCudaEngine
from headinfer.testing.numerics import check, eager, oracle
from headinfer.totals import Query

KEPT = aligned(max(1, CHUNK_BYTES // BlockLayout(16).entry_bytes) * BlockLayout(16).entry_bytes)
"""What overflow grows by."""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS = 2
# Heads that stay above the disk: where the CPU computes, and beside a device.
HOST_AND_DISK = {"disk": (), "host and disk": (1, 2), "leaving host memory": (9, 9)}
SPILLING = {"spilling": (1, 0), "nothing but disk": (), "near and disk": ()}
PLACEMENTS = [
    *("in place", "staged", "partly resident", "demoting", "near half", "near"),
    *HOST_AND_DISK,
    *SPILLING,
]


def late_engine(device):
    return DelayedCudaEngine(device) if device.type == "cuda" else DeferredEngine()


def make_runner(device, kv_format, placement, *, late=True, slot_bytes=2**16, **more):
    residents = {"partly resident": (1, 2), "demoting": (9, 9), **HOST_AND_DISK, **SPILLING}
    shares = {"near half": 0.5, "near": 1.0, "near and disk": 0.5}
    how = {}
    if placement == "demoting":  # room for a part only
        more.setdefault("resident_bytes", 120_000)
    if placement in HOST_AND_DISK or placement in SPILLING:
        more.setdefault("disk", DiskSettings(tempfile.gettempdir()))
        more["host_computes"] = placement in HOST_AND_DISK and torch.device(device).type == "cpu"
        if placement == "leaving host memory":  # what packed blocks keep there does not leave
            more.setdefault("host_bytes", 200_000 + 4 * KEPT * (kv_format == "lossless"))
        elif placement in SPILLING:
            room = 0 if placement == "nothing but disk" else 150_000
            more.setdefault("host_bytes", room + 20 * KEPT * (kv_format == "lossless"))
        if kv_format == "lossless":
            more.setdefault("kept_bytes", more.get("host_bytes", 0) // KEPT * KEPT)
        how["disk_queue"] = more.pop("trouble", Trouble(seed=slot_bytes)).queue
    more.setdefault("near_share", shares.get(placement, 0.0))
    return Runner(
        RunnerSettings(
            staging=placement != "in place" or device == "cuda",
            slot_bytes=slot_bytes,
            num_slots=3,
            write_bytes=2**18,
            resident_heads=residents.get(placement, ()),
            kv_format=kv_format,
            poison=True,
            **more,
        ),
        engine=late_engine if late else None,
        **how,
    )


class Pair:
    """An exact and a lossless runner through the same history, and the keys and values in it."""

    def __init__(self, device, placement, *, heads=2, dims=(16, 16), kind="normal", seed=0, **more):
        self.exact = make_runner(device, "exact", placement, **more)
        self.packed = make_runner(device, "lossless", placement, **more)
        self.device, self.heads, self.dims, self.kind = device, heads, dims, kind
        self.random = torch.Generator().manual_seed(seed)
        # Fewer bytes leave host memory later, and a layer there and one on disk are summed in
        # different orders.
        self.length, self.same = 0, placement != "leaving host memory"
        self.k, self.v = {}, {}
        self.compared = []

    @property
    def both(self):
        return self.exact, self.packed

    def values(self, batch, tokens, heads, dim):
        if self.kind == "mixed":  # every second block of tokens is raw
            seed = int(torch.randint(2**31, (), generator=self.random))
            bits = bits_of("wide", -(-batch * heads * tokens // 128), dim, seed)
            odd = bits_of("few far", bits.shape[0], dim, seed)
            bits = torch.where(
                torch.rand(bits.shape[0], 1, 1, generator=self.random) < 0.5, bits, odd
            )
            flat = bits.view(-1, dim)[: batch * heads * tokens].clone()
            flat = torch.where(flat.isfinite() & (flat.abs() < 100), flat, torch.zeros_like(flat))
            x = flat.view(batch, tokens, heads, dim)
        else:
            x = torch.randn((batch, tokens, heads, dim), generator=self.random).bfloat16()
        return x.to(self.device).transpose(1, 2)

    def forward(self, tokens, batch):
        for layer in range(LAYERS):
            k = self.values(batch, tokens, self.heads, self.dims[0])
            v = self.values(batch, tokens, self.heads, self.dims[1])
            self.k[layer] = torch.cat([self.k[layer], k], 2) if layer in self.k else k
            self.v[layer] = torch.cat([self.v[layer], v], 2) if layer in self.v else v
            q = torch.randn((batch, self.heads * 2, tokens, self.dims[0]), generator=self.random)
            query = Query(q.bfloat16().to(self.device), 0.25, Causal(self.length), self.dims[1])
            outs = []
            for runner in self.both:
                length = runner.append(layer, k, v)
                outs.append(runner.attend(layer, length, query))
            if self.same:
                assert torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16))
            self.compare(layer, query.q, outs[1])
        self.length += tokens

    def compare(self, layer, q, out):
        k, v = self.k[layer], self.v[layer]
        rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=self.device)
        mask = torch.arange(k.shape[2], device=self.device) <= rows[:, None]
        how = {"scale": 0.25, "bias": mask[None, None]}
        found = out.transpose(1, 2), eager(q, k, v, **how).out, oracle(q, k, v, **how).out
        self.compared.append(tuple(x.flatten() for x in found))

    def crop(self, length):
        for layer in range(LAYERS):
            self.k[layer], self.v[layer] = (
                self.k[layer][:, :, :length],
                self.v[layer][:, :, :length],
            )
            for runner in self.both:
                runner.crop(layer, length)
        self.length = length

    def reorder(self, rows):
        index = torch.tensor(rows, device=self.device)
        for layer in range(LAYERS):
            self.k[layer] = self.k[layer].index_select(0, index)
            self.v[layer] = self.v[layer].index_select(0, index)
            for runner in self.both:
                runner.reorder(layer, rows)

    def clone(self):
        self.exact, self.packed = self.exact.clone(), self.packed.clone()

    def finish(self):
        check(*(torch.cat(parts) for parts in zip(*self.compared, strict=True)))
        for layer in range(LAYERS):
            for values, stored in ((False, self.k), (True, self.v)):
                found = self.packed.gather(layer, self.length, values=values)
                assert torch.equal(found.view(torch.int16), stored[layer].view(torch.int16))
        self.packed.close()
        self.exact.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_history_gives_the_bits_of_the_exact_format(device, placement, data):
    batch = data.draw(st.integers(1, 2), label="batch")
    pair = Pair(
        device,
        placement,
        slot_bytes=data.draw(st.sampled_from([2**16, 2**18]), label="slot bytes"),
        late=data.draw(st.booleans(), label="late copies"),
        dims=data.draw(st.sampled_from([(16, 16), (32, 16), (16, 48)]), label="dims"),
        heads=data.draw(st.integers(1, 3), label="heads"),
        kind=data.draw(st.sampled_from(["normal", "mixed"]), label="kind"),
        expected_tokens=data.draw(st.sampled_from([None, 2000]), label="expected tokens"),
    )
    # In place, runs of tokens are attended one by one, and without a length told they are cut
    # elsewhere: another order of the same sums.
    in_place = placement in ("in place", "host and disk")
    told = pair.packed.settings.expected_tokens is not None
    pair.same = pair.same and (told or not in_place)
    pair.forward(data.draw(st.sampled_from([1, 127, 128, 129, 300, 700]), label="prompt"), batch)
    for _ in range(data.draw(st.integers(0, 6), label="steps")):
        kind = data.draw(
            st.sampled_from(["decode", "chunk", "crop", "reorder", "clone"]), label="what"
        )
        if kind == "decode":
            for _ in range(data.draw(st.integers(1, 4), label="tokens")):
                pair.forward(1, batch)
        elif kind == "chunk":
            pair.forward(data.draw(st.sampled_from([5, 64, 128, 257]), label="chunk"), batch)
        elif kind == "clone":
            pair.clone()
        elif kind == "crop" and pair.length > 1:
            pair.crop(data.draw(st.integers(1, pair.length), label="keep"))
        elif kind == "reorder":
            rows = data.draw(
                st.lists(st.integers(0, batch - 1), min_size=1, max_size=3), label="rows"
            )
            pair.reorder(rows)
            pair.same = pair.same and not in_place
            batch = len(rows)
    pair.finish()


def overflow_of(runner, dim=16):
    (link,) = runner.links
    return link.codec.overflow(dim)


def ranges_of(runner):
    return [heads for layer in runner.layers.values() for heads in layer.ranges]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", ["in place", "staged"])
def test_three_quarters_are_stored_and_moved(device, placement):
    pair = Pair(device, placement, expected_tokens=1280, heads=2, dims=(128, 128))
    pair.forward(1024, 1)
    before = pair.packed.stats()
    pair.forward(1, 1)
    pair.forward(127, 1)
    expected = BlockLayout(128).slot_bytes / (2 * 128 * 128)
    assert set(pair.packed.ratios()) == {0, 1}
    assert all(ratio == expected for ratio in pair.packed.ratios().values())
    assert pair.exact.ratios() == {}
    stats = pair.packed.stats()
    held = sum(heads.stored_bytes for heads in ranges_of(pair.packed))
    stored = LAYERS * 2 * 2 * 1280 * 128 * 2 * expected
    assert 0 <= held - stored <= LAYERS * 4 * 256  # extents are aligned
    assert stats.host_bytes - held <= 40 * 2**20 * (1 if device == "cpu" else 2)
    if stats.staging_bytes:
        assert stats.written_bytes == stored / 10 * 9
        assert stats.loaded_bytes - before.loaded_bytes <= 0.76 * (pair.exact.stats().loaded_bytes)
    pair.finish()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", ["in place", "staged"])
def test_blocks_that_do_not_compress_are_counted_and_their_overflow_comes_back(device, placement):
    pair = Pair(device, placement, kind="mixed", dims=(16, 16))
    ratios = []
    for _ in range(6):
        pair.forward(512, 1)
        ratios.append(max(pair.packed.ratios().values()))
        pair.crop(130)
        overflow = overflow_of(pair.packed)
        if pair.packed.links[0].staging_bytes:
            pair.packed.links[0].engine.drain()
        raw = sum(
            int((slots[..., BlockLayout(16).header + 1] == 1).sum())
            for heads in ranges_of(pair.packed)
            for _, *both in heads._memory.segments.values()
            for slots in (part[:, :, :1] for part in both)
        )
        assert overflow.used == raw
    assert 0.8 < max(ratios) <= 1.02
    pair.finish()
    assert overflow.used == 0


def forever(pair, tokens=256):
    while True:
        pair.forward(tokens, 1)


def decode_slowly(pair):
    for _ in range(3):
        pair.forward(1, 1)
        torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("placement", ["in place", "staged"])
def test_what_compresses_badly_fills_the_budget_and_leaves_what_was_complete(placement):
    # Room for the slots of 4,096 tokens, and for half as many raw blocks as there will be.
    settings = {"expected_tokens": 4096, "host_bytes": 7_500_000}
    pair = Pair("cpu", placement, kind="mixed", dims=(128, 128), slot_bytes=2**18)
    pair.packed = make_runner("cpu", "lossless", placement, slot_bytes=2**18, **settings)
    pair.same = False  # two plans
    with pytest.raises(TierFull, match=r"compress badly: .* stored raw .*kv_format='exact'"):
        forever(pair)
    held = pair.length
    assert held >= 1024
    for layer in range(LAYERS):
        for runner in pair.both:
            runner.crop(layer, held)
        pair.k[layer], pair.v[layer] = (x[layer][:, :, :held] for x in (pair.k, pair.v))
    assert pair.packed.stats().host_bytes <= 7_500_000
    pair.finish()


@pytest.mark.parametrize("placement", ["in place", "staged", "near"])
def test_a_damaged_block_is_an_error_that_names_it(placement):
    pair = Pair("cpu", placement, dims=(64, 64))
    pair.forward(512, 1)
    pair.forward(1, 1)
    for runner in pair.both:
        for link in runner.links:
            link.engine.drain()
            link.settle()
    heads = pair.packed.layers[1].ranges[0]
    _, k, _ = next(iter(heads._memory.segments.values()))
    k[1, 0, 2, BlockLayout(64).header] = 77
    with pytest.raises(LosslessCorrupt, match="damaged"):
        pair.forward(1, 1)


@pytest.mark.gpu
def test_a_damaged_block_on_a_gpu_is_an_error_of_a_later_pass():
    pair = Pair("cuda", "staged", dims=(64, 64))
    pair.forward(512, 1)
    pair.forward(1, 1)
    for link in pair.packed.links:
        link.engine.drain()
        link.settle()
    heads = pair.packed.layers[1].ranges[0]
    _, k, _ = next(iter(heads._memory.segments.values()))
    k[1, 0, 2, BlockLayout(64).header] = 77
    pair.same = False
    with pytest.raises(LosslessCorrupt, match="layer 1 is damaged"):
        decode_slowly(pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("placement", ["in place", "staged"])
def test_what_cannot_be_packed_stays_exact(placement, dtype):
    runner = make_runner("cpu", "lossless", placement)
    k = torch.randn(1, 2, 300, 16).to(dtype)
    runner.append(0, k, k)
    assert not any(isinstance(heads, (PackedHeads, PackedInPlace)) for heads in ranges_of(runner))
    assert torch.equal(runner.gather(0, 300, values=False), k)
    odd = torch.randn(1, 2, 300, 24).bfloat16()
    runner.append(1, odd, odd)
    assert torch.equal(runner.gather(1, 300, values=True), odd)
    assert runner.ratios() == {}


@pytest.mark.parametrize("kv_format", ["exact", "lossless"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_wider_than_keys_are_stored_in_the_type_of_keys(kv_format, device):
    """With a block to be joined and without: blocks that were encoded where they lie were encoded as
    what they are not."""
    runner = make_runner(device, kv_format, "staged")
    k = torch.randn(1, 2, 300, 64).to(device, torch.bfloat16)
    v = torch.randn(1, 2, 300, 64).to(device, torch.bfloat16).float()
    for part in (slice(0, 256), slice(256, 270), slice(270, 300)):
        runner.append(0, k[:, :, part], v[:, :, part])
    assert torch.equal(runner.gather(0, 300, values=False), k)
    assert torch.equal(runner.gather(0, 300, values=True), v.bfloat16())


@pytest.mark.skipif(native.why_absent() is not None, reason=str(native.why_absent()))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_without_the_native_library_the_reference_packs(placement, monkeypatch):
    monkeypatch.setattr(native, "why_absent", lambda: "it is not here")
    pair = Pair("cpu", placement, kind="mixed", expected_tokens=2000)
    pair.forward(300, 2)
    for _ in range(3):
        pair.forward(1, 2)
    pair.crop(200)
    pair.forward(100, 2)
    pair.finish()


def test_a_large_prompt_passes_a_small_buffer_head_by_head():
    pair = Pair("cpu", "staged", heads=3, dims=(64, 64))
    pair.packed.settings = pair.packed.settings.__class__(
        **{
            name: getattr(pair.packed.settings, name)
            for name in pair.packed.settings.__slots__
            if name != "write_bytes"
        },
        write_bytes=70_000,
    )
    pair.forward(700, 1)
    pair.forward(130, 1)
    pair.finish()


@pytest.mark.parametrize("without", [False, True])
def test_decoding_some_heads_at_a_time_is_the_same(without, monkeypatch):
    if without:
        monkeypatch.setattr("headinfer.totals.DECODED_BYTES", 1)
    pair = Pair("cpu", "in place", heads=3, expected_tokens=1000)
    pair.forward(300, 2)
    pair.forward(100, 2)  # too many rows for the kernel that reads packed keys
    pair.same = not without
    pair.forward(70, 2)
    pair.finish()


KINDS_OF_DISK = ["disk", "nothing but disk", "near and disk"]


def on_disk(placement, trouble, *, dims=(64, 48), **more):
    """All blocks on a disk that fails when `trouble` says so."""
    return Pair("cpu", placement, dims=dims, late=False, trouble=trouble, slot_bytes=2**17, **more)


def drained(pair):
    for runner in pair.both:
        for link in runner.links:
            link.engine.drain()


@pytest.mark.parametrize("placement", KINDS_OF_DISK)
@pytest.mark.parametrize("code", [errno.EIO, 0])
def test_a_packed_block_that_cannot_be_read_is_named_and_the_next_pass_works(placement, code):
    trouble = Trouble(seed=2)
    pair = on_disk(placement, trouble)
    pair.exact = make_runner("cpu", "exact", placement, late=False, slot_bytes=2**17)
    pair.forward(700, 1)
    pair.forward(1, 1)
    drained(pair)
    pair.packed._settle()
    trouble.read_code = code
    with pytest.raises(DiskError, match=r"layer \d, head \d: (keys|values) of tokens \d") as caught:
        pair.forward(1, 1)
    assert caught.value.code == code
    assert caught.value.start % 128 == 0
    trouble.read_code = None
    pair.crop(701)  # what the layers before had taken
    pair.forward(1, 1)
    pair.finish()


@pytest.mark.parametrize("placement", KINDS_OF_DISK)
@pytest.mark.parametrize("kind", ["normal", "mixed"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_packed_block_that_cannot_be_written_is_cropped_away(placement, kind, code):
    """Blocks do not begin with blocks of the file: the last one written goes with the lost one. What
    was set aside for raw ones comes back."""
    trouble = Trouble(seed=3)
    pair = on_disk(placement, trouble, kind=kind)
    pair.exact = make_runner("cpu", "exact", placement, late=False, slot_bytes=2**17)
    for _ in range(4):
        pair.forward(128, 1)
    drained(pair)
    assert pair.packed.complete_tokens() is None
    trouble.write_code = code
    with pytest.raises(DiskError, match=os.strerror(code)) as caught:
        forever(pair, 128)
    trouble.write_code = None
    start = caught.value.start
    assert start == pair.packed.complete_tokens()
    assert 384 <= start <= 512
    for layer in range(LAYERS):
        assert min(runner.layers[layer].length for runner in pair.both) >= start
    pair.crop(start)
    assert pair.packed.complete_tokens() is None
    for _ in range(3):
        pair.forward(128, 1)
    pair.forward(1, 1)
    drained(pair)
    assert pair.packed.complete_tokens() is None
    overflows = [overflow_of(pair.packed, dim) for dim in pair.dims]
    pair.finish()
    assert [overflow.used for overflow in overflows] == [0, 0]


@pytest.mark.parametrize("placement", ["disk", "nothing but disk"])
def test_a_step_reads_three_quarters_from_disk(placement):
    pair = on_disk(placement, Trouble(slow_s=0), dims=(128, 128), expected_tokens=1280)
    for tokens in (1024, 1, 1, 1):
        pair.forward(tokens, 1)
    before = [runner.stats() for runner in pair.both]
    for _ in range(5):
        pair.forward(1, 1)
    after = [runner.stats() for runner in pair.both]
    exact, packed = (
        now.disk_read_bytes - then.disk_read_bytes for then, now in zip(before, after, strict=True)
    )
    assert exact == 5 * LAYERS * 2 * 2 * 1024 * 128 * 2
    assert packed == exact * BlockLayout(128).slot_bytes // (2 * 128 * 128)
    assert after[1].dropped_tiles == before[1].dropped_tiles
    assert set(pair.packed.ratios().values()) == {BlockLayout(128).slot_bytes / (2 * 128 * 128)}
    pair.finish()


def test_on_a_cpu_tiles_from_disk_are_attended_packed(monkeypatch):
    """Nothing is decoded in a decode step but within the kernel."""
    if native.why_absent() is not None:
        pytest.skip(str(native.why_absent()))
    pair = on_disk("disk", Trouble())
    pair.forward(600, 1)
    pair.forward(1, 1)
    decoded = []
    monkeypatch.setattr(
        "headinfer.heads.packed_pieces.decode_on_host", lambda run, out, **how: decoded.append(run)
    )
    monkeypatch.setattr(Codec, "decode", lambda self, *how: decoded.append(how))
    for _ in range(3):
        pair.forward(1, 1)
    assert decoded == []
    monkeypatch.undo()
    pair.finish()


@pytest.mark.parametrize("placement", ["disk", "host and disk", "nothing but disk"])
def test_forgetting_counting_and_copying_read_no_block_to_learn_which_are_raw(placement):
    pair = on_disk(placement, Trouble(slow_s=0), kind="mixed")
    pair.forward(1024, 1)
    drained(pair)
    read = pair.packed.stats().disk_read_bytes
    assert 0.8 < max(pair.packed.ratios().values()) <= 1.02
    pair.crop(512)
    used = overflow_of(pair.packed, 64).used
    assert used > 0
    assert pair.packed.stats().disk_read_bytes == read
    twin = pair.packed.clone()
    assert overflow_of(twin, 64).used == used
    assert twin.ratios() == pair.packed.ratios()
    twin.close()
    overflow = overflow_of(pair.packed, 64)
    pair.finish()
    assert overflow.used == 0


class Filled:
    """A runner that tokens are put into, half of their blocks raw, and what it has to hold."""

    def __init__(self, **more):
        self.runner = make_runner(
            "cpu", "lossless", "leaving host memory", late=False, trouble=Trouble(slow_s=0), **more
        )
        self.k = {layer: [] for layer in range(LAYERS)}
        self.length = 0

    def put(self, tokens=256):
        for layer in range(LAYERS):
            bits = bits_of("wide", 8 * tokens // 128, 128, self.length + layer)
            bits[::2] = bits_of("tall", len(bits[::2]), 128, self.length + layer)
            bits[1::4] = bits_of("any bits", len(bits[1::4]), 128, self.length + layer)
            k = bits.view(1, 8, tokens, 128)
            self.runner.append(layer, k, k)
            self.k[layer].append(k)
        self.length += tokens

    def finish(self):
        for layer in range(LAYERS):
            found = self.runner.gather(layer, self.length, values=True)
            expected = torch.cat(self.k[layer], dim=2)[:, :, : self.length]
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        self.runner.close()


def chunk_bytes(dim):
    size = BlockLayout(dim).entry_bytes
    return aligned(max(1, CHUNK_BYTES // size) * size)


def test_layers_go_to_disk_to_make_room_for_what_raw_blocks_leave_in_host_memory():
    """Layers that are there already leave it for blocks of others that do not compress."""
    host = 9 * chunk_bytes(128)
    filled = Filled(host_bytes=host, kept_bytes=chunk_bytes(128))
    demoted = []
    while not demoted or demoted[-1] < LAYERS * 8:
        filled.put()
        demoted.append(filled.runner.stats().demoted_heads)
        assert filled.runner.stats().host_bytes <= host
    assert demoted[0] == 0
    assert demoted[-2] == 8
    filled.put()
    filled.finish()


def test_layers_leave_host_memory_as_they_are_packed(monkeypatch):
    """Blocks go to disk as they lie: nothing is decoded, nothing is encoded again."""
    pair = on_disk("leaving host memory", Trouble(slow_s=0), kind="mixed", dims=(64, 64),
                   host_bytes=8 * 2**20, kept_bytes=2**20)  # fmt: skip
    pair.forward(512, 1)
    pair.forward(70, 1)
    assert pair.packed.stats().disk_bytes == 0
    used = overflow_of(pair.packed, 64).used
    with monkeypatch.context() as no:
        no.setattr(Codec, "encode", lambda self, *how: 1 / 0)
        no.setattr(Codec, "decode", lambda self, *how: 1 / 0)
        assert pair.packed._demote_some_layer()
        assert pair.packed._demote_some_layer()
        assert not pair.packed._demote_some_layer()
    assert overflow_of(pair.packed, 64).used == used
    held = sum(
        one.entries * one.layout.entry_bytes
        for one in pair.packed.links[0].codec.overflows.values()
    )
    assert 0 <= pair.packed.stats().host_bytes - held < 2**16  # labels
    for tokens in (58, 300, 1):
        pair.forward(tokens, 1)
    pair.finish()


def fill(filled):
    while True:
        filled.put()


def test_what_host_memory_has_no_room_for_names_a_budget_that_works():
    """Nothing is left to leave host memory, and raw blocks still come."""
    room = 2 * chunk_bytes(128)
    filled = Filled(host_bytes=room, kept_bytes=room, beside_bytes=12345)
    with pytest.raises(TierFull, match=r"compress badly: .*kv_format='exact'") as caught:
        fill(filled)
    assert caught.value.tier == "host"
    for layer in range(LAYERS):
        filled.runner.crop(layer, filled.length)
    filled.finish()
    named = int(re.search(r"raise host_memory to (\d+) bytes", str(caught.value))[1])
    enough = Filled(host_bytes=named - 12345, kept_bytes=named - 12345, beside_bytes=12345)
    while enough.length <= filled.length:
        enough.put()
    enough.finish()


@pytest.mark.parametrize(("dims", "calls"), [((16, 16), 1), ((16, 32), 2)])
def test_keys_and_values_of_a_tile_are_unpacked_in_one_call_where_blocks_are_alike(
    monkeypatch, dims, calls
):
    tiles, decoded = [], []
    decode, unpack = Codec.decode, PackedHeads.unpack

    def counted(self, slots, out, layer):
        decoded.append(layer)
        return decode(self, slots, out, layer)

    def taken(self, tile, slot):
        tiles.append(tile.layer)
        return unpack(self, tile, slot)

    monkeypatch.setattr(Codec, "decode", counted)
    monkeypatch.setattr(PackedHeads, "unpack", taken)
    # Where tiles are of whole blocks in number, keys end where values begin.
    pair = Pair("cpu", "staged", dims=dims, kind="mixed", slot_bytes=2**19)
    pair.forward(16 * 128, 1)
    for _ in range(3):
        pair.forward(1, 1)
    assert tiles
    assert decoded == [layer for layer in tiles for _ in range(calls)]
    pair.finish()


def test_the_shapes_of_unpacked_tiles_of_several_heads_do_not_follow_the_length(staged_shapes):
    """As those of plain ones in tests/laws/test_placement.py."""
    pair = Pair("cpu", "staged", slot_bytes=2**20)
    runner = pair.packed
    for chunk in range(24):
        for layer in range(LAYERS):
            k, v = pair.values(1, 128, 2, 16), pair.values(1, 128, 2, 32)
            length = runner.append(layer, k, v)
            q = pair.values(1, 128, 4, 16)
            runner.attend(layer, length, Query(q, 0.25, Causal(128 * chunk), 32))
    pair.exact.close()
    runner.close()
    assert [shape[1] for shape, *_ in staged_shapes] == [2] * 5
    assert {shape[2] for shape, *_ in staged_shapes} == {128, 256, 512, 1024, 2048}

# SPDX-License-Identifier: Apache-2.0
"""Placement, chunking and tile size do not change the answer; bytes are never read too early.

A runner is driven by random sequences of what transformers does to a cache (append, crop,
reorder, repeat, select) next to plain tensors that are concatenated and indexed: the resident
cache. Stored bytes must be equal bit for bit, attention within the 2x rule, for heads attended in
place, staged, partly resident, with copies that run as late as allowed and NaN-filled slots.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headinfer import near
from headinfer.attention import native
from headinfer.attention.masks import Causal
from headinfer.attention.native_job import NativeJob
from headinfer.balance import Balance
from headinfer.errors import CacheStateError
from headinfer.heads import OffloadedHeads
from headinfer.layer import DiskSettings, RunnerSettings
from headinfer.runner import Runner
from headinfer.testing.disks import Trouble
from headinfer.testing.engines import DeferredEngine, DeferredHostStream, DelayedCudaEngine
from headinfer.testing.numerics import check, eager, oracle
from headinfer.totals import Query
from headinfer.transfer import Copy, Moves, total_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
needs_native = pytest.mark.skipif(native.why_absent() is not None, reason=str(native.why_absent()))
LAYERS = 3
NEAR = {"near half": 0.5, "near": 1.0, "near and resident": 0.7}
# Heads that stay above the disk, and the host budget: where the CPU computes, and where it does not.
HOST_AND_DISK = {"disk": (), "host and disk": (1, 2, 0), "leaving host memory": (9,) * 3}
SPILLING = {"spilling": (1, 0, 0), "nothing but disk": (), "near and disk": ()}


def late_engine(device):
    return DelayedCudaEngine(device) if device.type == "cuda" else DeferredEngine()


def make_runner(
    device, *, placement, slot_bytes=2**14, num_slots=3, late=True, write_bytes=2**14, **more
):
    staging = placement != "in place" or device == "cuda"
    residents = {"in place": (), "staged": (), "partly resident": (1, 2, 0)}.get(
        placement, (9,) * 3
    )
    if placement == "demoting":  # room for some of the layers only
        more.setdefault("resident_bytes", 600_000)
    if placement in NEAR:  # some or all heads are attended in host memory
        residents = (1, 0, 0) if placement == "near and resident" else ()
        more.setdefault("near_share", NEAR[placement])
    how = {}
    if placement in HOST_AND_DISK or placement in SPILLING:
        residents = {**HOST_AND_DISK, **SPILLING}[placement]
        more["disk"] = DiskSettings(tempfile.gettempdir())
        more["host_computes"] = placement in HOST_AND_DISK and torch.device(device).type == "cpu"
        if placement == "leaving host memory":
            more.setdefault("host_bytes", 400_000)
        elif placement in SPILLING:
            more.setdefault("host_bytes", 0 if placement == "nothing but disk" else 150_000)
        if placement == "near and disk":
            more.setdefault("near_share", 0.5)
        if late:  # reads come when they like, and in parts
            how["disk_queue"] = Trouble(seed=num_slots).queue
    return Runner(
        RunnerSettings(
            staging=staging,
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            write_bytes=write_bytes,
            resident_heads=residents,
            poison=True,
            **more,
        ),
        engine=late_engine if late else None,
        **how,
    )


class Resident:
    """The oracle: everything concatenated in plain tensors."""

    def __init__(self):
        self.k, self.v = {}, {}

    def append(self, layer, k, v):
        self.k[layer] = torch.cat([self.k[layer], k], 2) if layer in self.k else k
        self.v[layer] = torch.cat([self.v[layer], v], 2) if layer in self.v else v

    def apply(self, change):
        self.k = {layer: change(k) for layer, k in self.k.items()}
        self.v = {layer: change(v) for layer, v in self.v.items()}


class Driver:
    """A runner and its oracle, driven together through whole forward passes."""

    def __init__(self, runner, device, *, heads=2, per_kv=2, key_dim=16, value_dim=16, seed=0):
        self.runner, self.device, self.resident = runner, device, Resident()
        self.heads, self.per_kv, self.dims = heads, per_kv, (key_dim, value_dim)
        self.random = torch.Generator().manual_seed(seed)
        self.length = 0
        self.compared = []

    def normal(self, batch, tokens, heads, dim):
        x = torch.randn((batch, tokens, heads, dim), generator=self.random)
        return x.to(self.device).transpose(1, 2)

    def forward(self, tokens, batch):
        for layer in range(LAYERS):
            k = self.normal(batch, tokens, self.heads, self.dims[0])
            v = self.normal(batch, tokens, self.heads, self.dims[1])
            self.resident.append(layer, k, v)
            length = self.runner.append(layer, k, v)
            assert length == self.length + tokens
            q = self.normal(batch, tokens, self.heads * self.per_kv, self.dims[0])
            recipe = Causal(self.length)
            out = self.runner.attend(layer, length, Query(q, 0.25, recipe, self.dims[1]))
            self.compare(layer, q, out)
        self.length += tokens

    def compare(self, layer, q, out):
        k, v = self.resident.k[layer], self.resident.v[layer]
        rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=self.device)
        mask = torch.arange(k.shape[2], device=self.device) <= rows[:, None]
        how = {"scale": 0.25, "bias": mask[None, None]}
        found = out.transpose(1, 2), eager(q, k, v, **how).out, oracle(q, k, v, **how).out
        self.compared.append(tuple(x.flatten() for x in found))

    def crop(self, length):
        self.resident.apply(lambda x: x[:, :, :length])
        for layer in range(LAYERS):
            self.runner.crop(layer, length)
        self.length = length

    def reorder(self, rows):
        index = torch.tensor(rows, device=self.device)
        self.resident.apply(lambda x: x.index_select(0, index))
        for layer in range(LAYERS):
            self.runner.reorder(layer, rows)

    def finish(self):
        """The 2x rule over the whole history: one row alone may flatter eager attention."""
        check(*(torch.cat(parts) for parts in zip(*self.compared, strict=True)))
        self.check_bytes()

    def check_bytes(self):
        for layer in range(LAYERS):
            assert torch.equal(
                self.runner.gather(layer, self.length, values=False), self.resident.k[layer]
            )
            assert torch.equal(
                self.runner.gather(layer, self.length, values=True), self.resident.v[layer]
            )


PLACEMENTS = [
    *("in place", "staged", "partly resident", "resident", "demoting"),
    *NEAR,
    *HOST_AND_DISK,
    *SPILLING,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_history_equals_the_resident_cache(device, placement, data):
    slot = data.draw(st.sampled_from([2**11, 2**13, 2**15, 2**18]), label="slot bytes")
    slots = data.draw(st.integers(1, 4), label="slots")
    late = data.draw(st.booleans(), label="late copies")
    runner = make_runner(device, placement=placement, slot_bytes=slot, num_slots=slots, late=late)
    dims = data.draw(st.sampled_from([(16, 16), (24, 8), (8, 16)]), label="dims")
    heads = data.draw(st.integers(1, 3), label="heads")
    driver = Driver(runner, device, heads=heads, key_dim=dims[0], value_dim=dims[1])
    batch = data.draw(st.integers(1, 2), label="batch")
    driver.forward(
        data.draw(st.sampled_from([1, 2, 127, 128, 129, 300, 700]), label="prompt"), batch
    )
    for _ in range(data.draw(st.integers(0, 6), label="steps")):
        kind = data.draw(
            st.sampled_from(["decode", "chunk", "crop", "reorder", "clone"]), label="what"
        )
        if kind == "decode":
            for _ in range(data.draw(st.integers(1, 4), label="tokens")):
                driver.forward(1, batch)
        elif kind == "chunk":
            driver.forward(data.draw(st.sampled_from([5, 64, 128, 257]), label="chunk"), batch)
        elif kind == "clone":
            driver.runner = driver.runner.clone()
        elif kind == "crop" and driver.length > 1:
            driver.crop(data.draw(st.integers(1, driver.length), label="keep"))
        elif kind == "reorder":
            rows = data.draw(
                st.lists(st.integers(0, batch - 1), min_size=1, max_size=3), label="rows"
            )
            driver.reorder(rows)
            batch = len(rows)
    driver.finish()
    driver.runner.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_calls_cut_into_few_shapes_give_the_same_answer(device, placement, batch, monkeypatch):
    """What is done for kernels that are built for every shape, with any kernel: every KV head in
    calls of its own, over spans of a power of two chunks."""
    monkeypatch.setattr("headinfer.tile_loop.heads_apart", lambda *_: True)
    monkeypatch.setattr("headinfer.tile_loop.TOGETHER_BYTES", 0)
    monkeypatch.setattr("headinfer.totals.built_per_shape", lambda *_: True)
    driver = Driver(make_runner(device, placement=placement, slot_bytes=2**15), device, heads=3)
    for _ in range(8):
        driver.forward(64, batch)
    driver.forward(1, batch)
    driver.forward(100, batch)
    driver.finish()
    driver.runner.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "placement", ["staged", "near half", "host and disk", "spilling", "near and disk"]
)
def test_a_long_decode_stays_bit_equal_under_late_copies(device, placement):
    """1,000 steps across several blocks: the same arithmetic, whatever the copies' timing."""
    results = []
    for late in (True, False):
        runner = make_runner(device, placement=placement, late=late)
        random = torch.Generator().manual_seed(0)
        out = []
        for step in range(1000 if device == "cuda" else 300):
            for layer in range(LAYERS):
                k, v, q = (
                    torch.randn((1, h, 130 if step == 0 else 1, 16), generator=random).to(device)
                    for h in (2, 2, 4)
                )
                length = runner.append(layer, k, v)
                recipe = Causal(length - q.shape[2])
                out.append(runner.attend(layer, length, Query(q, 0.25, recipe, 16))[:, -1:])
        results.append(torch.cat(out))
        runner.close()
    assert torch.equal(*results)


@pytest.mark.parametrize("slot_bytes", [2**10, 2**12, 2**14, 2**20])
def test_tile_size_and_residency_are_bit_equal_where_arithmetic_order_is(slot_bytes):
    """Decode of one tile per head: residency by head only moves bytes."""
    found = []
    for residents in ((), (1, 1, 1)):
        runner = Runner(
            RunnerSettings(
                staging=True,
                slot_bytes=2**20,
                num_slots=2,
                write_bytes=slot_bytes,
                resident_heads=residents,
                poison=True,
            )
        )
        driver = Driver(runner, "cpu", seed=4)
        driver.forward(256, 1)
        driver.check_bytes()
        found.append(runner.gather(0, 256, values=False))
    assert torch.equal(*found)


def test_chunking_the_prompt_does_not_change_what_is_stored():
    whole = Driver(make_runner("cpu", placement="staged"), "cpu")
    whole.forward(300, 1)
    for cuts in ([1] * 300, [128, 128, 44], [127, 1, 172], [299, 1]):
        runner = make_runner("cpu", placement="staged")
        for layer in range(LAYERS):
            start = 0
            for tokens in cuts:
                stop = start + tokens
                k, v = whole.resident.k[layer], whole.resident.v[layer]
                runner.append(layer, k[:, :, start:stop], v[:, :, start:stop])
                start = stop
            assert torch.equal(runner.gather(layer, 300, values=False), k)
            assert torch.equal(runner.gather(layer, 300, values=True), v)


@pytest.mark.parametrize("placement", PLACEMENTS[:4])
def test_write_back_is_only_ever_the_new_tokens(placement):
    runner = make_runner("cpu", placement=placement)
    driver = Driver(runner, "cpu")
    driver.forward(512, 1)
    before = runner.stats().written_bytes
    driver.forward(128, 1)
    block = 128 * LAYERS * 2 * 2 * 16 * 4  # tokens, layers, heads, keys and values, dim, bytes
    share = {"staged": 1.0, "partly resident": 3 / 6}.get(placement, 0.0)
    assert runner.stats().written_bytes - before == block * share


def test_the_ring_prefetches_across_layers_and_passes():
    """In steady decode every tile was staged ahead: none is dropped, none is loaded twice."""
    runner = make_runner("cpu", placement="staged", num_slots=2, slot_bytes=2**14)
    driver = Driver(runner, "cpu")
    driver.forward(512, 1)
    for _ in range(4):
        driver.forward(1, 1)
    start = runner.stats()
    for _ in range(10):
        driver.forward(1, 1)
    moved = runner.stats()
    stored = 512 * LAYERS * 2 * 2 * 16 * 4
    assert moved.loaded_bytes - start.loaded_bytes == 10 * stored
    assert moved.dropped_tiles == start.dropped_tiles


@pytest.mark.parametrize("slot_bytes", [2**14, 2**10])  # 8 and 128 tiles a layer
def test_tokens_that_follow_take_the_copies_of_a_tile_as_they_were_made(monkeypatch, slot_bytes):
    """Nothing is sliced again until what is stored changes, and then nothing old is kept."""
    made = []
    load = OffloadedHeads.load

    def counted(self, tile, slot):
        made.append(tile)
        return load(self, tile, slot)

    monkeypatch.setattr(OffloadedHeads, "load", counted)
    runner = make_runner("cpu", placement="staged", num_slots=2, slot_bytes=slot_bytes)
    driver = Driver(runner, "cpu")
    driver.forward(512, 1)
    for _ in range(8):  # every tile has been in every slot
        driver.forward(1, 1)
    made.clear()
    for _ in range(10):
        driver.forward(1, 1)
    assert not made
    driver.crop(300)
    held = [heads for layer in runner.layers.values() for heads in layer.offloaded]
    assert not any(heads._load_cache for heads in held)
    driver.forward(1, 1)
    assert made
    driver.check_bytes()


@needs_native
def test_tokens_that_follow_take_the_list_of_keys_of_the_cpu_as_it_was_made(monkeypatch):
    """Until a block is full or what is stored changes; the answers are those of fresh lists."""
    made = []

    def counted(*args):
        made.append(args)
        return runs_of(*args)

    runs_of = near._runs
    monkeypatch.setattr(near, "_runs", counted)
    runner = make_runner("cpu", placement="near half", late=False)
    driver = Driver(runner, "cpu")
    driver.forward(500, 1)
    (link,) = runner.links
    link.near._stream = stream = DeferredHostStream(link.engine)
    for _ in range(10):
        driver.forward(1, 1)
    assert len(made) == LAYERS
    for _ in range(10):  # 512 tokens are a block more
        driver.forward(1, 1)
    assert len(made) == 2 * LAYERS
    driver.crop(300)
    assert not link.near._listed
    driver.forward(1, 1)
    driver.reorder([0, 0])
    driver.forward(1, 2)  # in an order that is not that of the stream
    assert len(made) == 4 * LAYERS
    assert stream.given == 21 * LAYERS
    driver.finish()


@needs_native
def test_a_block_that_goes_to_disk_is_no_job_of_a_stream():
    """The list of keys is the one of the token before, and yet no stream can wait for such a write."""
    how = {"placement": "near and disk", "late": False, "host_bytes": 300_000, "near_share": 0.5}
    driver = Driver(make_runner("cpu", **how), "cpu")
    driver.forward(120, 1)
    (link,) = driver.runner.links
    link.near._stream = stream = DeferredHostStream(link.engine)  # refuses such a ticket
    for _ in range(1100):
        driver.forward(1, 1)
    assert driver.runner.stats().disk_bytes
    assert stream.given
    driver.finish()


@needs_native
def test_the_job_of_the_token_before_runs_again(monkeypatch):
    made = []
    again = NativeJob.again

    def counted(self):
        made.append(self)
        return again(self)

    monkeypatch.setattr(NativeJob, "again", counted)
    driver = Driver(make_runner("cpu", placement="near", late=False), "cpu")
    driver.forward(500, 1)
    (link,) = driver.runner.links
    link.near._stream = DeferredHostStream(link.engine)
    for _ in range(10):
        driver.forward(1, 1)
    assert len(made) == 9 * LAYERS
    driver.finish()


@needs_native
def test_the_jobs_of_shares_that_come_and_go_are_made_once(monkeypatch):
    """While the share of the CPU settles, most layers change sides with every token: keys listed anew
    each time were a third of a step."""
    made, again = [], NativeJob.again

    def counted(self):
        made.append(self)
        return again(self)

    monkeypatch.setattr(NativeJob, "again", counted)
    turns = iter(range(10**6))
    monkeypatch.setattr(Balance, "heads", lambda self, before, count: 1 + next(turns) // LAYERS % 2)
    driver = Driver(
        make_runner("cpu", placement="near", late=False, near_share=0.5), "cpu", heads=3
    )
    driver.forward(500, 1)
    (link,) = driver.runner.links
    link.near._stream = stream = DeferredHostStream(link.engine)
    for _ in range(10):
        driver.forward(1, 1)
    assert stream.given == 10 * LAYERS
    assert len(made) >= 7 * LAYERS
    driver.finish()


def test_copies_that_come_again_know_where_they_go():
    """By address, as a driver copies, they are what they are as tensors."""
    there = torch.arange(40.0).view(4, 10)
    here = torch.zeros(4, 10)
    moves = Moves([Copy(here[1, 2:7], there[0, :5]), Copy(here[3], there[2])])
    for dst, src, nbytes in moves.addresses:
        ctypes.memmove(dst, src, nbytes)
    expected = torch.zeros(4, 10)
    for copy in moves:
        expected.view(-1)[copy.dst.storage_offset() :][: copy.dst.numel()] = copy.src
    assert torch.equal(here, expected)
    assert moves.nbytes == total_bytes(moves) == total_bytes(list(moves)) == 15 * 4


def test_heads_are_demoted_as_the_budget_fills_and_the_limit_holds():
    runner = make_runner("cpu", placement="demoting", resident_bytes=900_000)
    driver = Driver(runner, "cpu")
    demoted = []
    for _ in range(12):
        driver.forward(256, 1)
        assert runner.stats().resident_bytes <= 900_000
        demoted.append(runner.stats().demoted_heads)
    driver.finish()
    assert demoted[0] == 0
    assert demoted == sorted(demoted)
    assert demoted[-1] == 4  # 3,072 tokens of one layer still fit


def test_staging_does_not_grow_with_the_context():
    seen = set()
    for tokens in (256, 1024, 4096):
        runner = make_runner("cpu", placement="staged")
        driver = Driver(runner, "cpu")
        driver.forward(tokens, 1)
        driver.forward(1, 1)
        seen.add((runner.stats().staging_bytes, runner.stats().tail_bytes))
    assert len(seen) == 1


def test_host_memory_is_exact_when_the_length_is_known():
    runner = make_runner("cpu", placement="staged", expected_tokens=1000)
    driver = Driver(runner, "cpu")
    for tokens in (300, 300, 300, 100):
        driver.forward(tokens, 1)
    stored = 896  # whole blocks of 128; the rest is the tail
    assert runner.stats().host_bytes == stored * LAYERS * 2 * 2 * 16 * 4


def test_reordering_takes_no_memory_beyond_the_reservation():
    """Beam search: every step maps rows, and the room left in a segment stays usable."""
    for placement, stored in (("in place", 1000), ("staged", 896)):
        runner = make_runner("cpu", placement=placement, expected_tokens=1000)
        driver = Driver(runner, "cpu")
        driver.forward(600, 2)
        for step in range(40):
            driver.reorder([1, 0] if step % 2 else [0, 0])
            driver.forward(10, 2)
        driver.finish()
        assert runner.stats().host_bytes == 2 * stored * LAYERS * 2 * 2 * 16 * 4


def test_a_clone_is_independent():
    driver = Driver(make_runner("cpu", placement="partly resident"), "cpu")
    driver.forward(300, 1)
    twin = driver.runner.clone()
    kept = driver.resident.k[0]
    driver.forward(200, 1)
    assert torch.equal(twin.gather(0, 300, values=False), kept)
    twin.append(0, kept[:, :, :5], kept[:, :, :5])
    driver.check_bytes()


def test_wrong_use_is_refused_with_numbers():
    driver = Driver(make_runner("cpu", placement="staged"), "cpu")
    driver.forward(130, 1)
    one = torch.zeros(1, 2, 1, 16)
    with pytest.raises(CacheStateError, match="holds 1 sequences and the update brings 2"):
        driver.runner.append(0, one.expand(2, -1, -1, -1), one.expand(2, -1, -1, -1))
    with pytest.raises(CacheStateError, match="is given KVShape"):
        driver.runner.append(0, one[..., :8], one[..., :8])
    query = Query(torch.zeros(1, 4, 1, 16), 1.0, Causal(0), 16)
    with pytest.raises(CacheStateError, match="holds 130 tokens, attention wants 131"):
        driver.runner.attend(0, 131, query)
    driver.check_bytes()


@pytest.mark.parametrize("device", DEVICES)
def test_the_cpu_reads_its_heads_in_place_and_the_others_stream(device):
    """Half of the heads of every layer, so half of the bytes take either way."""
    moved = {}
    for placement in ("staged", "near half", "near"):
        driver = Driver(make_runner(device, placement=placement), device)
        driver.forward(512, 1)
        for _ in range(3):
            driver.forward(1, 1)
        start = driver.runner.stats()
        for _ in range(10):
            driver.forward(1, 1)
        stats = driver.runner.stats()
        near, loaded = stats.near_bytes - start.near_bytes, stats.loaded_bytes - start.loaded_bytes
        moved[placement] = near, loaded, stats.near_heads
        assert stats.dropped_tiles == start.dropped_tiles
        driver.finish()
    stored = 10 * 512 * LAYERS * 2 * 2 * 16 * 4
    assert moved == {
        "staged": (0, stored, 0),
        "near half": (stored / 2, stored / 2, 3),
        "near": (stored, 0, 6),
    }


def test_the_share_of_the_cpu_adapts_and_answers_stay_right(monkeypatch):
    """Every pass is reported once, and heads that change sides between passes change no answer."""
    seen = []

    def observe(balance, found):
        seen.append(found)
        balance.share = (0.1, 0.9, 0.5)[len(seen) % 3]

    monkeypatch.setattr("headinfer.tile_loop.NEAR_BYTES", 0)
    monkeypatch.setattr(Balance, "observe", observe)
    runner = make_runner("cpu", placement="staged", near_share=0.5, near_adapts=True)
    driver = Driver(runner, "cpu", heads=3)
    driver.forward(300, 1)
    shares = set()
    for _ in range(40):
        driver.forward(1, 1)
        shares.add(runner.stats().near_heads)
    driver.finish()
    assert len(seen) == 39  # the last pass has not been followed by another
    assert all(found.seconds > 0 and found.near_bytes > 0 for found in seen)
    assert len(shares) > 2


def test_prompts_and_small_caches_do_not_wait_for_the_cpu():
    runner = make_runner("cpu", placement="staged", near_share=0.5, near_adapts=True)
    driver = Driver(runner, "cpu")
    for tokens in (300, 17, 1, 1):
        driver.forward(tokens, 1)
    assert runner.stats().near_bytes == 0
    forced = make_runner("cpu", placement="near")
    driver = Driver(forced, "cpu")
    driver.forward(300, 1)
    driver.forward(17, 1)
    assert forced.stats().near_bytes == 0
    driver.forward(16, 1)
    assert forced.stats().near_bytes > 0


def test_an_error_on_the_cpu_side_is_raised_and_leaves_the_cache_usable(monkeypatch):
    driver = Driver(make_runner("cpu", placement="near half"), "cpu")
    driver.forward(300, 1)
    with monkeypatch.context() as broken:
        broken.setattr(OffloadedHeads, "in_place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            driver.forward(1, 1)
    driver.crop(300)
    driver.forward(1, 1)
    driver.finish()


def test_a_read_by_the_cpu_before_the_write_landed_is_seen(monkeypatch):
    """Negative control: the CPU must wait for the last copy down."""
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", 1)
    monkeypatch.setattr(DeferredEngine, "done", lambda self, ticket, *, block: True)
    driver = Driver(make_runner("cpu", placement="near", write_bytes=2**18), "cpu")
    driver.forward(300, 1)
    driver.forward(1, 1)
    with pytest.raises(AssertionError):
        driver.finish()


@pytest.mark.parametrize("missing", ["wait", "after"])
def test_a_missing_wait_is_seen(missing, monkeypatch):
    """Negative control: without one of the two waits the late engine gives wrong bytes."""
    # With more layers or smaller write-back buffers these are reused, and waited for, before
    # the next pass loads what went through them.
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", 1)
    if missing == "wait":
        monkeypatch.setattr(DeferredEngine, "wait", lambda self, ticket: None)
    else:
        submit = DeferredEngine.submit
        monkeypatch.setattr(
            DeferredEngine,
            "submit",
            lambda self, copies, *, lane, after=(): submit(self, copies, lane=lane),
        )
    driver = Driver(make_runner("cpu", placement="staged", num_slots=2, write_bytes=2**18), "cpu")
    driver.forward(300, 1)
    for _ in range(3):
        driver.forward(140, 1)
    with pytest.raises(AssertionError):
        driver.finish()


def test_a_runner_dropped_waits_for_copies_under_way():
    """Its slots and mappings are reused at once: a copy still running would hit their new owner."""
    waited = []

    class Engine(DeferredEngine):
        def drain(self):
            waited.append(sum(len(queue) for queue in self._queues.values()))
            super().drain()

    settings = RunnerSettings(staging=True, slot_bytes=2**14, num_slots=3, write_bytes=2**14)
    runner = Runner(settings, engine=lambda device: Engine())
    driver = Driver(runner, "cpu")
    driver.forward(300, 1)
    for _ in range(3):
        driver.forward(1, 1)
    driver.runner = None
    del runner
    assert waited
    assert waited[0] > 0  # tiles were staged ahead for a pass that never came


def test_the_shapes_of_staged_tiles_of_several_heads_do_not_follow_the_length(staged_shapes):
    """Where one head does not fill the device, calls are over several: spans of them are cut as
    those of one are, as their heads lie equally far apart in a slot however long they are."""
    runner = make_runner("cpu", placement="staged", slot_bytes=2**20, write_bytes=2**17)
    driver = Driver(runner, "cpu")
    for _ in range(24):
        driver.forward(128, 1)
    driver.finish()
    assert [shape[1] for shape, *_ in staged_shapes] == [2] * 5
    assert {shape[2] for shape, *_ in staged_shapes} == {128, 256, 512, 1024, 2048}

# SPDX-License-Identifier: Apache-2.0
"""Plans with a disk: what goes there is foreseen, fits, or is refused with a remedy that works."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention.masks import Causal
from headinfer.budget import GIB, KIB, MIB, MemoryBudget
from headinfer.cost import DISK, chunk_time, decode_time, disk_bytes, request_s
from headinfer.errors import BudgetTooSmall, InputError
from headinfer.geometry import Geometry, LayerGeometry, LayerKind
from headinfer.hf.backing import options_from, settings_of
from headinfer.options import Options
from headinfer.packing import ratio_of
from headinfer.plan import make_plan
from headinfer.rates import Rates
from headinfer.runner import Runner
from headinfer.spread import buffers_beside_gpu
from headinfer.testing.blocks import bits_of
from headinfer.totals import Query

layers = st.builds(
    LayerGeometry,
    kind=st.sampled_from([LayerKind.FULL, LayerKind.FULL, LayerKind.SLIDING]),
    num_kv_heads=st.integers(1, 8),
    key_dim=st.sampled_from([16, 64, 72, 128]),
    value_dim=st.sampled_from([16, 64, 128]),
    num_query_heads=st.integers(8, 32),
    window=st.integers(1, 4096),
)
geometries = st.builds(
    Geometry,
    layers=st.lists(layers, min_size=1, max_size=6).map(tuple),
    itemsize=st.sampled_from([2, 4]),
    hidden_size=st.integers(64, 8192),
    intermediate_size=st.integers(64, 30000),
    vocab_size=st.integers(100, 200_000),
    weight_bytes=st.integers(0, 8 * GIB),
).map(lambda made: replace(made, dtype="bfloat16" if made.itemsize == 2 else "float32"))
RATES = Rates(
    machine="this",
    dtype="bfloat16",
    block_flops=6e14,
    attention_flops={128: 6e14},
    weight_bytes_s=2e12,
    resident_bytes_s=2e12,
    layer_s=1e-4,
    token_s=1e-3,
    h2d_bytes_s=5e10,
    d2h_bytes_s=5e10,
    near_bytes_s=1e11,
    disk_read_bytes_s=2e9,
)


def asked(host, disk, *, gpu=None, **more):
    return Options(budget=MemoryBudget(gpu, host, disk), disk="/somewhere", **more)


def llama3_8b(weights=15 * GIB):
    layer = LayerGeometry(LayerKind.FULL, 8, 128, 128, 32)
    return Geometry((layer,) * 32, 2, 4096, 14336, 128256, weights, 8192, "Llama-3-8B")


def followed(geometry, options, device, batch):
    """The plan after doing what refusals say, at most once for each tier."""
    for _ in range(4):
        try:
            return make_plan(geometry, options, device=device, batch=batch), options
        except BudgetTooSmall as error:
            refusal = error
        assert refusal.needed_bytes > refusal.budget_bytes
        assert str(refusal.needed_bytes) in str(refusal)
        budget = replace(options.budget, **{f"{refusal.tier}_bytes": refusal.needed_bytes})
        options = replace(options, budget=budget)
    raise AssertionError(f"no remedy works: {refusal}")


@settings(max_examples=200, deadline=None)
@given(
    geometry=geometries,
    device=st.sampled_from(["cpu", "cuda"]),
    host=st.integers(0, 16 * GIB),
    disk=st.integers(0, 64 * GIB),
    tokens=st.one_of(st.none(), st.integers(1, 2**20)),
    batch=st.integers(1, 4),
    kv_format=st.sampled_from([None, "exact", "lossless"]),
)
def test_a_plan_with_a_disk_fits_or_its_remedies_do(
    geometry, device, host, disk, tokens, batch, kv_format
):
    gpu = None if device == "cpu" else 64 * GIB
    options = asked(host, disk, gpu=gpu, expected_tokens=tokens, kv_format=kv_format)
    plan, options = followed(geometry, options, device, batch)
    assert plan.host_bytes + plan.disk_buffer_bytes <= max(
        options.budget.host_bytes, plan.disk_buffer_bytes
    )
    assert plan.disk_bytes <= options.budget.disk_bytes
    assert plan.kept_bytes <= plan.host_room
    assert plan.kv_format == "exact" or options.kv_format != "exact"
    if tokens is not None:
        assert plan.host_bytes + plan.disk_bytes >= ratio_of(geometry, plan.kv_format) * sum(
            batch
            * (layer.num_kv_heads - heads * (device == "cuda"))
            * layer.head_bytes(tokens // 128 * 128, geometry.itemsize)
            for layer, heads in zip(geometry.layers, plan.resident_heads, strict=True)
            if layer.kind is LayerKind.FULL
        )


def test_a_refusal_for_host_memory_names_the_disk_which_works():
    options = Options(budget=MemoryBudget(24 * GIB, 16 * GIB), expected_tokens=2**18)
    with pytest.raises(BudgetTooSmall, match="on a fast disk with disk=FOLDER"):
        make_plan(llama3_8b(), options, device="cuda")
    options = asked(16 * GIB, 40 * GIB, gpu=24 * GIB, expected_tokens=2**18)
    plan = make_plan(llama3_8b(), options, device="cuda")
    assert plan.host_bytes + plan.disk_buffer_bytes <= 16 * GIB
    assert 0 < plan.disk_bytes < 20 * GIB
    assert "once 15." in str(plan)


def test_a_disk_too_small_is_refused_with_the_length_that_fits():
    options = asked(16 * GIB, 4 * GIB, gpu=24 * GIB, expected_tokens=2**18)
    with pytest.raises(BudgetTooSmall, match="Make room for") as caught:
        make_plan(llama3_8b(), options, device="cuda")
    assert caught.value.tier == "disk"
    found = re.search(r"shorten the context to ([\d,]+) tokens", str(caught.value))
    assert found is not None
    shorter = int(found[1].replace(",", ""))
    make_plan(llama3_8b(), replace(options, expected_tokens=shorter), device="cuda")


def test_disk_memory_without_a_folder_is_refused():
    with pytest.raises(InputError, match="but no folder for it"):
        options_from({"disk_memory": "1GiB"})
    with pytest.raises(InputError, match="disk_memory='much' is not a size"):
        options_from({"disk": "/tmp", "disk_memory": "much"})


@pytest.mark.parametrize("gpu", [18, 20, 24, 26, 40])
@pytest.mark.parametrize("disk_rate", [1e9, 2e9, 1.2e10])
def test_a_chunk_left_open_is_the_quickest_of_those_that_fit(gpu, disk_rate):
    rates = replace(RATES, disk_read_bytes_s=disk_rate)
    options = asked(8 * GIB, 40 * GIB, gpu=gpu * GIB, expected_tokens=2**18, rates=rates)

    def seconds(**more):
        try:
            plan = make_plan(llama3_8b(), replace(options, **more), device="cuda")
        except BudgetTooSmall:
            return math.inf
        return request_s(plan, rates, prompt_tokens=2**18)

    assert seconds() == min(seconds(chunk_tokens=2**power) for power in range(7, 17))


def test_a_slow_disk_is_the_limit_and_lengthens_the_chunk():
    options = asked(8 * GIB, 40 * GIB, gpu=20 * GIB, expected_tokens=2**18)
    plain = make_plan(llama3_8b(), options, device="cuda")
    plan = make_plan(llama3_8b(), replace(options, rates=RATES), device="cuda")
    assert plan.chunk_tokens > plain.chunk_tokens
    assert "read the disk more often" in str(plan)
    step = decode_time(plan, RATES, length=2**18)
    assert step.limit == DISK == "disk read rate"
    assert step.seconds == pytest.approx(disk_bytes(plan, 2**18) / 2e9)
    assert chunk_time(plain, RATES, past=2**18 - 8192, new=8192).limit == DISK


def test_on_a_cpu_the_disk_is_read_beside_attention():
    plan = make_plan(llama3_8b(), asked(2 * GIB, 40 * GIB, expected_tokens=65536), device="cpu")
    rates = replace(RATES, h2d_bytes_s=None, resident_bytes_s=1e10, weight_bytes_s=1e13)
    assert decode_time(plan, rates, length=65536).limit == DISK
    slow = replace(rates, resident_bytes_s=1e9)
    assert decode_time(plan, slow, length=65536).limit == "attention"


def test_packed_a_third_more_lies_in_host_memory_and_a_step_reads_less():
    both = [
        make_plan(
            replace(llama3_8b(), dtype="bfloat16"),
            asked(4 * GIB, 40 * GIB, expected_tokens=2**17, kv_format=name),
            device="cpu",
        )
        for name in ("exact", "lossless")
    ]
    exact, packed = both
    assert sum(packed.resident_heads) > 1.25 * sum(exact.resident_heads)
    assert packed.disk_bytes < 0.68 * exact.disk_bytes
    assert packed.host_bytes + packed.disk_buffer_bytes <= 4 * GIB
    assert 0 < packed.kept_bytes < 0.05 * GIB
    assert "without loss in 75.7% of their bytes: as asked for" in str(packed)
    assert "are kept for packed blocks" in str(packed)
    slow, quick = (disk_bytes(plan, 2**17) for plan in both)
    assert packed.disk_bytes == pytest.approx(quick, rel=0.01)
    assert exact.disk_bytes == pytest.approx(slow, rel=0.01)
    rates = replace(RATES, h2d_bytes_s=None, resident_bytes_s=1e12)
    found = [decode_time(plan, rates, length=2**17) for plan in both]
    assert [step.limit for step in found] == [DISK, DISK]
    assert found[1].seconds == pytest.approx(quick / 2e9)


def test_beside_a_gpu_packed_blocks_fill_host_memory_first_and_say_what_is_kept():
    geometry = replace(llama3_8b(), dtype="bfloat16")
    options = asked(8 * GIB, 60 * GIB, gpu=20 * GIB, expected_tokens=2**18, kv_format="lossless")
    plan = make_plan(geometry, options, device="cuda")
    exact = make_plan(geometry, replace(options, kv_format="exact"), device="cuda")
    assert plan.host_bytes + plan.disk_buffer_bytes <= 8 * GIB
    assert plan.disk_buffer_bytes < exact.disk_buffer_bytes  # packed tiles pass smaller buffers
    assert plan.disk_bytes < 0.75 * exact.disk_bytes
    assert 0 < plan.kept_bytes < 0.4 * GIB
    with pytest.raises(BudgetTooSmall, match="for blocks that do not compress") as caught:
        make_plan(
            geometry, replace(options, budget=MemoryBudget(20 * GIB, 200 * MIB)), device="cuda"
        )
    enough = MemoryBudget(20 * GIB, caught.value.needed_bytes)
    make_plan(geometry, replace(options, budget=enough), device="cuda")


@pytest.mark.parametrize(
    ("device", "gpu", "host"), [("cuda", 20 * GIB, 13 * GIB), ("cpu", None, 12 * GIB)]
)
def test_a_disk_too_small_for_plain_bytes_takes_packed_ones(device, gpu, host):
    geometry = replace(llama3_8b(), dtype="bfloat16")
    more = {} if gpu is None else {"gpu": gpu, "resident_heads": 0}
    options = asked(2 * GIB, host, expected_tokens=2**17, **more)
    plan = make_plan(geometry, options, device=device)
    assert plan.kv_format == "lossless"
    assert "which the disk budget does not allow" in str(plan)
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(geometry, replace(options, kv_format="exact"), device=device)
    assert caught.value.tier == "disk"


def bf16(heads=4, dim=64, layers=3):
    layer = LayerGeometry(LayerKind.FULL, heads, dim, dim, 2 * heads)
    return Geometry((layer,) * layers, 2, 256, 512, 100, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["normal", "mixed"])
@pytest.mark.parametrize("tokens", [1000, 4000, None])
def test_packed_host_and_disk_stay_within_what_is_predicted(tokens, kind):
    """Labels and overflow of blocks on disk are host memory, too."""
    host = 6 * MIB
    options = Options(
        budget=MemoryBudget(None, host, GIB),
        disk=tempfile.gettempdir(),
        expected_tokens=tokens,
        kv_format="lossless",
    )
    plan = make_plan(bf16(), options, device="cpu")
    assert plan.kv_format == "lossless"
    runner = Runner(settings_of(plan, options, 0))
    random = torch.Generator().manual_seed(0)
    for start in range(0, tokens or 4000, 250):
        for layer in range(3):
            k = torch.randn(
                1, 4, min(250, (tokens or 4000) - start), 64, generator=random
            ).bfloat16()
            if kind == "mixed" and 1000 <= start < 1500:  # a few blocks are raw
                k[:, 0] = bits_of("any bits", 2, 64, start).view(1, 256, 64)[:, : k.shape[2]]
                k = torch.where(k.isfinite() & (k.abs() < 9), k, torch.zeros_like(k))
            length = runner.append(layer, k, k)
            q = torch.zeros(1, 8, k.shape[2], 64, dtype=torch.bfloat16)
            runner.attend(layer, length, Query(q, 1.0, Causal(start), 64))
        stats = runner.stats()
        assert stats.host_bytes + stats.staging_bytes + stats.tail_bytes <= host
    runner.close()
    if tokens is not None:
        assert stats.host_bytes <= plan.host_bytes
        assert stats.disk_bytes <= plan.disk_bytes
        assert stats.disk_bytes >= plan.disk_bytes - 3 * 16 * KIB * 4 - 3 * 4 * 8 * 8 * KIB
        assert (stats.disk_bytes > 0) == (sum(plan.resident_heads) < 12)
    elif kind == "normal":
        assert stats.disk_bytes > 0


@pytest.mark.parametrize("tokens", [1000, 5000, None])
def test_packed_spilling_takes_no_more_than_is_predicted(tokens):
    """The path of a GPU, its copies made at once."""
    options = Options(
        budget=MemoryBudget(None, 64 * MIB, GIB), disk=tempfile.gettempdir(), expected_tokens=tokens,
        staging=True, tile_bytes=2**16, num_slots=3, kv_format="lossless",
    )  # fmt: skip
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(bf16(), replace(options, budget=MemoryBudget(None, MIB, GIB)), device="cpu")
    host = caught.value.needed_bytes + MIB
    options = replace(options, budget=MemoryBudget(None, host, GIB))
    plan = make_plan(bf16(), options, device="cpu")
    runner = Runner(settings_of(plan, options, 0))
    for start in range(0, tokens or 3000, 250):
        for layer in range(3):
            k = torch.randn(1, 4, min(250, (tokens or 3000) - start), 64).bfloat16()
            runner.append(layer, k, k)
        assert runner.stats().host_bytes <= plan.host_room
    stats = runner.stats()
    runner.close()
    if tokens is not None:
        assert stats.disk_bytes <= plan.disk_bytes
        assert stats.host_bytes <= plan.host_bytes
    if tokens != 1000:
        assert stats.disk_bytes > 0


@pytest.mark.parametrize("tokens", [1000, 3000])
@pytest.mark.parametrize("host", [3 * MIB, 4 * MIB, 6 * MIB])
def test_predicted_host_and_disk_are_at_least_what_is_measured(tokens, host):
    """Within the budgets, too; the host's includes slots, buffers and tails."""
    geometry = Geometry((LayerGeometry(LayerKind.FULL, 4, 32, 32, 8),) * 3, 4, 256, 512, 100)
    options = Options(
        budget=MemoryBudget(None, host, GIB), disk=tempfile.gettempdir(), expected_tokens=tokens
    )
    plan = make_plan(geometry, options, device="cpu")
    runner = Runner(settings_of(plan, options, 0))
    for start in range(0, tokens, 250):
        for layer in range(3):
            k = torch.zeros(1, 4, min(250, tokens - start), 32)
            length = runner.append(layer, k, k)
            q = torch.zeros(1, 8, k.shape[2], 32)
            runner.attend(layer, length, Query(q, 1.0, Causal(start), 32))
    stats = runner.stats()
    runner.close()
    assert stats.host_bytes <= plan.host_bytes
    assert stats.disk_bytes <= plan.disk_bytes
    assert stats.disk_bytes >= plan.disk_bytes - 3 * 16 * KIB * 4
    assert stats.host_bytes + stats.staging_bytes + stats.tail_bytes <= host
    assert (stats.disk_bytes > 0) == (sum(plan.resident_heads) < 12)


@pytest.mark.parametrize("tokens", [1000, 3000])
@pytest.mark.parametrize("room", [100 * KIB, MIB])
def test_spilling_takes_no_more_than_is_predicted(tokens, room):
    """The path of a GPU, its copies made at once: segments go where there is room."""
    geometry = Geometry((LayerGeometry(LayerKind.FULL, 4, 32, 32, 8),) * 3, 4, 256, 512, 100)
    host = buffers_beside_gpu(2**14, 3) + room
    options = Options(
        budget=MemoryBudget(None, host, GIB), disk=tempfile.gettempdir(), expected_tokens=tokens,
        staging=True, tile_bytes=2**14, num_slots=3,
    )  # fmt: skip
    plan = make_plan(geometry, options, device="cpu")
    runner = Runner(settings_of(plan, options, 0))
    for start in range(0, tokens, 250):
        for layer in range(3):
            k = torch.zeros(1, 4, min(250, tokens - start), 32)
            runner.append(layer, k, k)
    stats = runner.stats()
    runner.close()
    assert 0 < stats.disk_bytes <= plan.disk_bytes
    assert stats.host_bytes <= plan.host_bytes == room

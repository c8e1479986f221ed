# SPDX-License-Identifier: Apache-2.0
"""What the plan makes of the lossless format: when it chooses it, what it counts, what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from headinfer.budget import GIB, MIB, MemoryBudget
from headinfer.cost import chunk_time, decode_time, moved_bytes, offloaded_bytes, request_s
from headinfer.errors import BudgetTooSmall
from headinfer.geometry import Geometry, LayerGeometry, LayerKind
from headinfer.options import Options
from headinfer.packing import ratio_of, why_plain
from headinfer.plan import make_plan
from headinfer.rates import Rates

FULL = LayerGeometry(LayerKind.FULL, 8, 128, 128, 32)
LLAMA = Geometry(
    (FULL,) * 32, 2, 4096, 14336, 128256, 15 * GIB, 8192, "Llama-3-8B", dtype="bfloat16"
)
RATES = Rates(
    machine="made up",
    dtype="bfloat16",
    block_flops=600e12,
    attention_flops={128: 600e12},
    weight_bytes_s=3000e9,
    resident_bytes_s=2500e9,
    layer_s=0.5e-3,
    token_s=1e-3,
    h2d_bytes_s=53e9,
    d2h_bytes_s=55e9,
    near_bytes_s=108e9,
)


def planned(tokens, *, gpu="24", host=1000, geometry=LLAMA, device="cuda", **more):
    budget = MemoryBudget(int(gpu) * GIB if device == "cuda" else None, int(host * GIB))
    options = Options(budget=budget, expected_tokens=tokens, **more)
    return make_plan(geometry, options, device=device)


def test_a_million_tokens_fit_in_a_hundred_gib():
    with pytest.raises(BudgetTooSmall, match="122"):
        planned(1_000_000, host=100, kv_format="exact", resident_heads=0)
    plan = planned(1_000_000, host=100, resident_heads=0, kv_format="lossless")
    assert plan.kv_format == "lossless"
    slots = 32 * 8 * 2 * (1_000_000 // 128) * 24800
    assert slots < plan.host_bytes <= slots * 1.012
    assert plan.gpu_bytes <= 24 * GIB
    assert plan.staging_bytes <= 256 * MIB
    assert any("without loss in 75.7% of their bytes: as asked for" in why for why in plan.reasons)


def test_beside_a_gpu_it_is_taken_where_nothing_else_fits_and_says_so():
    plan = planned(1_000_000, host=100, resident_heads=0)
    assert plan.kv_format == "lossless"
    assert plan.host_bytes <= 100 * GIB
    assert any("which the host budget does not allow" in why for why in plan.reasons)
    assert planned(128 * 1024, rates=RATES).kv_format == "exact"
    with pytest.raises(BudgetTooSmall, match="Raise host_memory to") as caught:
        planned(1_000_000, host=60, resident_heads=0)
    enough = caught.value.needed_bytes / GIB
    assert planned(1_000_000, host=enough, resident_heads=0).kv_format == "lossless"


def test_a_cpu_packs_only_for_room():
    assert planned(128 * 1024, device="cpu").kv_format == "exact"
    plan = planned(128 * 1024, device="cpu", host=14)
    assert plan.kv_format == "lossless"
    assert plan.host_bytes <= 14 * GIB
    with pytest.raises(BudgetTooSmall, match="Raise host_memory to"):
        planned(128 * 1024, device="cpu", host=12)


def test_more_than_even_packed_ones_is_refused_with_a_remedy_that_works():
    how = {"resident_heads": 0, "kv_format": "lossless"}
    with pytest.raises(BudgetTooSmall) as caught:
        planned(1_000_000, host=60, **how)
    enough = caught.value.needed_bytes / GIB
    assert planned(1_000_000, host=enough, **how).kv_format == "lossless"


@pytest.mark.parametrize("dtype", ["float16", "float32", ""])
def test_other_types_stay_exact_and_say_so(dtype):
    geometry = replace(LLAMA, dtype=dtype)
    plan = planned(4096, geometry=geometry, kv_format="lossless", resident_heads=0)
    assert plan.kv_format == "exact"
    assert any("does not apply: keys and values are" in why for why in plan.reasons)
    with pytest.raises(BudgetTooSmall):
        planned(1_000_000, host=100, geometry=geometry, resident_heads=0)


def test_layers_that_cannot_be_packed_are_counted_as_they_are():
    odd = LayerGeometry(LayerKind.FULL, 8, 100, 100, 32)
    mixed = replace(LLAMA, layers=(FULL, odd))
    assert why_plain(mixed) is None
    packed = 8 * 2 * 24800
    plain = 8 * 2 * 100 * 2 * 128
    whole = 8 * 2 * 128 * 2 * 128 + plain
    assert ratio_of(mixed, "lossless") == pytest.approx((packed + plain) / whole)
    assert ratio_of(mixed, "exact") == 1.0
    plan = planned(128 * 1024, geometry=mixed, kv_format="lossless", resident_heads=0)
    assert plan.ring_slot_bytes == plan.slot_bytes  # those layers' tiles need all of it
    assert why_plain(replace(LLAMA, layers=(odd,))) is not None


MEASURED = replace(RATES, h2d_beside_bytes_s=49e9, near_bytes_s=73e9, near_packed_bytes_s=66e9)


def test_packed_is_taken_where_it_is_predicted_to_be_quicker():
    exact, packed, chosen = (
        planned(128 * 1024, kv_format=name, rates=MEASURED) for name in ("exact", "lossless", None)
    )
    before, after = (request_s(plan, MEASURED, prompt_tokens=2**17) for plan in (exact, packed))
    assert after < before
    assert chosen.kv_format == "lossless"
    assert chosen.resident_heads == packed.resident_heads
    (reason,) = [line for line in chosen.reasons if "without loss" in line]
    assert f"take {after:.1f} s by prediction, {before:.1f} s as they are" in reason


@pytest.mark.parametrize(
    "why",
    [
        "the CPU unpacks slowly",
        "the CPU was not timed over packed keys",
        "nothing is known of the machine",
        "everything stays on the GPU",
        "it was not asked for",
        "the length is not known",
        "it would not fit",
    ],
)
def test_plain_is_kept_where_packed_promises_nothing(why):
    how = {"rates": MEASURED, "tokens": 128 * 1024}
    how |= {
        "the CPU unpacks slowly": {"rates": replace(MEASURED, near_packed_bytes_s=15e9)},
        "the CPU was not timed over packed keys": {
            "rates": replace(MEASURED, near_packed_bytes_s=None)
        },
        "nothing is known of the machine": {"rates": None},
        "everything stays on the GPU": {"gpu": "80"},
        "it was not asked for": {"kv_format": "exact"},
        "the length is not known": {"tokens": None},
        "it would not fit": {"geometry": replace(LLAMA, dtype="float32", itemsize=4)},
    }[why]
    assert planned(how.pop("tokens"), **how).kv_format == "exact"


@pytest.mark.parametrize(
    ("tokens", "low", "high"), [(8192, 16_800, 17_600), (2**18, 48_900, 49_800)]
)
def test_more_memory_never_predicts_slower_where_formats_change(tokens, low, high):
    """Packed with a long chunk may be quicker than everything resident with a short one."""
    seconds = []
    for mib in range(low, high, 48):
        budget = MemoryBudget(mib * 2**20, 1000 * GIB)
        options = Options(budget=budget, expected_tokens=tokens, rates=MEASURED)
        plan = make_plan(LLAMA, options, device="cuda")
        seconds.append(request_s(plan, MEASURED, prompt_tokens=tokens))
    assert all(later <= before * (1 + 1e-9) for before, later in itertools.pairwise(seconds))


def test_packing_is_part_of_a_chunk():
    exact, packed = (
        planned(128 * 1024, kv_format=name, resident_heads=0, near_data=0.0, rates=MEASURED)
        for name in ("exact", "lossless")
    )
    slow, quick = (chunk_time(p, MEASURED, past=90_112, new=8192).parts for p in (packed, exact))
    assert quick["packing"] == 0
    assert slow["packing"] == pytest.approx(0.014, rel=0.2)  # an H200: 14 ms of a chunk of 915


def test_fewer_bytes_move_and_a_step_is_predicted_faster():
    both = [
        planned(256 * 1024, kv_format=name, resident_heads=0, rates=RATES)
        for name in ("exact", "lossless")
    ]
    exact, packed = (moved_bytes(plan, 256 * 1024) for plan in both)
    assert exact == offloaded_bytes(both[0], 256 * 1024)
    assert packed / exact == pytest.approx(193.75 / 256)
    slow, quick = (decode_time(plan, RATES, length=256 * 1024).seconds for plan in both)
    # The CPU attends packed bytes at nine tenths of the rate of plain ones.
    assert packed / exact < quick / slow < 0.85


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("disk", [None, "/somewhere"])
def test_a_model_without_a_layer_that_keeps_every_token_packs_nothing(device, disk):
    window = LayerGeometry(LayerKind.SLIDING, 8, 128, 128, 32, window=4096)
    geometry = replace(LLAMA, layers=(window,) * 4)
    plan = planned(4096, geometry=geometry, device=device, kv_format="lossless", disk=disk)
    assert plan.kept_bytes == plan.disk_bytes == 0

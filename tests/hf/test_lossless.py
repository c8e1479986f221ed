# SPDX-License-Identifier: Apache-2.0
"""kv_format="lossless" through attach: logits and tokens have the bits of kv_format="exact" with the
same plan, generation, beams and saved contexts included."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import headinfer
from headinfer.blocks import CHUNK_BYTES
from headinfer.errors import BudgetTooSmall, InputError
from headinfer.heads import PackedHeads, PackedInPlace
from headinfer.hf import backing
from headinfer.hf.backing import settings_of
from headinfer.hf.cache_name import cache_argument

STAGED = {"staging": True, "tile_bytes": 2**16, "num_slots": 3, "poison": True}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "in place": {},
    "staged": STAGED,
    "near": {**STAGED, "near_data": 1.0},
    "near half": {**STAGED, "near_data": 0.5},
    "partly resident": {**STAGED, "resident_heads": 1},
    "disk": {"disk": tempfile.gettempdir(), "resident_heads": 0, "poison": True},
    "host and disk": {"disk": tempfile.gettempdir(), "resident_heads": 1, "poison": True},
    # The way of a device, see `spilled`.
    "spilling": {**STAGED, "disk": tempfile.gettempdir()},
    "near and disk": {**STAGED, "disk": tempfile.gettempdir(), "near_data": 0.5},
}
IN_PLACE = ("in place", "host and disk")


@pytest.fixture(scope="module")
def model(build: Any) -> Any:
    return build("llama").to(torch.bfloat16)


@pytest.fixture(autouse=True)
def spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a device, host memory has room for the overflow and the labels of blocks alone."""

    def settings(plan: Any, *more: Any, **told: Any) -> Any:
        found = settings_of(plan, *more, **told)
        if found.disk is None or found.host_computes:
            return found
        kept = 4 * CHUNK_BYTES * (found.kv_format == "lossless")
        return replace(found, host_bytes=kept, kept_bytes=kept)

    monkeypatch.setattr(backing, "settings_of", settings)


@pytest.fixture
def prompt(ids: Any) -> torch.Tensor:
    return ids(300, 2)


def generated(model: Any, prompt: torch.Tensor, kv_format: str, placement: str, **more: Any):
    how = PLACEMENTS[placement]
    with headinfer.attach(model, kv_format=kv_format, chunk_tokens=64, **how) as run:
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            output_logits=True,
            return_dict_in_generate=True,
            **{"do_sample": False, **more},
        )
        assert ("disk" in how) == (run.stats.disk_bytes > 0)
        kinds = {
            type(h) for layer in run.cache.backing.runner.layers.values() for h in layer.ranges
        }
        return found.sequences, torch.stack(found.logits), kinds, run.cache.ratios(), run.plan


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_and_logits_have_the_same_bits(model, prompt, placement):
    exact = generated(model, prompt, "exact", placement)
    packed = generated(model, prompt, "lossless", placement)
    assert torch.equal(exact[0], packed[0])
    assert torch.equal(exact[1].view(torch.int16), packed[1].view(torch.int16))
    assert (PackedHeads in packed[2]) == (placement != "in place")
    assert (PackedInPlace in packed[2]) == (placement in IN_PLACE)
    assert not {PackedHeads, PackedInPlace} & exact[2]
    assert set(packed[3]) == {0, 1}
    assert all(0.76 < ratio < 1.02 for ratio in packed[3].values())
    assert "stored without loss" in str(packed[4])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_beams_find_the_same(model, prompt, placement):
    exact = generated(model, prompt[:1], "exact", placement, num_beams=3)
    packed = generated(model, prompt[:1], "lossless", placement, num_beams=3)
    if placement not in IN_PLACE:  # there, reordered runs are attended in other pieces
        assert torch.equal(exact[0], packed[0])
        assert torch.equal(exact[1].view(torch.int16), packed[1].view(torch.int16))
    else:
        assert exact[0].shape == packed[0].shape


@pytest.mark.parametrize("saved_as", ["exact", "lossless"])
@pytest.mark.parametrize(
    "placement", ["in place", "staged", "partly resident", "disk", "host and disk", "spilling"]
)
def test_a_saved_context_is_that_of_the_exact_format(model, ids, tmp_path, placement, saved_as):
    prompt = ids(300)
    opened_as = "lossless" if saved_as == "exact" else "exact"
    step = torch.tensor([[7]])
    logits = []
    for kv_format in (saved_as, opened_as, "lossless"):
        how = PLACEMENTS[placement]
        with (
            torch.no_grad(),
            headinfer.attach(
                model, kv_format=kv_format, chunk_tokens=64, expected_tokens=400, **how
            ) as run,
        ):
            folder = tmp_path / "context"
            if not Path(folder).exists():
                cache = run.new_cache()
                for part in prompt.split(64, dim=1):
                    model(part, **cache_argument(model, cache), use_cache=True)
                headinfer.save_context(model, cache, folder)
            else:
                cache = headinfer.load_context(
                    model, folder, kv_format=kv_format, expected_tokens=400, **how
                )
            out = model(step, **cache_argument(model, cache), use_cache=True).logits
            logits.append(out)
            if kv_format == "lossless":
                assert set(cache.ratios()) == {0, 1}
            cache.close()
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@torch.no_grad()
@pytest.mark.parametrize("placement", ["disk", "host and disk", "spilling"])
def test_copies_and_whole_layers_come_from_packed_blocks_on_disk(model, ids, placement):
    how = PLACEMENTS[placement]
    with headinfer.attach(
        model, kv_format="lossless", chunk_tokens=64, on_unsupported="materialize", **how
    ) as run:
        cache = run.new_cache()
        for part in ids(300).split(64, dim=1):
            model(part, **cache_argument(model, cache))
        twin = copy.deepcopy(cache)
        expected = model(torch.tensor([[7]]), **cache_argument(model, cache)).logits
        layers = [cache.layers[layer].gather(301, values=True) for layer in range(2)]
        cache.close()
        assert torch.equal(
            model(torch.tensor([[7]]), **cache_argument(model, twin)).logits, expected
        )
        assert twin.stats().disk_bytes > 0
        again = [twin.layers[layer].gather(301, values=True) for layer in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(layers, again, strict=True))
        twin.close()


def test_the_plan_packs_what_would_not_fit_otherwise(model):
    config = model.config
    whole = headinfer.plan_for(
        config, prompt_tokens=2**20, device="cpu", kv_format="exact", host_memory="64GiB"
    )
    assert whole.kv_format == "exact"
    config.dtype = torch.bfloat16
    room = int(whole.host_bytes * 0.9)
    plan = headinfer.plan_for(config, prompt_tokens=2**20, device="cpu", host_memory=room)
    assert plan.kv_format == "lossless"
    assert plan.host_bytes <= room
    assert "would need" in str(plan)
    with pytest.raises(BudgetTooSmall, match="does not fit"):
        headinfer.plan_for(
            config, prompt_tokens=2**20, device="cpu", host_memory=room, kv_format="exact"
        )
    easy = headinfer.plan_for(config, prompt_tokens=4096, device="cpu", host_memory="64GiB")
    assert easy.kv_format == "exact"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_host_memory_stays_within_what_was_predicted(model, ids, placement):
    """Law 4, with the overflow that is set aside."""
    how = PLACEMENTS[placement]
    with headinfer.attach(model, kv_format="lossless", expected_tokens=1100, **how) as run:
        with torch.no_grad():
            for part in ids(1100).split(run.plan.chunk_tokens, dim=1):
                model(part, **cache_argument(model, run.cache), use_cache=True)
        held = run.cache.stats().host_bytes
    if placement not in ("spilling", "near and disk"):  # which have not what the plan says
        assert held <= run.plan.host_bytes


def test_what_cannot_be_packed_is_said(build):
    plain = build("llama")
    with headinfer.attach(plain, kv_format="lossless", expected_tokens=1000) as run:
        assert run.plan.kv_format == "exact"
        assert "keys and values are float32" in str(run.plan)


def test_a_slot_that_holds_no_block_is_refused(model):
    with pytest.raises(BudgetTooSmall, match="set tile_bytes to 16384 or more"):
        headinfer.attach(
            model,
            kv_format="lossless",
            staging=True,
            tile_bytes=2**12,
            batch_size=2,
            expected_tokens=500,
        )
    with pytest.raises(
        InputError, match="kv_format='smaller' is not known; known: exact, lossless"
    ):
        headinfer.attach(model, kv_format="smaller")

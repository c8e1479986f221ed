# SPDX-License-Identifier: Apache-2.0
"""Whoever takes part gives the answer of the resident cache; otherwise its time means nothing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import headinfer
from headinfer.bench import baseline
from headinfer.bench.cases import CONTESTANTS
from headinfer.bench.contestants import Ground, NotAvailable, clean, enter, own_options
from headinfer.bench.models import build
from headinfer.bench.shapes import SHAPES
from headinfer.errors import InputError
from headinfer.hf.cache_name import cache_argument

PROMPT, NEW, CHUNK = 75, 6, 32
SHAPE_NAMES = ["tiny", "tiny, odd"]


@pytest.fixture(scope="module", params=SHAPE_NAMES)
def ground(request: pytest.FixtureRequest) -> Ground:
    shape = SHAPES[request.param]
    return Ground(build(shape, "float32", "cpu"), shape, "float32", PROMPT + NEW, CHUNK)


def small(ground: Ground, name: str) -> Ground:
    """With tiles so small that a layer takes several."""
    extra = {"tile_bytes": 8192, "chunk_tokens": CHUNK, "poison": True}
    return replace(ground, extra=extra) if CONTESTANTS[name].ours else ground


@torch.no_grad()
def answer(ground: Ground, name: str) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the last logits."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, ground.shape.vocab, (1, PROMPT), generator=generator)
    with enter(name, small(ground, name)) as entry:
        for part in prompt.split(entry.chunk_tokens, dim=1):
            output = ground.model(part, **cache_argument(ground.model, entry.cache), use_cache=True)
        told: list[int] = []
        for _ in range(NEW):
            token = output.logits[:, -1:].argmax(-1)
            told.append(int(token))
            output = ground.model(
                token, **cache_argument(ground.model, entry.cache), use_cache=True
            )
        assert entry.cache.get_seq_length() == PROMPT + NEW
        return told, output.logits[0, -1]


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != "resident"])
def test_a_contestant_gives_the_resident_answer(ground: Ground, name: str) -> None:
    told, logits = answer(ground, "resident")
    try:
        found, others = answer(ground, name)
    except NotAvailable as why:
        pytest.skip(str(why))
    assert found == told
    assert (others - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert ground.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["resident", "schedule", "streaming", "planned", "all-resident"])
def test_a_simulated_context_is_held_and_counted(ground: Ground, name: str) -> None:
    with torch.no_grad(), enter(name, small(ground, name)) as entry:
        entry.fill(60)
        assert entry.cache.get_seq_length() == 60
        before = entry.counted()
        for _ in range(2):
            one = torch.zeros((1, 1), dtype=torch.long)
            ground.model(one, **cache_argument(ground.model, entry.cache), use_cache=True)
        moved = {path: total - before[path] for path, total in entry.counted().items()}
        stored = ground.shape.kv_bytes(60, "float32")
        if name == "schedule":  # whole heads in and out, for every token
            assert 2 * stored <= moved["h2d"] <= 3.2 * stored
            assert 2 * stored <= moved["d2h"] <= 2.2 * stored
            assert entry.held()["host_bytes"] == ground.shape.kv_bytes(62, "float32")
        entry.renew()
        assert entry.cache.get_seq_length() == 0


def test_the_schedule_stages_each_head_once(ground: Ground) -> None:
    """In a steady state a head is loaded while the one before it is attended, never twice."""
    with torch.no_grad(), enter("schedule", ground) as entry:
        entry.fill(64)
        schedule = entry.cache.schedule
        one = torch.zeros((1, 1), dtype=torch.long)
        ground.model(one, **cache_argument(ground.model, entry.cache), use_cache=True)
        before = schedule.loaded_bytes
        ground.model(one, **cache_argument(ground.model, entry.cache), use_cache=True)
        heads = ground.shape.layers * ground.shape.kv_heads
        per_token = ground.shape.kv_bytes(1, "float32")
        # One of the heads staged during this pass has its 66th token, or all have their 65th.
        assert schedule.loaded_bytes - before == 65 * per_token + per_token // heads


def test_the_schedule_refuses_what_it_was_not_written_for(ground: Ground) -> None:
    config = ground.model.config
    windowed = type(config)(**{**config.to_dict(), "sliding_window": 8})
    with pytest.raises(InputError, match="full attention only"):
        baseline.ScheduleCache(windowed, torch.device("cpu"))
    with enter("schedule", ground) as entry, torch.no_grad():
        two = torch.zeros((2, 3), dtype=torch.long)
        with pytest.raises(InputError, match="one sequence"):
            ground.model(two, **cache_argument(ground.model, entry.cache), use_cache=True)


def test_near_data_is_passed_on(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    known = headinfer.attach

    @contextmanager
    def attach(model: Any, *, near_data: float | None = None, **options: Any) -> Any:
        seen.append({"near_data": near_data})
        with known(model, **options) as run:
            yield run

    monkeypatch.setattr(headinfer, "attach", attach, raising=False)
    for name in ("streaming", "near-data", "mixed", "planned"):
        with enter(name, small(ground, name)):
            pass
    assert [call["near_data"] for call in seen] == [0.0, 1.0, 0.5, None]
    assert own_options("near-data", ground)["resident_heads"] == 0
    assert "resident_heads" not in own_options("planned", ground)


def test_a_cap_reaches_headinfer_on_a_gpu_only(ground: Ground) -> None:
    capped = replace(ground, cap="24GiB")
    assert "gpu_memory" not in own_options("planned", capped)


def test_cleaning_leaves_a_cpu_alone() -> None:
    clean(torch.device("cpu"))

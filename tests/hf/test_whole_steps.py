# SPDX-License-Identifier: Apache-2.0
"""Recorded decode steps that go through layers whose heads are all resident: kernels find keys by a table.

Graphs are played by a tape and the kernels by torch, see `headinfer.testing`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headinfer
from headinfer.attention import placed
from headinfer.errors import CacheStateError
from headinfer.hf import backing
from headinfer.hf.cache_name import cache_argument
from headinfer.testing.graphs import TapePiece, TapeRecorder
from headinfer.testing.placed import play_on_cpu

NEW = 24


@pytest.fixture
def staged(staged: dict[str, Any]) -> dict[str, Any]:
    return {**staged, "chunk_tokens": 48}  # more than a step may have


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    play_on_cpu(monkeypatch)


def expected(model: Any, tokens: Any, new: int = NEW) -> Any:
    model.set_attn_implementation("eager")
    return model.generate(tokens, max_new_tokens=new, do_sample=False)


def generate(model: Any, tokens: Any, new: int = NEW) -> Any:
    return model.generate(tokens, max_new_tokens=new, do_sample=False)


def heads_of(model: Any) -> int:
    config = model.config
    return int(config.num_key_value_heads * config.num_hidden_layers)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "granite"])
def test_with_everything_resident_a_step_is_one_piece(
    family: str, build: Any, ids: Any, staged: dict[str, Any]
) -> None:
    model, tokens = build(family), ids(150)
    answer = expected(model, tokens)
    with headinfer.attach(model, **{**staged, "resident_heads": heads_of(model)}) as run:
        run.replay_with(TapeRecorder)
        assert torch.equal(generate(model, tokens), answer)
        assert run.graphs is not None
        assert run.graphs.refused == ""
        assert run.graphs.replayed >= NEW - 1 - 3
        (recorded,) = run.graphs._steps.values()
        assert len(recorded.pieces) == 1
        assert all(call.inside for call in recorded.calls)


def test_the_next_context_is_replayed_from_its_first_token(
    llama: Any, ids: Any, staged: dict[str, Any]
) -> None:
    """It lies elsewhere and has another length: the recording finds both."""
    short, long = ids(60), ids(190, seed=1)
    answers = [expected(llama, short), expected(llama, long)]
    with headinfer.attach(llama, **{**staged, "resident_heads": heads_of(llama)}) as run:
        run.replay_with(TapeRecorder)
        generate(llama, ids(33))
        assert run.graphs is not None
        for tokens, answer in zip((short, long), answers, strict=True):
            before = run.graphs.replayed
            assert torch.equal(generate(llama, tokens), answer)
            assert run.graphs.replayed == before + NEW - 1
        assert len(run.graphs._steps) == 1


def test_layers_that_stream_are_cut_out_and_the_others_are_not(
    build: Any, ids: Any, staged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = build("llama", num_hidden_layers=6), ids(150)
    answer = expected(model, tokens)
    heads, resident = model.config.num_key_value_heads, (2, 0, 2, 2, 1, 2)
    assert heads == 2
    settings = backing.RunnerSettings
    monkeypatch.setattr(
        backing, "RunnerSettings", lambda **how: settings(**{**how, "resident_heads": resident})
    )
    with headinfer.attach(model, **staged) as run:
        run.replay_with(TapeRecorder)
        assert torch.equal(generate(model, tokens), answer)
        assert run.graphs is not None
        assert run.graphs.refused == ""
        assert run.graphs.replayed >= NEW - 1 - 3
        (recorded,) = run.graphs._steps.values()
        assert [call.inside for call in recorded.calls] == [count == 2 for count in resident]
        assert len(recorded.pieces) == 3


def test_a_context_that_outgrows_its_memory_goes_on(
    llama: Any, ids: Any, staged: dict[str, Any]
) -> None:
    """Its keys are then in two places, which the table does not say."""
    tokens = ids(400)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        answer = llama(tokens).logits
    options = {**staged, "resident_heads": heads_of(llama), "expected_tokens": 64}
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        assert run.graphs is not None
        cache = run.new_cache()
        headinfer.prefill(llama, tokens[:, :50], cache)
        found, pieces = [], set()
        for at in range(50, 400):
            given = {"input_ids": tokens[:, at : at + 1], **cache_argument(llama, cache)}
            found.append(llama(**given).logits)
            pieces |= {len(recorded.pieces) for recorded in run.graphs._steps.values()}
        assert pieces == {1, llama.config.num_hidden_layers + 1}
        assert run.graphs.refused == ""
        assert run.graphs.replayed > 330
    torch.testing.assert_close(torch.cat(found, dim=1), answer[:, 50:], rtol=1e-4, atol=1e-4)


def test_after_a_crop_tokens_are_put_where_the_cropped_ones_were(
    llama: Any, ids: Any, staged: dict[str, Any]
) -> None:
    tokens = ids(80)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        answer = llama(tokens).logits
    options = {**staged, "resident_heads": heads_of(llama), "expected_tokens": 128}
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        cache = run.new_cache()
        headinfer.prefill(llama, tokens[:, :60], cache)
        for other in (1, 2, 0):
            if cache.get_seq_length() > 60:
                cache.crop(60)
            found = []
            for at in range(60, 80):
                given = {
                    "input_ids": (tokens[:, at : at + 1] + other) % 90,
                    **cache_argument(llama, cache),
                }
                found.append(llama(**given).logits)
        assert run.graphs is not None
        assert run.graphs.replayed >= 57
    expected_logits = answer[:, 60:]
    with torch.no_grad():
        llama.set_attn_implementation("eager")
        again = torch.cat([tokens[:, :60], tokens[:, 60:] % 90], dim=1)
        expected_logits = llama(again).logits[:, 60:]
    torch.testing.assert_close(torch.cat(found, dim=1), expected_logits, rtol=1e-4, atol=1e-4)


def test_several_tokens_at_once(llama: Any, ids: Any, staged: dict[str, Any]) -> None:
    """As assisted generation brings them."""
    tokens = ids(100)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        answer = llama(tokens).logits
    options = {**staged, "resident_heads": heads_of(llama), "expected_tokens": 128}
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        cache = run.new_cache()
        headinfer.prefill(llama, tokens[:, :50], cache)
        found = []
        for at in range(50, 100, 5):
            given = {"input_ids": tokens[:, at : at + 5], **cache_argument(llama, cache)}
            found.append(llama(**given).logits)
        assert run.graphs is not None
        assert run.graphs.replayed >= 7
        (recorded,) = run.graphs._steps.values()
        assert len(recorded.pieces) == 1
    torch.testing.assert_close(torch.cat(found, dim=1), answer[:, 50:], rtol=1e-4, atol=1e-4)


def test_a_padded_batch_is_attended_as_ever(llama: Any, ids: Any, staged: dict[str, Any]) -> None:
    tokens = ids(150, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :40] = 0
    llama.set_attn_implementation("eager")
    how = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    answer = llama.generate(tokens, **how)
    with headinfer.attach(llama, **{**staged, "resident_heads": heads_of(llama)}) as run:
        run.replay_with(TapeRecorder)
        assert torch.equal(llama.generate(tokens, **how), answer)
        assert run.graphs is not None
        assert run.graphs.replayed > 0
        assert all(not call.inside for step in run.graphs._steps.values() for call in step.calls)
        unpadded = ids(150, batch=2, seed=3)
        mine = generate(llama, unpadded)
        assert any(call.inside for step in run.graphs._steps.values() for call in step.calls)
    assert torch.equal(mine, expected(llama, unpadded))


def test_an_implementation_insisted_on_is_what_attends(
    llama: Any, ids: Any, staged: dict[str, Any]
) -> None:
    options = {**staged, "resident_heads": heads_of(llama), "attention": "reference"}
    with headinfer.attach(llama, **options) as run:
        run.replay_with(TapeRecorder)
        generate(llama, ids(60))
        assert run.graphs is not None
        assert all(not call.inside for step in run.graphs._steps.values() for call in step.calls)


@pytest.mark.parametrize(("held", "given"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("replay", [False, True])
def test_another_batch_than_the_cache_holds_is_refused(
    llama: Any, ids: Any, staged: dict[str, Any], held: int, given: int, replay: bool
) -> None:
    """A recorded step of that many sequences would write past what the cache has for one."""
    options = {**staged, "resident_heads": heads_of(llama), "expected_tokens": 256}
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        if replay:
            run.replay_with(TapeRecorder)
        fits, other = run.new_cache(), run.new_cache()
        headinfer.prefill(llama, ids(50, batch=given), fits)
        for token in range(6):
            step = torch.full((given, 1), 5 + token)
            llama(input_ids=step, **cache_argument(llama, fits))
        headinfer.prefill(llama, ids(50, batch=held), other)
        before = other.layers[0].gather(50, values=False)
        with pytest.raises(CacheStateError, match=f"holds {held} sequences"):
            llama(input_ids=torch.full((given, 1), 5), **cache_argument(llama, other))
        assert other.get_seq_length() == 50
        assert torch.equal(other.layers[0].gather(50, values=False), before)


def test_kernels_that_are_compiled_late_take_no_shape_from_others(
    llama: Any, ids: Any, staged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a shape are recorded without them first, and again when they are there."""
    asked: dict[Any, int] = {}

    def ready(kind: Any, device: Any) -> bool:
        asked[kind] = asked.get(kind, 0) + 1
        return asked[kind] > 20

    monkeypatch.setattr(placed, "ready", ready)
    options = {**staged, "resident_heads": heads_of(llama), "expected_tokens": 1024}
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        cache = run.new_cache()
        headinfer.prefill(llama, ids(40), cache)
        assert run.graphs is not None
        for tokens in (1, 2, 3, 4):
            before = run.graphs.replayed
            for token in range(40):
                step = torch.full((1, tokens), 5 + token)
                llama(input_ids=step, **cache_argument(llama, cache))
            assert run.graphs.replayed - before >= 40 - 6
        assert {key[0] for key in run.graphs._steps} == {(1, count) for count in (1, 2, 3, 4)}


def test_contexts_that_take_turns_keep_their_recordings(
    llama: Any, ids: Any, staged: dict[str, Any]
) -> None:
    """One has its heads on the device, the other has outgrown the memory there; a third way drives out the
    oldest."""
    options = {**staged, "resident_heads": heads_of(llama), "expected_tokens": 64}
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        caches = [run.new_cache(), run.new_cache(expected_tokens=256)]
        for cache in caches:
            headinfer.prefill(llama, ids(48), cache)
        assert run.graphs is not None
        for _ in range(30):
            for cache in caches:
                step = torch.full((1, 1), 7)
                llama(input_ids=step, **cache_argument(llama, cache))
        assert len(run.graphs._steps) == 2
        assert run.graphs.replayed >= 60 - 10


def test_what_stops_a_replayed_step_leaves_no_token_that_was_not_computed(
    llama: Any, ids: Any, staged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**staged, "resident_heads": heads_of(llama), "expected_tokens": 256}
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        cache = run.new_cache()
        headinfer.prefill(llama, ids(50), cache)
        step = {"input_ids": torch.full((1, 1), 7), **cache_argument(llama, cache)}
        for _ in range(5):
            llama(**step)

        def stopped(piece: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(TapePiece, "replay", stopped)
        with pytest.raises(KeyboardInterrupt):
            llama(**step)
        assert {layer.get_seq_length() for layer in cache.layers} == {55}

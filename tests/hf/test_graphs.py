# SPDX-License-Identifier: Apache-2.0
"""Replayed decode steps: the same tokens, and a model that cannot be replayed goes on as before.

CUDA graphs are played here by a tape of operations, which keeps what Python computed while it was
recorded, as a graph does.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.errors import TierFull
from headinfer.hf.cache import HeadLayer
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.testing.graphs import TapeRecorder

NEW = 40
FAMILIES = ["llama", "qwen3", "mistral", "phi3", "olmo2", "granite", "gemma2"]


def stock(model: Any, tokens: Any, **how: Any) -> Any:
    model.set_attn_implementation("eager")
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, **how)


def replayed(model: Any, tokens: Any, options: dict[str, Any], **how: Any) -> tuple[Any, Any]:
    with headinfer.attach(model, **options) as run:
        run.replay_with(TapeRecorder)
        found = model.generate(tokens, max_new_tokens=NEW, do_sample=False, **how)
        return found, run.graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_same_tokens(
    family: str, build: Any, ids: Any, options: dict[str, Any]
) -> None:
    model = build(family, **({"sliding_window": None} if family == "mistral" else {}))
    tokens = ids(150)
    expected = stock(model, tokens)
    found, graphs = replayed(model, tokens, options)
    assert torch.equal(found, expected)
    if family == "gemma2":  # its sliding layers are stock and grow
        assert graphs.replayed == 0
    else:
        assert graphs.refused == ""
        assert graphs.replayed >= NEW - 1 - 3  # all but the first, one recorded and one checked


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_the_same_tokens(
    side: str, llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    tokens = ids(150, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :40] = 0
    if side == "right":
        mask = mask.flip(1)
    expected = stock(llama, tokens, attention_mask=mask)
    found, graphs = replayed(llama, tokens, options, attention_mask=mask)
    assert torch.equal(found, expected)
    assert graphs.replayed > 0


def test_beams_and_several_shapes(llama: Any, ids: Any, options: dict[str, Any]) -> None:
    tokens = ids(150, batch=2)
    expected = stock(llama, tokens, num_beams=3), stock(llama, tokens[:1])
    with headinfer.attach(llama, **options) as run:
        run.replay_with(TapeRecorder)
        beams = llama.generate(tokens, max_new_tokens=NEW, do_sample=False, num_beams=3)
        single = llama.generate(tokens[:1], max_new_tokens=NEW, do_sample=False)
        again = llama.generate(tokens[:1], max_new_tokens=NEW, do_sample=False)
        assert run.graphs is not None
        assert run.graphs.replayed > NEW
    assert torch.equal(beams, expected[0])
    assert torch.equal(single, expected[1])
    assert torch.equal(again, expected[1])


def test_logits_are_those_of_steps_that_are_not_replayed(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    tokens = ids(180)
    found = []
    for replay in (False, True):
        with headinfer.attach(llama, **options) as run, torch.no_grad():
            if replay:
                run.replay_with(TapeRecorder)
            cache = run.new_cache()
            headinfer.prefill(llama, tokens[:, :150], cache)
            logits = []
            for at in range(150, 180):
                output = llama(input_ids=tokens[:, at : at + 1], **cache_argument(llama, cache))
                logits.append(output.logits)
                assert cache_returned(output) is cache
            found.append(torch.cat(logits))
            if replay:
                assert run.graphs is not None
                assert run.graphs.replayed >= 28
    assert torch.equal(*found)


def test_a_position_computed_in_python_is_found(
    llama: Any, ids: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded, such a number would stay what it was: the step after the recording must differ."""
    rotary = llama.model.rotary_emb
    original = rotary.forward

    def forward(x: Any, position_ids: Any, *more: Any, **how: Any) -> Any:
        cache_length = llama.seen  # a Python number, another in every step
        return original(x, torch.full_like(position_ids, 0) + cache_length, *more, **how)

    monkeypatch.setattr(rotary, "forward", forward)
    monkeypatch.setattr(llama, "seen", 0, raising=False)
    tokens = ids(160)

    def steps(model: Any, cache: Any) -> Any:
        logits = []
        with torch.no_grad():
            for at in range(160):
                llama.seen = at
                output = model(input_ids=tokens[:, at : at + 1], **cache_argument(model, cache))
                logits.append(output.logits)
        return torch.cat(logits)

    llama.set_attn_implementation("eager")
    expected = steps(llama, DynamicCache(config=llama.config))
    with headinfer.attach(llama, **options) as run:
        run.replay_with(TapeRecorder)
        found = steps(llama, run.new_cache())
        assert run.graphs is not None
        assert "differ by" in run.graphs.refused
        assert run.graphs.replayed == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_reads_values_on_the_host_goes_on_as_before(
    llama: Any, ids: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = llama.model.layers[1].mlp
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: original(x) if float(x.abs().max()) >= 0 else x)
    tokens = ids(150)
    expected = stock(llama, tokens)
    found, graphs = replayed(llama, tokens, options)
    assert torch.equal(found, expected)
    assert "not permitted while a stream is capturing" in graphs.refused
    assert graphs.replayed == 0


def test_what_is_not_a_plain_decode_step_is_not_replayed(llama: Any, ids: Any) -> None:
    tokens = ids(150)
    with headinfer.attach(llama) as run:
        run.replay_with(TapeRecorder)
        assert run.graphs is not None
        cache = run.new_cache()
        with torch.no_grad():
            llama(input_ids=tokens, **cache_argument(llama, cache))
            llama(
                input_ids=tokens[:, :1], **cache_argument(llama, cache), output_hidden_states=True
            )
            llama(inputs_embeds=torch.zeros(1, 1, 32), **cache_argument(llama, cache))
            llama(
                input_ids=tokens[:, :1], **cache_argument(llama, DynamicCache(config=llama.config))
            )
            llama(tokens[:, :1], **cache_argument(llama, cache))
        llama(input_ids=tokens[:, :1], **cache_argument(llama, cache))
        assert not run.graphs._steps
        with torch.no_grad():
            for recorded in (0, 1):  # the first of a shape may be the only one
                llama(input_ids=tokens[:, :1], **cache_argument(llama, cache))
                assert len(run.graphs._steps) == recorded


def test_a_recording_keeps_no_cache(llama: Any, ids: Any, options: dict[str, Any]) -> None:
    """Its keys and values would stay until the session ends, beside those of the next generation."""
    with headinfer.attach(llama, **options) as run:
        run.replay_with(TapeRecorder)
        llama.generate(ids(60), max_new_tokens=8, do_sample=False)
        assert run.graphs.replayed
        gone = weakref.ref(run.cache)
        run.cache = None
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_memory_that_is_full_is_reported_and_ends_no_recording(
    llama: Any, ids: Any, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step, the one recorded, the one compared and a replayed one: the error is the
    caller's, nothing runs twice, and with room again steps are replayed."""
    tokens, calls = ids(60), []
    full = TierFull("host full", tier="host", budget_bytes=1, used_bytes=1, asked_bytes=1)
    store = HeadLayer.store

    def refuse(layer: Any, *args: Any) -> Any:
        if len(calls) == step and layer.index == 0:
            calls.append("refused")
            raise full
        return store(layer, *args)

    monkeypatch.setattr(HeadLayer, "store", refuse)
    with headinfer.attach(llama) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        assert run.graphs is not None
        cache = run.new_cache()
        headinfer.prefill(llama, tokens[:, :50], cache)
        at = 50
        while at < 60:
            calls.append("step")
            given = {"input_ids": tokens[:, at : at + 1], **cache_argument(llama, cache)}
            if calls.count("step") == step:
                with pytest.raises(TierFull):
                    llama(**given)
            else:
                llama(**given)
                at += 1
        assert calls.count("refused") == 1
        assert run.graphs.refused == ""
        assert run.graphs.replayed


def test_steps_that_never_come_again_are_not_remembered_for_good(llama: Any, ids: Any) -> None:
    tokens = ids(200)
    with headinfer.attach(llama) as run, torch.no_grad():
        run.replay_with(TapeRecorder)
        assert run.graphs is not None
        cache = run.new_cache()
        headinfer.prefill(llama, tokens[:, :50], cache)
        for at in range(50, 200):
            given = {"input_ids": tokens[:, at : at + 1], **cache_argument(llama, cache)}
            llama(**given, logits_to_keep=at)
            assert len(run.graphs._seen) <= 64


def test_hooks_are_called_for_every_step(llama: Any, ids: Any, options: dict[str, Any]) -> None:
    """Also those that come while steps are replayed; without them, steps are replayed again."""
    tokens, seen = ids(60), []
    with headinfer.attach(llama, **options) as run:
        run.replay_with(TapeRecorder)
        llama.generate(tokens, max_new_tokens=10, do_sample=False)
        before = run.graphs.replayed
        hook = llama.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        llama.generate(tokens, max_new_tokens=10, do_sample=False)
        assert len(seen) >= 10
        assert run.graphs.replayed == before
        hook.remove()
        llama.generate(tokens, max_new_tokens=10, do_sample=False)
        assert run.graphs.replayed > before


def test_other_weights_are_not_answered_for_by_an_old_recording(
    build: Any, ids: Any, options: dict[str, Any]
) -> None:
    model, other, tokens = build("llama"), build("llama"), ids(60)
    torch.manual_seed(5)
    for weight in other.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    expected = stock(other, tokens)
    with headinfer.attach(model, **options) as run:
        run.replay_with(TapeRecorder)
        before = model.generate(tokens, max_new_tokens=NEW, do_sample=False)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data = theirs.data
        found = model.generate(tokens, max_new_tokens=NEW, do_sample=False)
        assert run.graphs.refused == ""
    assert not torch.equal(found, before)
    assert torch.equal(found, expected)


def test_closing_and_copying_leave_plain_models(llama: Any, ids: Any) -> None:
    tokens = ids(150)
    expected = stock(llama, tokens)
    with headinfer.attach(llama) as run:
        run.replay_with(TapeRecorder)
        twin = copy.deepcopy(llama)
        assert torch.equal(llama.generate(tokens, max_new_tokens=NEW, do_sample=False), expected)
    assert "forward" not in llama.__dict__
    assert torch.equal(twin.generate(tokens, max_new_tokens=NEW, do_sample=False), expected)
    assert torch.equal(stock(llama, tokens), expected)
    assert run.graphs is not None
    before = run.graphs.replayed
    llama.generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert run.graphs.replayed == before

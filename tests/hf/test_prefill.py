# SPDX-License-Identifier: Apache-2.0
"""`headinfer.prefill`: a prompt read in chunks into a cache that is in the caller's own hands."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import headinfer
from headinfer.errors import InputError
from headinfer.hf.cache_name import cache_argument


def lengths_of(model: Any) -> list[int]:
    """The tokens of every forward pass from now on."""
    found: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))
    return found


def test_it_leaves_what_one_forward_pass_leaves(
    llama: Any, ids: Any, resident: Any, close: Any, head_cache: Any
) -> None:
    tokens = ids(150, batch=2)
    expected = resident(llama, tokens, (150,))[:, -1:]
    lengths, cache = (
        lengths_of(llama),
        head_cache(llama),
    )  # importing the cache makes the name known
    llama.set_attn_implementation("headinfer")
    output = headinfer.prefill(llama, tokens[:, :100], cache)
    assert output.logits.shape[1] == 1
    assert not output.logits.requires_grad
    output = headinfer.prefill(llama, tokens[:, 100:], cache, chunk_tokens=30)
    close(output.logits, expected)
    assert lengths == [16] * 6 + [4, 30, 20]
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "bloom"])
def test_left_padding_does_not_change_the_answer(
    family: str, build: Any, ids: Any, close: Any, options: dict[str, Any]
) -> None:
    model = build(family, **({"sliding_window": 40} if family == "gemma2" else {}))
    if not model._can_set_attn_implementation():
        options["on_unsupported"] = "materialize"
    tokens = ids(90)
    padded = torch.cat([torch.zeros((1, 37), dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(127) >= 37).long()[None]
    both = torch.cat([padded, ids(127, seed=1)]), torch.cat([mask, torch.ones_like(mask)])
    with torch.no_grad():
        expected = model(tokens).logits[:, -1:], model(both[0][1:]).logits[:, -1:]
    with headinfer.attach(model, **options) as run:
        cache = run.new_cache()
        found = headinfer.prefill(model, both[0], cache, attention_mask=both[1])
        close(found.logits[:1], expected[0])
        close(found.logits[1:], expected[1])


def test_generate_goes_on_from_it(llama: Any, ids: Any, head_cache: Any) -> None:
    tokens = ids(150, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :21] = 0
    expected = llama.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False)
    llama.set_attn_implementation("headinfer")
    cache = head_cache(llama)
    headinfer.prefill(llama, tokens[:, :-1], cache, mask[:, :-1])
    found = llama.generate(
        tokens,
        attention_mask=mask,
        **cache_argument(llama, cache),
        max_new_tokens=9,
        do_sample=False,
    )
    assert torch.equal(found, expected)


def test_a_stock_cache_is_as_good(llama: Any, ids: Any, resident: Any, close: Any) -> None:
    cache = DynamicCache(config=llama.config)
    output = headinfer.prefill(llama, ids(), cache, chunk_tokens=40)
    close(output.logits, resident(llama, ids(), (150,))[:, -1:])


def test_the_plan_decides_the_chunk(llama: Any, ids: Any) -> None:
    llama.set_attn_implementation("headinfer")
    lengths, cache = lengths_of(llama), headinfer.HeadCache(llama.config)
    headinfer.prefill(llama, ids(1500), cache)
    assert cache.plan is not None
    assert lengths[0] == cache.plan.chunk_tokens
    assert sum(lengths) == 1500


def test_wrong_arguments_are_refused(llama: Any, ids: Any, build: Any) -> None:
    cache = headinfer.HeadCache(llama.config)
    with pytest.raises(InputError, match="tokens >= 1"):
        headinfer.prefill(llama, ids(0), cache)
    with pytest.raises(InputError, match=r"has to be \(1, 150\)"):
        headinfer.prefill(llama, ids(), cache, attention_mask=torch.ones(1, 149))
    with pytest.raises(InputError, match="chunk_tokens=0"):
        headinfer.prefill(llama, ids(), cache, chunk_tokens=0)
    whisper = build("bart", model_class="BartForConditionalGeneration", d_model=32)
    with pytest.raises(InputError, match="encoder-decoder"):
        headinfer.prefill(whisper, ids(), cache)


def test_a_pass_longer_than_the_chunk_is_warned_of_once(
    llama: Any, ids: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llama.set_attn_implementation("headinfer")
    cache = headinfer.HeadCache(llama.config, chunk_tokens=64)
    with caplog.at_level(logging.WARNING, "headinfer"):
        headinfer.prefill(llama, ids(64), cache)
        assert not caplog.records
        llama.generate(ids(), **cache_argument(llama, cache), max_new_tokens=2)
        llama.generate(ids(300), **cache_argument(llama, cache), max_new_tokens=2)
    (record,) = caplog.records
    assert "of 86 tokens, where the plan has chunks of 64" in record.getMessage()
    assert "headinfer.prefill" in record.getMessage()


@pytest.mark.parametrize("known", [False, True])
def test_the_cache_is_planned_with_the_chunk_that_is_read(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is resident has to fit beside the forward passes that come, of all sequences."""
    from dataclasses import replace

    from headinfer.hf import attach as attaching
    from headinfer.hf import backing
    from headinfer.plan import make_plan
    from headinfer.progress import Event, ForwardStarted

    asked: list[tuple[int | None, int]] = []

    def halves_with_every_call(geometry, options, *, device, batch=1):
        """A machine whose free memory shrinks between two looks at it."""
        asked.append((options.expected_tokens, batch))
        plan = make_plan(geometry, options, device=device, batch=batch)
        return replace(plan, chunk_tokens=options.chunk_tokens or 64 >> len(asked))

    monkeypatch.setattr(attaching, "make_plan", halves_with_every_call)
    monkeypatch.setattr(backing, "make_plan", halves_with_every_call)
    seen: list[int] = []

    class Watching:
        def on_event(self, event: Event) -> None:
            if isinstance(event, ForwardStarted):
                seen.append(event.new_tokens)

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(1, 41)[None].repeat(2, 1)
    more = {"expected_tokens": 43} if known else {}
    with headinfer.attach(model, observer=Watching(), **more) as run:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert run.plan is not None
        read = max(seen)
        assert read < 40
        assert run.plan.chunk_tokens == read
        assert run.plan.batch == 2
        assert (43, 2) in asked or not known

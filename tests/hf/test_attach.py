# SPDX-License-Identifier: Apache-2.0
"""`attach(model)` with no arguments: the length comes from `generate()`, memory is exact."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import headinfer
from headinfer.errors import BudgetTooSmall, InputError, TierFull
from headinfer.hf.cache_name import cache_argument
from headinfer.plan import make_plan
from headinfer.progress import ForwardStarted

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dim, float32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def generate(model, tokens=300, new=8):
    prompt = torch.randint(0, 99, (1, tokens), generator=torch.Generator().manual_seed(1))
    return model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def test_the_length_is_learned_from_generate(model):
    expected = generate(model)
    with headinfer.attach(model) as run:
        assert run.plan is None
        assert torch.equal(generate(model), expected)
        assert run.plan.expected_tokens == 308
        # One extent per layer, of exactly that size.
        assert run.stats.host_bytes == 308 * TOKEN_BYTES


@pytest.fixture
def lengths(monkeypatch):
    """(all tokens, new ones) of every plan that is made."""
    seen = []

    def noted(geometry, options, **how):
        seen.append((options.expected_tokens, options.new_tokens))
        return make_plan(geometry, options, **how)

    monkeypatch.setattr("headinfer.hf.attach.make_plan", noted)
    monkeypatch.setattr("headinfer.hf.backing.make_plan", noted)
    return seen


def test_plans_know_how_many_tokens_are_generated(model, lengths):
    """Those of `generate()` and the one that its chunk comes from, in agreement."""
    with headinfer.attach(model):
        generate(model, 300, new=8)
    assert set(lengths) == {(308, 8)}
    assert len(lengths) == 2


def test_what_is_said_of_new_tokens_counts_and_a_prompt_of_embeddings_is_part_of_the_length(
    model, lengths
):
    prompt = torch.randint(0, 99, (1, 300), generator=torch.Generator().manual_seed(1))
    with headinfer.attach(model, new_tokens=3):
        generate(model, 300, new=8)
        model.generate(
            inputs_embeds=model.get_input_embeddings()(prompt), max_new_tokens=8, do_sample=False
        )
    assert set(lengths) == {(308, 3)}
    assert len(lengths) == 4


def test_a_cache_of_another_length_knows_nothing_of_the_session_s_answer(model):
    with headinfer.attach(model, expected_tokens=400, new_tokens=16) as run:
        assert run.new_cache(expected_tokens=10).backing.options.new_tokens is None
        assert run.new_cache().backing.options.new_tokens == 16


def test_room_for_new_tokens_is_bounded(model):
    with headinfer.attach(model) as run:
        prompt = torch.zeros((1, 10), dtype=torch.long)
        model.generate(prompt, max_length=10**6, max_new_tokens=None, stop_strings=None,
                       stopping_criteria=[lambda ids, scores: torch.ones(1, dtype=torch.bool)])  # fmt: skip
        assert run.plan.expected_tokens == 10 + 4096


def test_each_generation_plans_anew(model):
    with headinfer.attach(model) as run:
        generate(model, 300)
        generate(model, 200, new=4)
        assert run.plan.expected_tokens == 204


def test_a_plain_forward_after_generate_assumes_nothing(model):
    with headinfer.attach(model) as run, torch.no_grad():
        generate(model, 300)
        model(torch.zeros((1, 5), dtype=torch.long))
        assert run.plan.expected_tokens is None


def test_a_prompt_that_fits_runs_even_if_the_longest_answer_would_not(model):
    budget = 400 * TOKEN_BYTES
    with headinfer.attach(model, host_memory=budget) as run:
        generate(model, 300, new=50)
        with pytest.raises(TierFull, match="raise host_memory to"):
            generate(model, 300, new=5000)
        assert run.plan.expected_tokens == 300


def test_a_prompt_that_does_not_fit_is_refused_before_it_runs(model):
    with headinfer.attach(model, host_memory=200 * TOKEN_BYTES):
        with pytest.raises(BudgetTooSmall, match="at 308 tokens does not fit") as caught:
            generate(model, 300)
    with headinfer.attach(model, host_memory=caught.value.needed_bytes):
        generate(model, 300, new=1)


def test_a_dropped_cache_frees_its_memory_at_once(model):
    gc.disable()
    try:
        with headinfer.attach(model) as run:
            generate(model)
            host = weakref.ref(run.cache.backing.runner)
            generate(model)
            assert host() is None
    finally:
        gc.enable()


def test_a_copy_of_an_attached_model_is_a_plain_model(model):
    stock = copy.deepcopy(model)
    with headinfer.attach(model) as run:
        twin = copy.deepcopy(model)
        for weights in (twin, stock):
            torch.nn.init.zeros_(weights.get_output_embeddings().weight[:50].data)
            torch.nn.init.constant_(weights.model.norm.weight, -0.5)
        assert torch.equal(generate(twin), generate(stock))
        assert not torch.equal(generate(twin), generate(model))
        assert run.plan is not None
        assert twin.config._attn_implementation == stock.config._attn_implementation
        assert model.config._attn_implementation == "headinfer"
        with headinfer.attach(twin) as other:
            assert torch.equal(generate(twin), generate(stock))
            assert other.cache is not run.cache
    assert torch.equal(generate(twin), generate(stock))


def test_an_attached_model_cannot_be_pickled(model):
    with headinfer.attach(model), pytest.raises(InputError, match="Close the session first"):
        pickle.dumps(model)
    pickle.loads(pickle.dumps(model))


def test_nothing_of_a_session_is_saved(model, tmp_path):
    with headinfer.attach(model, chunk_tokens=64):
        model.save_pretrained(tmp_path)
    saved = "".join(file.read_text() for file in tmp_path.glob("*.json"))
    assert "prefill_chunk_size" not in saved
    assert "headinfer" not in saved


class Lengths:
    """The tokens of every forward pass."""

    def __init__(self):
        self.found = []

    def on_event(self, event):
        if isinstance(event, ForwardStarted):
            self.found.append(event.new_tokens)


def test_another_generation_config_still_prefills_in_chunks(model):
    before, lengths = model.generation_config, Lengths()
    try:
        with headinfer.attach(model, chunk_tokens=128, observer=lengths):
            model.generation_config = GenerationConfig(pad_token_id=0)
            generate(model, new=1)
            prompt = torch.ones((1, 150), dtype=torch.long)
            model.generate(prompt, generation_config=GenerationConfig(max_new_tokens=1))
    finally:
        model.generation_config = before
    assert lengths.found == [128, 128, 44, 128, 22]


def test_a_chunk_size_of_the_user_wins(model):
    lengths = Lengths()
    with headinfer.attach(model, chunk_tokens=128, observer=lengths):
        model.generate(
            torch.ones((1, 150), dtype=torch.long), max_new_tokens=1, prefill_chunk_size=100
        )
    assert lengths.found == [100, 50]


def test_a_filled_cache_goes_on_in_chunks(model):
    prompt = torch.randint(0, 99, (1, 500), generator=torch.Generator().manual_seed(2))
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    lengths = Lengths()
    with headinfer.attach(model, chunk_tokens=64, observer=lengths) as run:
        cache = run.new_cache()
        model.generate(prompt[:, :100], **cache_argument(model, cache), max_new_tokens=1)
        found = model.generate(
            prompt, **cache_argument(model, cache), max_new_tokens=8, do_sample=False
        )
    assert torch.equal(found, expected)
    assert lengths.found[2:9] == [64] * 6 + [16]


def test_the_first_plan_is_for_the_batch_that_is_told(model):
    with headinfer.attach(model, expected_tokens=308, batch_size=3) as run:
        before = run.plan
        prompt = torch.ones((1, 300), dtype=torch.long)
        model.generate(prompt, max_new_tokens=8, num_beams=3)
        assert before.batch == run.plan.batch == 3
        assert before.host_bytes == run.plan.host_bytes >= 3 * 308 * TOKEN_BYTES
    for wrong in (0, 1.5):
        with pytest.raises(InputError, match="batch_size="):
            headinfer.attach(model, batch_size=wrong)

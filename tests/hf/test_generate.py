# SPDX-License-Identifier: Apache-2.0
"""`generate()` and its features yield the tokens of the stock model, and leave it as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.testing.zoo import ZOO, ModelAbsent

NEW = 12

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"num_beams": 4},
    "beams_several_returns": {"num_beams": 4, "num_return_sequences": 3},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "prefill_chunk_size": {"prefill_chunk_size": 37},
    "static_cache": {"cache_implementation": "static"},
    "offloaded_cache_on_cpu": {"cache_implementation": "dynamic"},
    "no_cache": {"use_cache": False},
}


def generate(model: PreTrainedModel, **arguments: Any) -> Tensor:
    torch.manual_seed(0)
    if "input_ids" in arguments:
        arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    found: Tensor = model.generate(**{"max_new_tokens": NEW, "do_sample": False, **arguments})
    return found


def same_tokens(model: PreTrainedModel, options: dict[str, Any], **arguments: Any) -> None:
    expected = generate(model, **arguments)
    with headinfer.attach(model, **options) as run:
        found = generate(model, **arguments)
        assert run.cache is None or run.cache.head_layers
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_yields_the_same_tokens(
    feature: str, llama: PreTrainedModel, ids: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    same_tokens(llama, options, input_ids=ids(), **FEATURES[feature])


@pytest.mark.parametrize("feature", ["greedy", "beams", "sampling", "prompt_lookup"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_yields_the_same_tokens(
    feature: str, side: str, llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    rows = 1 if feature == "prompt_lookup" else 3  # transformers looks up one row at a time
    tokens, mask = padded(ids(batch=rows), side, (90, 0, 17)[:rows])
    same_tokens(llama, options, input_ids=tokens, attention_mask=mask, **FEATURES[feature])


def padded(tokens: Tensor, side: str, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`tokens` with `counts` of them, per row, padding on one side."""
    mask = torch.ones_like(tokens)
    for row, count in enumerate(counts):
        hidden = slice(0, count) if side == "left" else slice(tokens.shape[1] - count, None)
        mask[row, hidden] = 0
    return tokens * mask, mask


@pytest.mark.parametrize("feature", ["greedy", "beams", "several_samples"])
@pytest.mark.parametrize("length", [7, 150], ids=["short", "several_chunks"])
@pytest.mark.parametrize("pad", [0, 5])
def test_a_prompt_of_embeddings_yields_the_same_tokens(
    feature: str, length: int, pad: int, llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    tokens, mask = padded(ids(length, batch=2), "left", (pad, 0))
    embeds = llama.get_input_embeddings()(tokens).detach()
    same_tokens(llama, options, inputs_embeds=embeds, attention_mask=mask, **FEATURES[feature])


def test_a_prompt_of_embeddings_is_prefilled_in_chunks(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    lengths: list[int] = []
    embeds = llama.get_input_embeddings()(ids(50)).detach()

    class Watch:
        def on_event(self, event: Any) -> None:
            if type(event).__name__ == "ForwardStarted":
                lengths.append(event.new_tokens)

    with headinfer.attach(llama, observer=Watch(), **options):
        generate(llama, inputs_embeds=embeds, max_new_tokens=3)
    assert lengths == [16, 16, 16, 2, 1, 1]


def test_embeddings_continue_a_cache(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    embeds = llama.get_input_embeddings()(ids(150)).detach()
    expected = generate(llama, inputs_embeds=embeds)
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        cache = run.new_cache()
        llama(inputs_embeds=embeds[:, :100], **cache_argument(llama, cache))
        found = generate(llama, inputs_embeds=embeds, **cache_argument(llama, cache))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("draft", ["random", "self", "headinfer"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_assisted_decoding_yields_the_same_tokens(
    draft: str, family: str, build: Any, ids: Any, options: dict[str, Any]
) -> None:
    window = {"sliding_window": 12} if family == "gemma2" else {}
    model = build(family, **window)
    other = build(family, num_hidden_layers=3, **window)
    helper = model if draft == "self" else other
    expected = generate(model, input_ids=ids())
    with headinfer.attach(model, **options):
        if draft == "headinfer":
            with headinfer.attach(other, **options):
                found = generate(model, input_ids=ids(), assistant_model=helper)
        else:
            found = generate(model, input_ids=ids(), assistant_model=helper)
    assert found.tolist() == expected.tolist()


def turns(model: PreTrainedModel, cache: Any, first: Tensor, questions: list[Tensor]) -> list[Any]:
    """A conversation: every question follows the whole of what was said before."""
    said, answers = first, []
    for question in questions:
        said = generate(
            model, input_ids=torch.cat([said, question], 1), **cache_argument(model, cache)
        )
        answers.append(said.tolist())
    return answers


def test_a_cache_serves_several_turns(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    questions = [ids(20, seed=seed) for seed in (1, 2, 3)]
    stock = DynamicCache(config=llama.config)
    expected = turns(llama, stock, ids(), questions)
    with headinfer.attach(llama, **options) as run:
        cache = run.new_cache()
        assert turns(llama, cache, ids(), questions) == expected
    assert cache.get_seq_length() == stock.get_seq_length()


def test_a_copied_cache_answers_several_questions_about_one_text(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    text, questions = ids(), [ids(9, seed=1), ids(21, seed=2)]
    asked = [torch.cat([text, question], 1) for question in questions]
    expected = [generate(llama, input_ids=tokens).tolist() for tokens in asked]
    with headinfer.attach(llama, **options) as run:
        cache = run.new_cache()
        with torch.no_grad():
            llama(text, **cache_argument(llama, cache))
        for tokens, wanted in zip(asked, expected, strict=True):
            twin = copy.deepcopy(cache)
            assert type(twin) is type(cache)
            found = generate(llama, input_ids=tokens, **cache_argument(llama, twin))
            assert found.tolist() == wanted
        assert cache.get_seq_length() == text.shape[1]


def test_a_cropped_cache_takes_another_question(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    text, again = ids(), torch.cat([ids(), ids(21, seed=2)], 1)
    expected = generate(llama, input_ids=again)
    with headinfer.attach(llama, **options) as run:
        cache = run.new_cache()
        generate(
            llama, input_ids=torch.cat([text, ids(9, seed=1)], 1), **cache_argument(llama, cache)
        )
        cache.crop(text.shape[1] - cache.get_seq_length())
        found = generate(llama, input_ids=again, **cache_argument(llama, cache))
    assert found.tolist() == expected.tolist()


def test_a_reset_cache_starts_anew(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    expected = generate(llama, input_ids=ids(140, batch=2, seed=1))
    with headinfer.attach(llama, **options) as run:
        cache = run.new_cache()
        generate(llama, input_ids=ids(), **cache_argument(llama, cache))
        cache.reset()
        assert cache.get_seq_length() == 0
        found = generate(llama, input_ids=ids(140, batch=2, seed=1), **cache_argument(llama, cache))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("first", [True, False], ids=["inference_first", "no_grad_first"])
def test_inference_mode_and_no_grad_may_alternate_on_one_cache(
    first: bool, llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    questions = [ids(20, seed=seed) for seed in (1, 2)]
    expected = turns(llama, DynamicCache(config=llama.config), ids(), questions)
    with headinfer.attach(llama, **options) as run:
        cache, said, answers = run.new_cache(), ids(), []
        for turn, question in enumerate(questions):
            with torch.inference_mode(first == (turn == 0)):
                said = torch.cat([said, question], 1)
                said = generate(llama, input_ids=said, **cache_argument(llama, cache), num_beams=1)
                answers.append(said.tolist())
            cache.crop(-1)  # generate takes the missing token up again
    assert answers == expected


def test_generate_with_an_explicit_cache_and_no_session(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    from headinfer import HeadCache

    expected = generate(llama, input_ids=ids())
    llama.set_attn_implementation("headinfer")
    cache = HeadCache(llama.config, **options)
    found = generate(llama, input_ids=ids(), **cache_argument(llama, cache), prefill_chunk_size=33)
    assert found.tolist() == expected.tolist()
    assert cache.get_seq_length() == 150 + NEW - 1


def test_positions_may_be_packed(llama: PreTrainedModel, ids: Any, options: dict[str, Any]) -> None:
    tokens = ids(160)
    positions = torch.cat([torch.arange(100), torch.arange(60)])[None]
    with torch.no_grad():
        expected = llama(tokens, position_ids=positions).logits
        with headinfer.attach(llama, **options):
            found = llama(tokens, position_ids=positions).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_pipeline_runs_unmodified(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    from transformers import TextGenerationPipeline

    pipe = TextGenerationPipeline(
        model=llama, tokenizer=letters(), max_new_tokens=NEW, do_sample=False
    )
    texts = ["one text " * 20, "another " * 6]
    expected = [pipe(texts[0]), pipe(texts, batch_size=2)]
    with headinfer.attach(llama, **options) as run:
        assert [pipe(texts[0]), pipe(texts, batch_size=2)] == expected
        assert run.stats.as_dict()
        assert run.cache is not None
        assert run.cache.get_seq_length() > 100


def letters() -> Any:
    """A tokenizer with a token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", padding_side="left"
    )


ENCODER_DECODERS = {
    "t5": {
        "model_class": "T5ForConditionalGeneration",
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    },
    "bart": {
        "model_class": "BartForConditionalGeneration",
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "decoder_start_token_id": 2,
        "init_std": 0.2,
    },
    "whisper": {
        "model_class": "WhisperForConditionalGeneration",
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 50,
        "max_target_positions": 400,
        "decoder_start_token_id": 1,
        "init_std": 0.2,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}


@pytest.mark.parametrize("feature", ["greedy", "beams"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_yields_the_same_tokens(
    family: str, feature: str, build: Any, ids: Any, options: dict[str, Any]
) -> None:
    if family == "t5":
        try:
            ZOO["t5"].build()
        except ModelAbsent as absent:
            pytest.skip(str(absent))
    model = build(family, num_key_value_heads=4, **ENCODER_DECODERS[family])
    given: dict[str, Any] = dict(FEATURES[feature])
    if family == "whisper":
        given["input_features"] = torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(1))
        given["max_new_tokens"] = 140
    else:
        given |= {"input_ids": ids(40), "decoder_input_ids": ids(140, seed=1)}
    same_tokens(model, options, **given)


def test_keeping_nothing_head_by_head_is_no_error(
    build: Any, ids: Any, options: dict[str, Any]
) -> None:
    model = build("mistral", sliding_window=24)
    expected = generate(model, input_ids=ids())
    with headinfer.attach(model, **options) as run:
        assert run.head_layers == 0
        assert "nothing is offloaded" in run.warnings[0]
        assert generate(model, input_ids=ids()).tolist() == expected.tolist()


def test_every_way_of_passing_a_cache_reaches_the_session(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        for args, kwargs in (
            ((), {}),
            ((), {"use_cache": None}),
            ((), {"use_cache": True, "past_key_values": None}),
            ((), {"use_cache": True, **cache_argument(llama, None)}),
            ((None, None, None), {}),
            ((None, None, DynamicCache(config=llama.config)), {}),
        ):
            out = llama(ids(20), *args, **kwargs)
            assert cache_returned(out) is run.cache
            assert isinstance(cache_returned(out), headinfer.HeadCache)
        given = headinfer.HeadCache(llama.config, **options)
        llama(ids(20), None, None, given)
        assert run.cache is given


def test_no_cache_is_made_where_none_is_wanted(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        assert cache_returned(llama(ids(20), use_cache=False)) is None
        llama.config.use_cache = False
        assert cache_returned(llama(ids(20))) is None
        assert run.cache is None


def state(model: PreTrainedModel) -> Any:
    """What attaching may change."""
    configs = {
        name: getattr(module, "config", None)._attn_implementation_internal
        for name, module in model.named_modules()
        if getattr(module, "config", None) is not None
    }
    return (
        configs,
        model.generation_config.to_dict(),
        sorted(model.__dict__),
        len(model._forward_pre_hooks),
        len(model._forward_hooks),
        model.config.to_dict(),
    )


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("how", ["close", "exception", "refused"])
def test_closing_leaves_the_model_as_it_was(
    family: str, how: str, build: Any, ids: Any, options: dict[str, Any]
) -> None:
    model = build(family) if family == "llama" else llava(build)
    model.generation_config.prefill_chunk_size = 77
    before = state(model)
    if how == "refused":
        with pytest.raises(headinfer.BudgetTooSmall):
            headinfer.attach(model, host_memory=1, expected_tokens=1000)
        assert state(model) == before
        return
    session = headinfer.attach(model, **options)
    assert state(model) != before
    if how == "close":
        session.close()
        session.close()
    else:
        with pytest.raises(ZeroDivisionError), session:
            raise ZeroDivisionError
    assert state(model) == before


def llava(build: Any) -> Any:
    """A multimodal model whose parts name different attention implementations."""
    text = {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 32,
    }
    model = build(
        "llava",
        model_class="LlavaForConditionalGeneration",
        text_config=text,
        vision_config=vision,
        attn_implementation={"text_config": "eager", "vision_config": "sdpa"},
    )
    kinds = {
        config._attn_implementation
        for config in (model.config.text_config, model.config.vision_config)
    }
    assert kinds == {"eager", "sdpa"}
    return model


def test_a_generation_config_replaced_meanwhile_is_left_alone(
    llama: PreTrainedModel, options: dict[str, Any]
) -> None:
    first = llama.generation_config
    session = headinfer.attach(llama, **options)
    llama.generation_config = copy.deepcopy(first)
    llama.generation_config.prefill_chunk_size = 5
    session.close()
    assert first.prefill_chunk_size is None
    assert llama.generation_config.prefill_chunk_size == 5


def test_attaching_twice_is_an_error(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    with headinfer.attach(llama, **options):
        with pytest.raises(headinfer.InputError, match="attached already"):
            headinfer.attach(llama, **options)
        with pytest.raises(headinfer.InputError, match="attached"):
            headinfer.doctor(llama)
    with headinfer.attach(llama, **options):
        pass


def test_a_model_without_a_head_is_attached_too(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    body = llama.model
    with torch.no_grad():
        expected = body(ids()).last_hidden_state
        with headinfer.attach(body, **options) as run:
            found = body(ids()).last_hidden_state
            assert run.cache is not None
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert body.config._attn_implementation == "eager"


def test_a_length_is_told_to_the_cache_it_is_meant_for(
    llama: PreTrainedModel, ids: Any, options: dict[str, Any]
) -> None:
    with headinfer.attach(llama, **options) as run, torch.no_grad():
        first = run.new_cache()
        generate(llama, input_ids=ids(200), **cache_argument(llama, first))
        assert first.plan is not None
        assert first.plan.expected_tokens == 200 + NEW
        generate(llama, input_ids=ids(300), **cache_argument(llama, first))
        second = run.new_cache()
        llama(ids(10), **cache_argument(llama, second))
        assert second.plan is not None
        assert second.plan.expected_tokens is None

# SPDX-License-Identifier: Apache-2.0
"""What goes wrong says so, names the remedy, and the remedy works."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import headinfer
from headinfer.errors import GpuOutOfMemory
from headinfer.hf import attention as attention_module
from headinfer.hf.attention import HARMLESS, REFUSED, headinfer_attention
from headinfer.hf.cache import HeadCache
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.hf.masks import headinfer_mask
from headinfer.testing import zoo

STEPS = (100, 40, 9, 1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def handles(options: dict[str, Any], tokens: int = 150) -> tuple[Tensor, Tensor]:
    keys, values = HeadCache(**options).update(
        random(1, 2, tokens, 16), random(1, 2, tokens, 16), 0
    )
    return keys, values


# A head-wise cache under another attention implementation.


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_cache_under_another_implementation_names_the_remedy(
    implementation: str,
    llama: Any,
    ids: Any,
    steps: Any,
    head_cache: Any,
    close: Any,
    resident: Any,
) -> None:
    expected = resident(llama, ids(), STEPS)
    llama.set_attn_implementation(implementation)
    with pytest.raises(headinfer.HandleError, match=r"set_attn_implementation\('headinfer'\)"):
        steps(llama, ids(), STEPS, head_cache(llama))
    llama.set_attn_implementation("headinfer")
    close(steps(llama, ids(), STEPS, head_cache(llama)), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_materialising_makes_any_implementation_work(
    implementation: str, llama: Any, ids: Any, steps: Any, head_cache: Any
) -> None:
    llama.set_attn_implementation(implementation)
    expected = steps(llama, ids(), STEPS, DynamicCache(config=llama.config))
    cache = head_cache(llama, on_unsupported="materialize")
    assert torch.equal(steps(llama, ids(), STEPS, cache), expected)


# headinfer's attention over a cache that is not head-wise.


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_cache_is_exact_and_said_once_to_stay_on_the_device(
    kind: str, llama: Any, ids: Any, steps: Any, resident: Any, close: Any, caplog: Any
) -> None:
    expected = resident(llama, ids(), STEPS)
    llama.set_attn_implementation("headinfer")
    attention_module._say_resident.cache_clear()
    if kind == "dynamic":
        cache: Any = DynamicCache(config=llama.config)
    else:
        cache = StaticCache(config=llama.config, max_cache_len=160)
    with caplog.at_level(logging.WARNING, "headinfer"):
        close(steps(llama, ids(), STEPS, cache), expected)
    said = [record.getMessage() for record in caplog.records if "headinfer" in record.name]
    assert len(said) == 1
    assert "nothing is offloaded" in said[0]
    assert "HeadCache" in said[0]


# Models headinfer cannot stream.


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_a_model_outside_the_attention_interface_is_refused_or_materialised(
    name: str, ids: Any, steps: Any
) -> None:
    model = zoo.REFUSED[name].build()
    tokens = ids(60) % model.config.vocab_size
    before = steps(model, tokens, (50, 9, 1), DynamicCache(config=model.config))
    with pytest.raises(headinfer.UnsupportedModel, match="on_unsupported='materialize'"):
        headinfer.attach(model)
    assert not model._forward_pre_hooks
    with headinfer.attach(model, on_unsupported="materialize") as run:
        assert run.materializes
        assert torch.equal(steps(model, tokens, (50, 9, 1)), before)
        assert run.cache is not None
        assert run.cache.get_seq_length() == 60


def test_a_model_that_edits_cached_keys_is_told_the_operation(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    class Editing(HeadCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(*args, **kwargs)
            return keys * 2, values

    with (
        headinfer.attach(llama, **options),
        torch.no_grad(),
        pytest.raises(headinfer.HandleError, match=r"aten\.mul.*keys of layer 0.*materialize"),
    ):
        llama(ids(), **cache_argument(llama, Editing(llama.config, **options)))


def test_a_model_that_edits_the_mask_is_told_the_operation() -> None:
    mask = headinfer_mask(1, 5, 9, q_offset=4)
    with pytest.raises(headinfer.HandleError, match=r"aten\.constant_pad_nd.*eager"):
        torch.nn.functional.pad(mask, (0, 3), value=0.0)
    with pytest.raises(headinfer.HandleError, match=r"aten\.slice"):
        _ = mask[..., :2]
    with pytest.raises(headinfer.HandleError, match=r"aten\.expand"):
        mask.expand(2, -1, -1, -1)


def test_only_one_of_keys_and_values_replaced_is_noticed(options: dict[str, Any]) -> None:
    keys, _ = handles(options)
    module = SimpleNamespace(layer_idx=3)
    query = random(1, 4, 1, 16)
    with pytest.raises(headinfer.HandleError, match="replaced one of the two"):
        headinfer_attention(module, query, keys, random(1, 2, 150, 16))
    with pytest.raises(headinfer.HandleError, match="not the same layer and length"):
        headinfer_attention(module, query, keys, handles(options)[1])


def test_a_model_without_a_cache_is_refused(build: Any) -> None:
    model = build("vit", model_class="ViTModel", image_size=28, patch_size=14)
    with pytest.raises(headinfer.UnsupportedModel, match="takes no cache"):
        headinfer.attach(model)
    assert model.config._attn_implementation == "eager"


# Arguments of the attention call.


@pytest.mark.parametrize("plain", [False, True], ids=["cache", "plain"])
def test_an_unknown_argument_is_refused_by_name(plain: bool, options: dict[str, Any]) -> None:
    keys, values = (random(1, 2, 150, 16),) * 2 if plain else handles(options)
    module, query = nn.Linear(1, 1), random(1, 4, 1, 16)
    headinfer_attention(module, query, keys, values, temperature_map=None)
    with pytest.raises(headinfer.UnsupportedAttention, match=r"Linear.*temperature_map") as found:
        headinfer_attention(module, query, keys, values, temperature_map=torch.ones(1))
    assert "temperature_map" in found.value.reasons[0]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_argument_says_why(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(headinfer.UnsupportedAttention, match=re.escape(REFUSED[name])):
        headinfer_attention(
            nn.Identity(), random(1, 4, 1, 16), *handles(options), **{name: object()}
        )


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_harmless_argument_changes_nothing(name: str, options: dict[str, Any]) -> None:
    query, pair = random(1, 4, 1, 16), handles(options)
    bare = headinfer_attention(nn.Identity(), query, *pair)[0]
    assert torch.equal(headinfer_attention(nn.Identity(), query, *pair, **{name: 7})[0], bare)


def test_an_unknown_argument_reaches_the_user_through_the_model(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    with (
        headinfer.attach(llama, **options),
        torch.no_grad(),
        pytest.raises(headinfer.UnsupportedAttention, match=r"LlamaAttention.*surprise"),
    ):
        llama(ids(), surprise=1.5)


def test_dropout_with_softcap_is_refused_on_the_plain_path() -> None:
    one = random(1, 2, 9, 16)
    with pytest.raises(headinfer.UnsupportedAttention, match=r"dropout 0\.5"):
        headinfer_attention(nn.Identity(), one, one, one, dropout=0.5, softcap=30.0)


def test_a_position_bias_of_absurd_size_is_refused(options: dict[str, Any]) -> None:
    bias = torch.zeros(1).expand(1, 8, 2**14, 2**14)
    with pytest.raises(headinfer.UnsupportedAttention, match="lower chunk_tokens"):
        headinfer_attention(
            nn.Identity(), random(1, 4, 1, 16), *handles(options), position_bias=bias
        )


def test_transformers_paged_cache_is_refused(llama: Any, ids: Any, options: dict[str, Any]) -> None:
    with (
        headinfer.attach(llama, **options),
        pytest.raises(headinfer.UnsupportedAttention, match="paged cache"),
        torch.no_grad(),
    ):
        llama(ids(), cache=object())


def test_continuous_batching_is_refused_by_transformers(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    with headinfer.attach(llama, **options), pytest.raises(ValueError, match="headinfer"):
        llama.init_continuous_batching()


# The state of a cache.


def test_another_batch_size_is_an_error(llama: Any, ids: Any, steps: Any, options: Any) -> None:
    with headinfer.attach(llama, **options) as run:
        cache = run.new_cache()
        steps(llama, ids(), (150,), cache)
        with pytest.raises(headinfer.CacheStateError, match=r"holds 1 sequences.*brings 2"):
            steps(llama, ids(10, batch=2), (10,), cache)


def test_another_shape_or_type_is_an_error(options: dict[str, Any]) -> None:
    cache = HeadCache(**options)
    cache.update(random(1, 2, 20, 16), random(1, 2, 20, 16), 0)
    for other in (random(1, 3, 20, 16), random(1, 2, 20, 8), random(1, 2, 20, 16).double()):
        with pytest.raises(headinfer.CacheStateError, match="use a new cache"):
            cache.update(other, other, 0)
    assert cache.get_seq_length() == 20


def test_assigning_keys_is_an_error(options: dict[str, Any]) -> None:
    cache = HeadCache(**options)
    cache.update(random(1, 2, 20, 16), random(1, 2, 20, 16), 0)
    with pytest.raises(headinfer.CacheStateError, match="layer 0"):
        cache.layers[0].keys = random(1, 2, 10, 16)
    with pytest.raises(headinfer.CacheStateError, match="layer 0"):
        cache.layers[0].values = random(1, 2, 10, 16)


def fails_at(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "forward", fail)


@pytest.mark.parametrize("where", ["o_proj", "mlp"])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_after_an_interrupted_forward_the_cache_is_cropped_to_what_all_layers_hold(
    family: str,
    failing: int,
    where: str,
    build: Any,
    ids: Any,
    steps: Any,
    resident: Any,
    close: Any,
    options: Any,
    monkeypatch: Any,
) -> None:
    model = build(family, sliding_window=300) if family == "gemma2" else build(family)
    tokens = ids(190)
    expected = resident(model, tokens, (140, 40, 9, 1))
    with headinfer.attach(model, **options) as run:
        cache = run.new_cache()
        steps(model, tokens[:, :140], (140,), cache)
        layer = model.model.layers[failing]
        with monkeypatch.context() as patch:
            fails_at(patch, layer.self_attn.o_proj if where == "o_proj" else layer.mlp)
            with pytest.raises(KeyboardInterrupt):
                steps(model, tokens[:, 140:180], (40,), cache)
        left = 180 if failing == 1 else 140
        assert cache.crop_to_complete() == left
        assert {layer.get_seq_length() for layer in cache.layers} == {left}
        sizes = (9, 1) if left == 180 else (40, 9, 1)
        close(steps(model, tokens[:, left:], sizes, cache), expected[:, left:])


def test_what_cannot_be_cropped_after_an_interruption_says_reset(
    build: Any, ids: Any, steps: Any, options: Any, monkeypatch: Any
) -> None:
    for model in (build("gemma2", sliding_window=20), zoo.ZOO["falcon_h1"].build()):
        tokens = ids() % model.config.vocab_size
        with headinfer.attach(model, **options) as run:
            cache = run.new_cache()
            steps(model, tokens, (150,), cache)
            assert cache.crop_to_complete() == 150 if cache.is_sliding[0] else True
            with monkeypatch.context() as patch:
                fails_at(
                    patch,
                    model.model.layers[0].post_attention_layernorm
                    if cache.is_sliding[0]
                    else model.model.layers[0].self_attn.o_proj,
                )
                with pytest.raises(KeyboardInterrupt):
                    steps(model, tokens[:, :9], (9,), cache)
            with pytest.raises(headinfer.CacheStateError, match=r"reset\(\)"):
                cache.crop_to_complete()
            cache.reset()
            assert cache.crop_to_complete() == 0
            fresh = steps(model, tokens, (150,))
            assert torch.equal(steps(model, tokens, (150,), cache), fresh)


# Budgets.


@pytest.mark.parametrize("batch", [1, 3])
def test_a_host_budget_too_small_names_the_smallest_that_works(
    batch: int, llama: Any, ids: Any, steps: Any, options: dict[str, Any]
) -> None:
    def run(host: Any) -> None:
        given = {**options, "host_memory": host}
        with headinfer.attach(llama, expected_tokens=400, **given):
            steps(llama, ids(400, batch=batch), (400,))

    # What passes by on the way to a GPU's disk does not depend on the batch.
    depends = not ("disk" in options and "staging" in options)
    with pytest.raises(headinfer.BudgetTooSmall, match="host_memory") as found:
        run("1KiB")
    needed = found.value.needed_bytes
    assert f"{needed} bytes" in str(found.value)
    if batch > 1 and depends:
        with pytest.raises(headinfer.BudgetTooSmall, match="host_memory") as found:
            run(needed)
        needed = found.value.needed_bytes
    run(needed)
    with pytest.raises(headinfer.BudgetTooSmall):
        run(needed - 1)


def test_the_shorter_context_named_fits_the_host_budget(llama: Any) -> None:
    with pytest.raises(headinfer.BudgetTooSmall, match="shorten the context") as found:
        headinfer.plan_for(
            llama.config, prompt_tokens=10_000, host_memory="1MiB", device="cpu", new_tokens=1
        )
    named = re.search(r"context to ([\d,]+) tokens", str(found.value))
    assert named is not None
    fits = int(named[1].replace(",", ""))
    assert fits > 1000
    headinfer.plan_for(llama.config, prompt_tokens=fits, host_memory="1MiB", device="cpu")


@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 4096}, {"resident_heads": 2}])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_gpu_budget_too_small_names_the_smallest_that_works(
    options: dict[str, Any], batch: int, build: Any
) -> None:
    config = build("llama", hidden_size=512, intermediate_size=2048, head_dim=64).config

    def plan(gpu: Any, **more: Any) -> headinfer.Plan:
        return headinfer.plan_for(
            config,
            prompt_tokens=100_000,
            gpu_memory=gpu,
            host_memory="1TiB",
            batch=batch,
            device="cuda",
            **{**options, **more},
        )

    needed = named_budget(plan, "1MiB")
    assert plan(needed).gpu_bytes <= needed
    assert named_budget(plan, needed - 1) == needed


def named_budget(plan: Any, gpu: Any) -> int:
    with pytest.raises(headinfer.BudgetTooSmall) as found:
        plan(gpu)
    assert found.value.tier == "gpu"
    return found.value.needed_bytes


def test_the_chunk_named_fits_the_gpu_budget(build: Any) -> None:
    config = build("llama", hidden_size=512, intermediate_size=2048, head_dim=64).config
    given: dict[str, Any] = {"prompt_tokens": 100_000, "host_memory": "1TiB", "device": "cuda"}
    small = headinfer.plan_for(
        config, gpu_memory="1TiB", chunk_tokens=512, resident_heads=0, **given
    )
    with pytest.raises(headinfer.BudgetTooSmall, match="Lower chunk_tokens") as found:
        headinfer.plan_for(config, gpu_memory=small.gpu_bytes, chunk_tokens=65536, **given)
    named = re.search(r"chunk_tokens to ([\d,]+) or less", str(found.value))
    assert named is not None
    chunk = int(named[1].replace(",", ""))
    headinfer.plan_for(config, gpu_memory=small.gpu_bytes, chunk_tokens=chunk, **given)


@pytest.mark.parametrize("heads", [0, 1])
def test_a_tier_that_fills_up_midway_leaves_a_cache_that_goes_on(
    heads: int, llama: Any, ids: Any, steps: Any, close: Any, resident: Any, staged: Any
) -> None:
    tokens = torch.cat([ids(200), ids(1600, seed=1)], 1)
    # Room for a second segment of 1024 tokens in the first layer, not in the second.
    host = (3 * 2 + 1) * (2 - heads) * 64
    options = {**staged, "resident_heads": heads, "host_memory": f"{host}KiB"}
    other = ids(20, seed=2)
    expected = {
        past: resident(llama, torch.cat([tokens[:, :past], other], 1), (past + 20,))[:, past:]
        for past in (1100, 200)
    }
    with headinfer.attach(llama, **options) as run:
        cache = run.new_cache()
        steps(llama, tokens[:, :200], (200,), cache)
        with pytest.raises(headinfer.TierFull, match=rf"of {host}\.00 KiB allowed") as found:
            steps(llama, tokens[:, 200:], (100,) * 16, cache)
        assert found.value.budget_bytes == host * 1024
        lengths = {layer.get_seq_length() for layer in cache.layers}
        assert len(lengths) == 2
        keep = cache.crop_to_complete()
        assert keep == min(lengths) == 1100
        for past in (keep, 200):  # first what the tail still takes
            close(steps(llama, other, (20,), cache), expected[past])
            cache.crop(200)


# Raw pointers.


def test_a_handle_has_no_address_to_give(options: dict[str, Any]) -> None:
    for tensor in (*handles(options), headinfer_mask(1, 5, 5)):
        assert tensor.data_ptr() == 0
        for use in (lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.contiguous() + 1):
            with pytest.raises((headinfer.HandleError, RuntimeError, TypeError)):
                use(tensor)


# Caches that models replace or ignore, and models whose chunks differ.


def longrope(build: Any) -> Any:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    return build(
        "phi3",
        head_dim=8,
        sliding_window=None,
        original_max_position_embeddings=160,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 160,
            **factors,
        },
    )


@pytest.mark.parametrize("length", [100, 155, 180])
def test_a_cache_that_the_model_drops_is_supplied_again(
    length: int, build: Any, ids: Any, options: dict[str, Any]
) -> None:
    model = longrope(build)
    given = {"max_new_tokens": 12, "attention_mask": torch.ones(1, length, dtype=torch.long)}
    stock = model.generate(ids(length), return_dict_in_generate=True, **given)
    with headinfer.attach(model, **{**options, "chunk_tokens": 512}) as run:
        assert model.generate(ids(length), **given).tolist() == stock.sequences.tolist()
        assert run.cache is not None
        # Older versions of transformers forget the prompt here, with any cache.
        assert run.cache.get_seq_length() == cache_returned(stock).get_seq_length()


def test_longrope_is_warned_about(build: Any) -> None:
    with headinfer.attach(longrope(build)) as run:
        assert any("rotary" in warning and "chunk_tokens" in warning for warning in run.warnings)
        assert any("whole prompt again" in warning for warning in run.warnings)


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("gemma3", "both directions"),
        ("paligemma", "both directions"),
        ("jamba", "scan"),
        ("bamba", "scan"),
    ],
)
def test_a_model_whose_chunks_differ_is_warned_about(name: str, about: str) -> None:
    model = zoo.ZOO[name].build()
    with headinfer.attach(model) as run:
        assert any(about in warning and "chunk" in warning for warning in run.warnings)


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "falcon_h1", "gemma2", "gpt_oss", "t5"])
def test_an_ordinary_model_is_attached_without_a_warning(name: str) -> None:
    try:
        model = zoo.ZOO[name].build()
    except zoo.ModelAbsent as absent:
        pytest.skip(str(absent))
    with headinfer.attach(model) as run:
        assert run.warnings == []


def test_dynamic_rope_is_warned_about(build: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("llama", rope_parameters=rope)
    with headinfer.attach(model) as run:
        assert "dynamic" in run.warnings[0]


# Options.


@pytest.mark.parametrize(
    ("given", "about"),
    [
        ({"gpu_memory": "banana"}, "banana"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"chunk_tokens": 1.5}, "chunk_tokens"),
        ({"on_unsupported": "ignore"}, "materialize"),
        ({"kv_format": "int3"}, "exact"),
        ({"chunk_size": 4}, "'chunk_size' is not an option"),
        ({"gpu_memory": "8GiB"}, "on the CPU"),
        ({"resident_heads": 1}, "leave it out"),
        ({"attention": "magic"}, "known: "),
        ({"num_slots": 0, "staging": True}, "num_slots"),
    ],
)
def test_an_unusable_option_is_one_clear_error(
    given: dict[str, Any], about: str, llama: Any, ids: Any, steps: Any
) -> None:
    with (
        pytest.raises(headinfer.InputError, match=re.escape(about)),
        headinfer.attach(llama, **given),
    ):
        steps(llama, ids(20), (20,))
    assert llama.config._attn_implementation == "eager"
    assert not llama._forward_pre_hooks


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_made_for_another_model_is_named(
    layers: int, llama: Any, ids: Any, build: Any, options: dict[str, Any]
) -> None:
    other = build("llama", num_hidden_layers=layers)
    cache = headinfer.HeadCache(other.config, **options)
    with headinfer.attach(llama, **options):
        with pytest.raises(headinfer.CacheStateError, match=rf"has 2 layers .* for {layers};"):
            llama.generate(ids(), **cache_argument(llama, cache), max_new_tokens=2)


def test_a_cache_with_too_few_layers_is_named_without_a_session(
    llama: Any, ids: Any, build: Any, options: dict[str, Any]
) -> None:
    cache = headinfer.HeadCache(build("llama", num_hidden_layers=1).config, **options)
    llama.set_attn_implementation("headinfer")
    with pytest.raises(headinfer.CacheStateError, match=r"at least 2 layers .* made for 1;"):
        llama.generate(ids(), **cache_argument(llama, cache), max_new_tokens=2)


def test_a_reset_cache_plans_anew(llama: Any, ids: Any, head_cache: Any, close: Any) -> None:
    with torch.no_grad():
        expected = llama(ids(150, batch=3)).logits
        llama.set_attn_implementation("headinfer")
        cache = head_cache(llama)
        llama(ids(200), **cache_argument(llama, cache))
        cache.reset()
        assert cache.plan is None
        assert cache.stats().host_bytes == 0
        close(llama(ids(150, batch=3), **cache_argument(llama, cache)).logits, expected)
    assert cache.plan.batch == 3


def failing(module: Any, passes: int) -> Any:
    """`module` runs out of GPU memory in its forward pass number `passes`, once."""
    left = [passes]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")

    return module.register_forward_pre_hook(hook)


def test_out_of_memory_in_a_prefill_leaves_what_was_complete(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    tokens = ids(400)
    llama.set_attn_implementation("eager")
    expected = llama.generate(tokens, max_new_tokens=6, do_sample=False)
    options["chunk_tokens"] = 256
    with headinfer.attach(llama, **options) as run:
        failing(llama.model.layers[1].mlp, 2)
        with pytest.raises(
            GpuOutOfMemory, match=r"chunk of 256 tokens .*2\.00 GiB\); the cache"
        ) as e:
            llama.generate(tokens, max_new_tokens=6, do_sample=False)
        assert (e.value.complete_tokens, e.value.remedy_chunk_tokens) == (399, 128)
        found = llama.generate(
            tokens,
            max_new_tokens=6,
            do_sample=False,
            **cache_argument(llama, run.cache),
            prefill_chunk_size=e.value.remedy_chunk_tokens,
        )
    assert torch.equal(found, expected)


def test_out_of_memory_before_the_last_layer_goes_back_a_chunk(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    tokens = ids(400)
    llama.set_attn_implementation("eager")
    expected = llama.generate(tokens, max_new_tokens=6, do_sample=False)
    options["chunk_tokens"] = 200
    with headinfer.attach(llama, **options) as run:
        failing(llama.model.layers[0].mlp, 2)
        with pytest.raises(GpuOutOfMemory, match="complete up to token 200: go on with") as e:
            llama.generate(tokens, max_new_tokens=6, do_sample=False)
        found = llama.generate(
            tokens,
            max_new_tokens=6,
            do_sample=False,
            **cache_argument(llama, run.cache),
            prefill_chunk_size=e.value.remedy_chunk_tokens,
        )
        assert torch.equal(found, expected)
        cache = run.new_cache()
        failing(llama.model.layers[0].mlp, 3)
        with pytest.raises(GpuOutOfMemory) as e:
            headinfer.prefill(llama, tokens, cache, chunk_tokens=150)
        assert e.value.complete_tokens == cache.get_seq_length() == 300
        headinfer.prefill(llama, tokens[:, 300:], cache, chunk_tokens=e.value.remedy_chunk_tokens)
        assert cache.get_seq_length() == 400


def test_out_of_memory_where_the_cache_cannot_go_back_empties_it(build: Any, ids: Any) -> None:
    model = build("gemma2", sliding_window=40)
    tokens = ids(300)
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
    with headinfer.attach(model, chunk_tokens=128) as run:
        failing(model.model.layers[1].mlp, 2)
        with pytest.raises(GpuOutOfMemory, match=r"was emptied|complete up to"):
            model.generate(tokens, max_new_tokens=4, do_sample=False)
        failing(model.model.layers[0].mlp, 2)
        with pytest.raises(GpuOutOfMemory, match="its cache was emptied"):
            model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert run.cache is not None
        assert run.cache.get_seq_length() == 0
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), expected)

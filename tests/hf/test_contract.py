# SPDX-License-Identifier: Apache-2.0
"""The details of the seam that are easy to get wrong, one test each; silent errors, most of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headinfer
from headinfer.attention.masks import Causal
from headinfer.hf import cache as cache_module
from headinfer.hf.attention import NAME, headinfer_attention
from headinfer.hf.cache import HeadCache, HeadLayer, HybridHeadLayer
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.hf.handles import KVHandle, LazyMask
from headinfer.hf.masks import headinfer_mask
from headinfer.testing.zoo import ZOO, ModelAbsent

PROMPT = 150
STEPS = (100, 40, 1, 9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **more: Any) -> Tensor:
    """headinfer's attention called as a model does, [b, h, t, d]."""
    module = more.pop("module", SimpleNamespace(layer_idx=0, training=False))
    out, _ = headinfer_attention(module, query, key, value, mask, **more)
    return out.transpose(1, 2)


def stored(options: dict[str, Any], key: Tensor, value: Tensor, **more: Any) -> tuple[Any, ...]:
    """A cache that was given keys and values in two updates, and the handles of the second."""
    cache = HeadCache(**options, **more)
    cut = key.shape[2] * 2 // 3
    cache.update(key[:, :, :cut], value[:, :, :cut], 0)
    return cache, *cache.update(key[:, :, cut:], value[:, :, cut:], 0)


# 1. Offsets are numbers when the mask is made, not tensors that change later.


@pytest.mark.parametrize("padded", [False, True])
def test_offsets_are_frozen_when_the_mask_is_made(padded: bool, dense: Any) -> None:
    offset, length, start = torch.tensor(5), torch.tensor(8), torch.tensor(0)
    visible = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]) if padded else None
    mask = headinfer_mask(1, 3, length, q_offset=offset, kv_offset=start, attention_mask=visible)
    before = dense(mask.recipe, (0, 3), (0, 8))
    offset += 2
    length += 2
    start += 2
    assert mask.shape == (1, 1, 3, 8)
    assert torch.equal(dense(mask.recipe, (0, 3), (0, 8)), before)
    assert torch.equal(mask.make(), before)


# 2. The signs of crop.


@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize(
    ("count", "left"),
    [
        (-1, 149),
        (-30, 120),
        (-149, 1),
        (-500, 0),
        (0, 150),
        (130, 130),
        (128, 128),
        (1, 1),
        (400, 150),
    ],
)
def test_crop_removes_for_negative_and_keeps_for_positive_counts(
    count: int,
    left: int,
    tensor: bool,
    llama: Any,
    ids: Any,
    steps: Any,
    resident: Any,
    close: Any,
    head_cache: Any,
) -> None:
    tokens, more = ids(PROMPT), ids(20, seed=1)
    expected = resident(
        llama, torch.cat([tokens[:, :left], more], 1), (left, 19, 1) if left else (19, 1)
    )
    llama.set_attn_implementation(NAME)
    cache = head_cache(llama)
    steps(llama, tokens, STEPS, cache)
    cache.crop(torch.tensor(count) if tensor else count)
    assert cache.get_seq_length() == left
    close(steps(llama, more, (19, 1), cache), expected[:, left:])


# 3. A handle stands for the tokens it was made for.


def test_a_handle_keeps_its_length_when_more_tokens_come(
    options: dict[str, Any], close: Any
) -> None:
    key, value, query = (
        random(2, 2, 300, 16),
        random(2, 2, 300, 16, seed=1),
        random(2, 4, 3, 16, seed=2),
    )
    cache = HeadCache(**options)
    early = cache.update(key[:, :, :140], value[:, :, :140], 0)
    cache.update(key[:, :, 140:], value[:, :, 140:], 0)
    for length, pair in ((140, early), (300, (cache.layers[0].keys, cache.layers[0].values))):
        assert [handle.shape[2] for handle in pair] == [length] * 2
        found = attend(query, *pair, is_causal=False)
        cut = key[:, :, :length], value[:, :, :length]
        close(found, scaled_dot_product_attention(query, *cut, enable_gqa=True))


def test_a_handle_of_cropped_tokens_is_an_error(options: dict[str, Any]) -> None:
    cache, keys, values = stored(options, random(1, 2, 150, 16), random(1, 2, 150, 16))
    cache.crop(-20)
    with pytest.raises(headinfer.CacheStateError, match="holds 130 tokens, attention wants 150"):
        attend(random(1, 4, 1, 16), keys, values)
    cache.reset()
    with pytest.raises(headinfer.CacheStateError, match="reset"):
        attend(random(1, 4, 1, 16), keys, values)


# 4. Query heads per KV head come from shapes; keys and values may differ in width.


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_heads_per_group_come_from_shapes_not_from_the_module(
    family: str,
    build: Any,
    ids: Any,
    steps: Any,
    resident: Any,
    close: Any,
    options: dict[str, Any],
) -> None:
    llama = build(family)  # Mistral's windows are plain tensors
    expected = resident(llama, ids(), STEPS)
    for layer in llama.model.layers:
        layer.self_attn.num_key_value_groups = 7
    with headinfer.attach(llama, **options):
        close(steps(llama, ids(), STEPS), expected)


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (7, 1)])
@pytest.mark.parametrize("dims", [(24, 8), (8, 24), (80, 80)])
def test_widths_of_keys_and_values_may_differ(
    heads: tuple[int, int], dims: tuple[int, int], options: dict[str, Any], close: Any
) -> None:
    key, value = random(2, heads[1], 150, dims[0]), random(2, heads[1], 150, dims[1], seed=1)
    query = random(2, heads[0], 5, dims[0], seed=2)
    _, keys, values = stored(options, key, value)
    assert (keys.shape, values.shape) == (key.shape, value.shape)
    mask = headinfer_mask(2, 5, 150, q_offset=145)
    found = attend(query, keys, values, mask, scaling=0.3)
    expected = scaled_dot_product_attention(
        query, key, value, mask.make(), scale=0.3, enable_gqa=True
    )
    close(found, expected)


# 5. What is stored is no part of a graph.


def test_stored_keys_and_values_are_detached(options: dict[str, Any]) -> None:
    key = random(1, 2, 150, 16).requires_grad_()
    cache, keys, _ = stored(options, key * 2, key * 3)
    assert not keys.requires_grad
    layer = cache.layers[0]
    for values_too in (False, True):
        assert not layer.gather(150, values=values_too).requires_grad


def test_gradients_through_a_cache_are_refused_not_wrong(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    with headinfer.attach(llama, **options):
        out = llama(ids(), labels=ids())
        assert isinstance(cache_returned(out), HeadCache)
        with pytest.raises(headinfer.UnsupportedAttention, match="use_cache=False"):
            out.loss.backward()


def test_training_without_a_cache_has_the_stock_gradients(
    llama: Any, ids: Any, options: dict[str, Any], close: Any
) -> None:
    def gradients() -> list[Tensor]:
        llama.zero_grad()
        llama(ids(), labels=ids(), use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in llama.parameters()]

    expected = gradients()
    with headinfer.attach(llama, **options):
        for found, wanted in zip(gradients(), expected, strict=True):
            assert (found - wanted).abs().max() <= 1e-5 * max(float(wanted.abs().max()), 1e-3)


# 6. Rows that see nothing.


def test_rows_that_see_no_key_are_zero(options: dict[str, Any]) -> None:
    tokens = 150
    key, value, query = (random(2, 2, tokens, 16, seed=seed) for seed in (0, 1, 2))
    visible = torch.ones(2, tokens, dtype=torch.long)
    visible[0, :140] = 0
    _, keys, values = stored(options, key, value)
    found = attend(query, keys, values, headinfer_mask(2, tokens, tokens, attention_mask=visible))
    assert torch.isfinite(found).all()
    assert not found[0, :, :140].any()
    assert found[0, :, 140:].any()


# 7. Batch rows are renamed, not copied.

ROWS: dict[str, Callable[[Any], None]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "select_by_mask": lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])),
    "reorder_twice": lambda cache: [
        cache.reorder_cache(torch.tensor(rows)) for rows in ([1, 2, 0], [0, 0, 1])
    ],
    "repeat_then_select": lambda cache: [
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([5, 0, 3])),
    ],
}


@pytest.mark.parametrize("change", ROWS)
@pytest.mark.parametrize("tokens", [5, 128, 300, 1400])
def test_batch_rows_are_rearranged_like_the_stock_cache_does(
    change: str, tokens: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Any] = [HeadCache(**options), DynamicCache()]
    for cache in caches:
        for index in range(2):
            cache.update(random(3, 2, tokens, 16), random(3, 2, tokens, 8, seed=1), index)
    before = caches[0].stats()
    if tokens > 1024:
        with monkeypatch.context() as patch:
            patch.setattr("headinfer.heads.memory.SegmentMemory.allocate", no_allocation)
            ROWS[change](caches[0])
    else:
        ROWS[change](caches[0])
    ROWS[change](caches[1])
    assert caches[0].stats().written_bytes == before.written_bytes
    rows = caches[1].layers[0].keys.shape[0]
    more = random(rows, 2, 200, 16, seed=3), random(rows, 2, 200, 8, seed=4)
    for index in range(2):
        for length in (tokens, tokens + 200):
            head, stock = (cache.layers[index] for cache in caches)
            assert torch.equal(head.gather(length, values=False), stock.keys)
            assert torch.equal(head.gather(length, values=True), stock.values)
            if length == tokens:
                for cache in caches:
                    cache.update(*more, index)


def no_allocation(*args: Any) -> None:
    pytest.fail("rows were copied")


def test_rows_rearranged_are_attended(options: dict[str, Any], close: Any) -> None:
    key, value = random(3, 2, 300, 16), random(3, 2, 300, 16, seed=1)
    cache, _, _ = stored(options, key, value)
    rows = torch.tensor([2, 2, 1, 0])
    cache.reorder_cache(rows)
    query = random(4, 4, 1, 16, seed=2)
    found = attend(query, cache.layers[0].keys, cache.layers[0].values)
    close(found, scaled_dot_product_attention(query, key[rows], value[rows], enable_gqa=True))


@pytest.mark.parametrize(
    ("change", "rows"), [("reorder", [2, 2, 0]), ("repeat", [0, 0, 1, 1, 2, 2]), ("select", [2, 0])]
)
def test_hybrid_layers_rearrange_their_states_too(
    change: str, rows: list[int], options: dict[str, Any]
) -> None:
    if not hasattr(HeadCache, "get_conv_state"):
        pytest.skip("this transformers has no get_conv_state to compare with")
    cache = HeadCache(ZOO["falcon_h1"].build().config, **options)
    layer = cache.layers[0]
    assert isinstance(layer, HybridHeadLayer)
    key, value = random(3, 2, 40, 8), random(3, 2, 40, 8, seed=1)
    cache.update(key, value, 0)
    conv = cache.update_conv_state(random(3, 6, 4, seed=5), 0).clone()
    recurrent = cache.update_recurrent_state(random(3, 6, 4, seed=6), 0).clone()
    {
        "reorder": lambda: layer.reorder_cache(torch.tensor(rows)),
        "repeat": lambda: layer.batch_repeat_interleave(2),
        "select": lambda: layer.batch_select_indices(torch.tensor(rows)),
    }[change]()
    assert torch.equal(layer.gather(40, values=False), key[rows])
    assert torch.equal(layer.gather(40, values=True), value[rows])
    assert torch.equal(cache.get_conv_state(0), conv[rows])
    assert torch.equal(cache.get_recurrent_state(0), recurrent[rows])


# 8. Masks: none, and made by the user.


@pytest.mark.parametrize(
    ("rows", "flag", "kwarg", "causal"),
    [
        (5, None, None, True),
        (5, True, None, True),
        (5, False, None, False),
        (5, False, True, True),
        (5, True, False, False),
        (1, True, None, False),
        (1, True, True, False),
    ],
)
@pytest.mark.parametrize("plain", [False, True], ids=["cache", "plain"])
def test_no_mask_means_causal_from_the_first_key(
    rows: int,
    flag: bool | None,
    kwarg: bool | None,
    causal: bool,
    plain: bool,
    options: Any,
    close: Any,
) -> None:
    key, value, query = (
        random(1, 2, 150, 16),
        random(1, 2, 150, 16, seed=1),
        random(1, 2, rows, 16, seed=2),
    )
    module = nn.Module()
    if flag is not None:
        module.is_causal = flag
    keys, values = (key, value) if plain else stored(options, key, value)[1:]
    found = attend(query, keys, values, None, module=module, is_causal=kwarg)
    close(found, scaled_dot_product_attention(query, key, value, is_causal=causal))


@pytest.mark.parametrize("kind", ["bool", "additive", "per_head", "broadcast"])
def test_masks_made_by_the_user_are_taken_as_they_are(
    kind: str, llama: Any, ids: Any, close: Any, options: dict[str, Any]
) -> None:
    tokens, cut = ids(PROMPT, batch=2), 130
    heads = 4 if kind == "per_head" else 1
    visible = (random(1 if kind == "broadcast" else 2, heads, PROMPT, PROMPT, seed=7) > -0.5).tril()
    visible |= torch.eye(PROMPT, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = llama(tokens, attention_mask=additive.expand(2, -1, -1, -1)).logits
        mask = visible if kind == "bool" else additive
        with headinfer.attach(llama, **options):
            found = []
            cache = None
            for part in (slice(0, cut), slice(cut, PROMPT)):
                cache = HeadCache(llama.config, **options) if cache is None else cache
                out = llama(
                    tokens[:, part],
                    attention_mask=mask[:, :, part, : part.stop],
                    **cache_argument(llama, cache),
                )
                found.append(out.logits)
    close(torch.cat(found, 1), expected)


def test_masks_of_whole_numbers_are_refused(llama: Any, ids: Any, options: dict[str, Any]) -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=torch.long).tril()
    with (
        headinfer.attach(llama, **options),
        torch.no_grad(),
        pytest.raises(headinfer.UnsupportedAttention, match=r"int64.*bool"),
    ):
        llama(ids(20), attention_mask=mask)


# 9. The name transformers knows us by.


def test_the_registered_name_matches_none_of_transformers_patterns() -> None:
    assert NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert NAME in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    for pattern in ("sdpa", "flash", "flex_attention", "paged|", "/", "eager"):
        assert pattern not in NAME


def test_importing_the_cache_makes_the_name_known() -> None:
    import subprocess
    import sys

    code = (
        "from headinfer import HeadCache\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known\n"
        "assert 'headinfer' in known.valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# 10. torch.compile.


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_forward_gives_the_same_logits(
    build: Any, ids: Any, steps: Any, resident: Any, close: Any, staged: dict[str, Any]
) -> None:
    llama, tokens = build("llama", num_hidden_layers=1), ids(PROMPT, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    expected = resident(llama, tokens, (149, 1), mask=mask)
    with headinfer.attach(llama, **staged):
        llama.forward = torch.compile(llama.forward, backend="eager")
        try:
            found = steps(llama, tokens, (149, 1), mask=mask)
        finally:
            del llama.forward
            torch._dynamo.reset()
    shown = mask.bool()
    close(found[shown], expected[shown])


def test_what_runs_eagerly_is_marked_for_the_compiler() -> None:
    for function in (HeadLayer.update, headinfer_attention, headinfer_mask):
        assert getattr(function, "_torchdynamo_disable", False), function


# 11. What is asked for and cannot be given.


def test_attention_weights_are_refused(llama: Any, ids: Any, options: dict[str, Any]) -> None:
    with (
        headinfer.attach(llama, **options),
        torch.no_grad(),
        pytest.raises(headinfer.UnsupportedAttention, match="output_attentions"),
    ):
        llama(ids(20), output_attentions=True)


def test_attention_weights_are_refused_by_generate_too(
    llama: Any, ids: Any, options: dict[str, Any]
) -> None:
    with (
        headinfer.attach(llama, **options),
        pytest.raises(headinfer.UnsupportedAttention, match="output_attentions"),
    ):
        llama.generate(
            ids(20),
            attention_mask=torch.ones(1, 20),
            output_attentions=True,
            return_dict_in_generate=True,
            max_new_tokens=2,
        )


def test_dropout_over_a_cache_is_refused(build: Any, ids: Any, options: dict[str, Any]) -> None:
    model = build("llama", attention_dropout=0.1)
    with headinfer.attach(model, **options), torch.no_grad():
        model(ids(20))
        model.train()
        cache = HeadCache(model.config, **options)
        with pytest.raises(headinfer.UnsupportedAttention, match=r"dropout 0\.1.*eval"):
            model(ids(20), **cache_argument(model, cache))


# 12. Consumers of another layer's keys and values.


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values_read_them_later(
    name: str, ids: Any, steps: Any, resident: Any, close: Any, options: dict[str, Any]
) -> None:
    try:
        model = ZOO[name].build()
    except ModelAbsent as absent:
        pytest.skip(str(absent))
    tokens = ids(PROMPT) % model.config.vocab_size
    expected = resident(model, tokens, STEPS)
    with headinfer.attach(model, **options) as run:
        found = steps(model, tokens, STEPS)
        assert run.head_layers
    close(found, expected)


def test_fresh_keys_are_read_until_the_layer_is_updated_again(
    options: dict[str, Any], close: Any
) -> None:
    cache = HeadCache(**options)
    key, value, query = (
        random(1, 2, 190, 16),
        random(1, 2, 190, 16, seed=1),
        random(1, 2, 1, 16, seed=2),
    )
    for start, stop in ((0, 140), (140, 190)):
        handles = cache.update(key[:, :, start:stop], value[:, :, start:stop], 0)
        expected = scaled_dot_product_attention(query, key[:, :, :stop], value[:, :, :stop])
        close(attend(query, *handles), expected)
        cache.update(key, value, 1)
        attend(query, cache.layers[1].keys, cache.layers[1].values)
        close(attend(query, *handles), expected)


# 13. Registries of transformers.


def test_stock_layer_classes_stay_in_transformers_registry() -> None:
    kinds = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", None)
    if kinds is None:
        pytest.skip("this transformers has no registry of layer classes")
    for layer in (HeadLayer, HybridHeadLayer):
        assert layer._layer_type is None
    for kind in kinds.values():
        assert not kind.__module__.startswith("headinfer")
    assert kinds["full_attention"] is DynamicLayer


def test_handles_and_masks_hold_no_memory() -> None:
    _, keys, values = stored({}, random(1, 2, 50, 16), random(1, 2, 50, 16))
    mask = headinfer_mask(1, 50, 50)
    assert isinstance(keys, KVHandle)
    assert isinstance(mask, LazyMask)
    assert isinstance(mask.recipe, Causal)
    for tensor in (keys, values, mask):
        assert tensor.untyped_storage().nbytes() == 0 or tensor.data_ptr() == 0
    assert cache_module.HeadLayer is HeadLayer

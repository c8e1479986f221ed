# SPDX-License-Identifier: Apache-2.0
"""Sliding windows without masks: what is recognised as one, and that its blocks mean the same.

Only devices with a fused kernel get such blocks; here every device is said to be one, so that the
reference attends them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils as stock

import headinfer
from headinfer.attention.api import attend
from headinfer.attention.masks import Biased, Sliding
from headinfer.attention.types import Window
from headinfer.hf import attention
from headinfer.hf.masks import FunctionRecipe, headinfer_mask
from headinfer.testing.numerics import check, eager, oracle


@pytest.fixture(autouse=True)
def every_device_fuses_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headinfer.hf.masks.fuses_windows", lambda device: True)


def sliding(size: int, *, q: int = 7, kv: int = 20, **more: Any) -> Any:
    function = stock.sliding_window_causal_mask_function(size)
    arguments = {"q_offset": kv - q, "mask_function": function, "local_size": size, **more}
    with torch.no_grad():
        return headinfer_mask(1, q, kv, **arguments).recipe


def test_only_exactly_a_window_is_taken_for_one() -> None:
    assert isinstance(sliding(5), Sliding)
    window = stock.sliding_window_causal_mask_function(5)
    ids = torch.zeros(1, 20, dtype=torch.long)
    for function in (
        stock.sliding_window_causal_mask_function(6),
        stock.chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long)),
        stock.and_masks(window, stock.packed_sequence_mask_function(ids)),
        stock.or_masks(window, lambda b, h, q, k: k < 2),
        stock.and_masks(stock.causal_mask_function, stock.sliding_window_overlay(5)),
        stock.sliding_window_bidirectional_mask_function(5),
        lambda b, h, q, k: (k > q - 5) & (k <= q),
    ):
        assert isinstance(sliding(5, mask_function=function), FunctionRecipe)
    assert isinstance(sliding(5, local_size=None), FunctionRecipe)
    assert isinstance(sliding(5, use_vmap=True), FunctionRecipe)


def test_where_gradients_are_recorded_blocks_keep_their_masks() -> None:
    function = stock.sliding_window_causal_mask_function(5)
    with torch.enable_grad():
        mask = headinfer_mask(1, 7, 20, q_offset=13, mask_function=function, local_size=5)
    assert isinstance(mask.recipe, FunctionRecipe)


def test_a_device_without_a_fused_kernel_gets_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert isinstance(sliding(5, device="cpu"), FunctionRecipe)


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 40),
    rows=st.integers(1, 24),
    past=st.integers(0, 30),
    kept=st.integers(0, 30),
    cut=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    row_cut=st.tuples(st.integers(0, 24), st.integers(0, 24)),
    padded=st.booleans(),
    seed=st.integers(0, 9),
)
def test_blocks_add_up_to_the_mask_of_transformers(
    size: int,
    rows: int,
    past: int,
    kept: int,
    cut: tuple[int, int],
    row_cut: tuple[int, int],
    padded: bool,
    seed: int,
    dense: Callable[..., Tensor],
) -> None:
    start = min(kept, past)
    length = past + rows
    visible = None
    if padded:
        generator = torch.Generator().manual_seed(seed)
        visible = torch.rand((2, length), generator=generator) < 0.6
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": rows,
        "kv_length": length - start,
        "q_offset": past,
        "kv_offset": start,
        "mask_function": stock.sliding_window_causal_mask_function(size),
        "attention_mask": visible,
        "device": "cpu",
    }
    expected = stock.sdpa_mask(
        **arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    with torch.no_grad():
        recipe = headinfer_mask(**arguments, local_size=size).recipe
    assert isinstance(recipe, Sliding)
    keys = tuple(sorted(min(edge, length - start) for edge in cut))
    some = tuple(sorted(min(edge, rows) for edge in row_cut))
    for part in (((0, rows), (0, length - start)), (some, keys)):
        found = dense(recipe, *part, batch=2)
        assert torch.equal(found, expected[:, :, slice(*part[0]), slice(*part[1])])


def test_a_window_costs_one_block_however_long_the_prompt() -> None:
    (block,) = Sliding(4096, 4096).blocks((0, 8192), (0, 12288))
    assert block == ((0, 8192), (1, 12288), False, None, Window(4095, 4096))
    assert list(Sliding(4096, 4096).blocks((4096, 8192), (0, 2000))) == []
    narrow = Sliding(0, 9000).blocks((0, 8192), (0, 8192))
    assert [(b.causal, b.window) for b in narrow] == [(True, None)]
    (one,) = Sliding(5000, 100).blocks((0, 1), (0, 5001))
    assert one == ((0, 1), (4901, 5001), False, None, None)


def test_a_position_bias_keeps_the_window() -> None:
    bias = torch.randn(1, 2, 6, 9)
    (block,) = Biased(Sliding(3, 4), bias).blocks((0, 6), (0, 9))
    assert block.window == Window(3, 4)
    assert torch.equal(block.bias, bias[..., slice(*block.keys)])


@pytest.mark.parametrize("offset", [-9, 0, 3, 40, 90])
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_attends_windows(
    offset: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headinfer.attention.reference.SCORE_ELEMENTS", 500)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((2, h, n, 8), generator=generator) for h, n in ((4, 30), (2, 50), (2, 50))
    )
    bias = torch.rand((2, 1, 1, 50), generator=generator) < 0.7 if biased else None
    for size in (1, 7, 100):
        window = Window(offset, size)
        seen = window.visible(torch.arange(30)[:, None], torch.arange(50))[None, None]
        mask = seen if bias is None else seen & bias
        found = attend(q, k, v, scale=0.3, window=window, bias=bias, softcap=4.0)
        how: dict[str, Any] = {"scale": 0.3, "bias": mask, "softcap": 4.0}
        exact, same = oracle(q, k, v, **how), eager(q, k, v, **how)
        check(found.out, same.out, exact.out)
        check(found.lse, same.lse, exact.lse)


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 24, "query_pre_attn_scalar": 16},
    "gpt_oss": {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("padded", [False, True])
def test_models_with_windows_give_the_resident_logits(
    family: str,
    padded: bool,
    build: Any,
    ids: Any,
    steps: Any,
    resident: Any,
    close: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[Any] = []
    whole = attention.attend_in_memory

    def counted(query: Any, k: Tensor, v: Tensor) -> Tensor:
        used.append(query.recipe)
        return whole(query, k, v)

    monkeypatch.setattr(attention, "attend_in_memory", counted)
    model, tokens = build(family, **WINDOWED[family]), ids(80, batch=2)
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
    sizes = (30, 47, 1, 1, 1)
    expected = resident(model, tokens, sizes, mask=mask)
    with headinfer.attach(model, chunk_tokens=64):
        found = steps(model, tokens, sizes, mask=mask)
    if padded:
        found, expected = found[:, 5:], expected[:, 5:]
    close(found, expected)
    assert any(isinstance(recipe, Sliding) for recipe in used)


def test_a_window_that_hides_nothing_stays_with_torch(build: Any, ids: Any, steps: Any) -> None:
    query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    function = stock.sliding_window_causal_mask_function(50)
    with torch.no_grad():
        mask = headinfer_mask(1, 9, 9, mask_function=function, local_size=50)
    assert attention._plain_mask(mask, query, key, None) == (None, True)
    assert [b.causal for b in mask.recipe.blocks((0, 9), (0, 9))] == [True]

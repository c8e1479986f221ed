# SPDX-License-Identifier: Apache-2.0
"""The blocks of a recipe add up to the mask they stand for, however rows and keys are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils as stock

from headinfer.attention.masks import (
    Biased,
    Block,
    Causal,
    Everything,
    Given,
    PaddedCausal,
    Padding,
    Rows,
)
from headinfer.hf import masks
from headinfer.hf.masks import FunctionRecipe, headinfer_mask

Dense = Callable[..., Tensor]
few = settings(max_examples=60, deadline=None)


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """[0, length) in pieces, empty ones among them."""
    inner = draw(st.lists(st.integers(0, length), max_size=4))
    edges = [0, *sorted(inner), length]
    return list(pairwise(edges))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Lengths of an attention call, cuts of its rows and keys, padding, a bound on biases."""
    rows = draw(st.integers(1, 24))
    past = draw(st.integers(0, 30))
    batch = draw(st.integers(1, 3))
    length = past + rows
    padding = draw(
        st.one_of(
            st.none(),
            st.lists(
                st.lists(st.booleans(), min_size=length, max_size=length),
                min_size=batch,
                max_size=batch,
            ),
        )
    )
    return {
        "rows": rows,
        "past": past,
        "length": length,
        "batch": batch,
        "visible": None if padding is None else torch.tensor(padding),
        "row_cuts": draw(cuts(rows)),
        "key_cuts": draw(cuts(length)),
        "most": draw(st.sampled_from([batch, 7, 40, 2**22])),
    }


@contextmanager
def mask_elements(most: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headinfer.attention.masks.MASK_ELEMENTS", most)
        patch.setattr("headinfer.hf.masks.MASK_ELEMENTS", most)
        yield


def assert_adds_up(dense: Dense, recipe: Any, call: dict[str, Any], expected: Tensor) -> None:
    """Every piece of the call shows that piece of `expected` [b, h, rows, length]."""
    batch, heads = expected.shape[:2]
    with mask_elements(call["most"]):
        for rows in call["row_cuts"]:
            for keys in call["key_cuts"]:
                found = dense(
                    recipe, rows, keys, batch=batch, heads=heads, most=max(call["most"], batch)
                )
                assert torch.equal(found, expected[:, :, slice(*rows), slice(*keys)])


def causal(call: dict[str, Any]) -> Tensor:
    rows = torch.arange(call["rows"])[:, None] + call["past"]
    return (torch.arange(call["length"]) <= rows)[None, None].expand(call["batch"], -1, -1, -1)


@few
@given(call=calls())
def test_causal(call: dict[str, Any], dense: Dense) -> None:
    assert_adds_up(dense, Causal(call["past"]), call, causal(call))


@few
@given(call=calls())
def test_everything(call: dict[str, Any], dense: Dense) -> None:
    assert_adds_up(dense, Everything(), call, torch.ones_like(causal(call)))


@few
@given(call=calls(), missing=st.integers(0, 5))
def test_causal_with_padding(call: dict[str, Any], missing: int, dense: Dense) -> None:
    visible = call["visible"]
    if visible is None:
        visible = torch.ones(call["batch"], call["length"], dtype=torch.bool)
    given_columns = max(call["length"] - missing, 1)
    padding = Padding(visible[:, :given_columns], call["length"])
    whole = visible.clone()
    whole[:, given_columns:] = False  # a mask shorter than the keys hides the rest
    assert torch.equal(padding.visible, whole)
    assert padding.hides == (not whole.all())
    start, stop = padding.hull
    assert whole[:, :start].all()
    assert whole[:, stop:].all()
    expected = causal(call) & whole[:, None, None]
    assert_adds_up(dense, PaddedCausal(call["past"], padding), call, expected)


@few
@given(call=calls(), heads=st.sampled_from([1, 3]), kind=st.sampled_from(["bool", "float"]))
def test_masks_made_in_full(call: dict[str, Any], heads: int, kind: str, dense: Dense) -> None:
    shape = (call["batch"], heads, call["rows"], call["length"])
    expected = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    mask = expected if kind == "bool" else torch.zeros(shape).masked_fill(~expected, -torch.inf)
    assert_adds_up(dense, Given(mask), {**call, "most": 2**22}, expected)
    shorter = Given(mask[..., : call["length"] - 1])
    expected = expected.clone()
    expected[..., -1] = False
    assert_adds_up(dense, shorter, {**call, "most": 2**22}, expected)


@few
@given(call=calls(), start=st.integers(0, 23))
def test_rows_of_another_recipe(call: dict[str, Any], start: int, dense: Dense) -> None:
    start = min(start, call["rows"] - 1)
    expected = causal(call)[:, :, start:]
    rest = call["rows"] - start
    pieces = [(min(a, rest), min(b, rest)) for a, b in call["row_cuts"]]
    call = {**call, "row_cuts": pieces}
    assert_adds_up(dense, Rows(Causal(call["past"]), start), call, expected)


@few
@given(call=calls(), rows_differ=st.booleans())
def test_a_position_bias_is_added_where_something_is_seen(
    call: dict[str, Any], rows_differ: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, call["rows"] if rows_differ else 1, call["length"])
    bias = torch.randn(shape, generator=generator)
    inner: Any = Causal(call["past"])
    expected = causal(call)
    if call["visible"] is not None:
        inner = PaddedCausal(call["past"], Padding(call["visible"], call["length"]))
        expected = expected & call["visible"][:, None, None]
    shape = (call["batch"], 2, call["rows"], call["length"])
    wanted = bias.expand(shape).masked_fill(~expected, -torch.inf)
    found = torch.full(shape, -torch.inf)
    with mask_elements(call["most"]):
        for keys in call["key_cuts"]:
            for block in Biased(inner, bias).blocks((0, call["rows"]), keys):
                assert not block.causal
                found[:, :, slice(*block.rows), slice(*block.keys)] = block.bias
    assert torch.equal(found, wanted)


def test_a_position_bias_is_added_to_an_additive_mask() -> None:
    mask, bias = torch.randn(1, 1, 3, 5), torch.randn(1, 2, 3, 5)
    (block,) = Biased(Given(mask), bias).blocks((1, 3), (0, 4))
    assert block == Block((1, 3), (0, 4), bias=block.bias)
    assert torch.equal(block.bias, (mask + bias)[:, :, 1:3, :4])


# Patterns of transformers, against its own function for the whole mask.


def patterns(call: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(call["length"])
    parts = torch.randint(0, 3, (call["batch"], call["length"]), generator=generator)
    left = torch.randint(0, 4, (call["batch"],), generator=generator)
    found = {
        "causal": stock.causal_mask_function,
        "bidirectional": stock.bidirectional_mask_function,
        "sliding": stock.sliding_window_causal_mask_function(5),
        "chunked": stock.chunked_causal_mask_function(6, left),
        "packed": stock.and_masks(
            stock.causal_mask_function,
            stock.packed_sequence_mask_function(parts.sort(dim=1).values),
        ),
        "custom": lambda b, h, q, k: (q - k) % 3 != 1,
    }
    if hasattr(stock, "blockwise_overlay"):  # not in every transformers
        blocks = stock.blockwise_overlay(parts - 1)
        found["image_blocks"] = stock.or_masks(stock.causal_mask_function, blocks)
    return found


every_pattern = pytest.mark.parametrize("pattern", sorted(patterns({"length": 3, "batch": 1})))


@every_pattern
@settings(max_examples=15, deadline=None)
@given(call=calls(), kept=st.integers(0, 8))
def test_patterns_of_transformers(
    pattern: str, call: dict[str, Any], kept: int, dense: Dense
) -> None:
    check_pattern(pattern, call, kept, dense, vmap=False)


@every_pattern
@settings(max_examples=3, deadline=None)
@given(call=calls(), kept=st.integers(0, 8))
def test_patterns_of_transformers_under_vmap(
    pattern: str, call: dict[str, Any], kept: int, dense: Dense
) -> None:
    check_pattern(pattern, call, kept, dense, vmap=True)


def check_pattern(
    pattern: str, call: dict[str, Any], kept: int, dense: Dense, *, vmap: bool
) -> None:
    start = min(kept, call["past"])  # a window's cache no longer holds the first keys
    visible = call["visible"]
    arguments: dict[str, Any] = {
        "batch_size": call["batch"],
        "q_length": call["rows"],
        "q_offset": call["past"],
        "kv_length": call["length"] - start,
        "kv_offset": start,
        "mask_function": patterns(call)[pattern],
        "attention_mask": visible,
        "use_vmap": vmap,
        "device": "cpu",
    }
    call = {
        **call,
        "key_cuts": [(a, b) for a, b in call["key_cuts"] if b <= call["length"] - start],
    }
    expected = stock.sdpa_mask(
        **arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    mask = headinfer_mask(**arguments)
    assert mask is not None
    assert mask.shape == (call["batch"], 1, call["rows"], call["length"] - start)
    assert torch.equal(mask.make(), expected)
    if pattern != "causal" and (pattern != "bidirectional" or vmap):
        assert isinstance(mask.recipe, FunctionRecipe)
    assert_adds_up(dense, mask.recipe, call, expected)
    rows = mask[:, :, 1:] if call["rows"] > 1 else mask
    assert torch.equal(rows.make(), expected[:, :, -rows.shape[2] :])


def test_only_an_unpadded_bidirectional_mask_is_left_out() -> None:
    both: dict[str, Any] = {
        "mask_function": stock.bidirectional_mask_function,
        "allow_is_bidirectional_skip": True,
    }
    ones = torch.ones(2, 9, dtype=torch.long)
    hidden = ones.clone()
    hidden[0, 0] = 0
    assert headinfer_mask(2, 9, 9, **both) is None
    assert headinfer_mask(2, 9, 9, attention_mask=ones, **both) is None
    assert headinfer_mask(2, 9, 9, attention_mask=hidden, **both) is not None
    assert headinfer_mask(2, 9, 9, local_size=4, **both) is not None
    assert headinfer_mask(2, 9, 9, local_size=20, **both) is None
    assert headinfer_mask(2, 9, 9) is not None


def test_a_padding_mask_that_hides_nothing_costs_nothing() -> None:
    mask = headinfer_mask(2, 5, 9, q_offset=4, attention_mask=torch.ones(2, 9, dtype=torch.long))
    assert isinstance(mask.recipe, Causal)
    only_past = torch.zeros(2, 20, dtype=torch.long)
    only_past[:, 11:] = 1
    mask = headinfer_mask(2, 5, 9, q_offset=15, kv_offset=11, attention_mask=only_past)
    assert isinstance(mask.recipe, Causal)


def test_blocks_are_evaluated_once_for_all_layers_and_forgotten_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluated: list[int] = []

    def pattern(b: Any, h: Any, q: Any, k: Any) -> Any:
        evaluated.append(1)
        return (q - k) % 3 != 1

    mask = headinfer_mask(1, 32, 64, q_offset=32, mask_function=pattern)
    with mask_elements(128):
        first = list(mask.recipe.blocks((0, 32), (0, 64)))
        count = len(evaluated)
        assert len(first) == count >= 32 * 64 // 128
        again = list(mask.recipe.blocks((0, 32), (0, 64)))
        assert len(evaluated) == count
        assert [block.keys for block in again] == [block.keys for block in first]
        monkeypatch.setattr(masks, "CACHED_BYTES", 512)
        list(mask.recipe.blocks((0, 32), (1, 64)))
        assert mask.recipe._cached_bytes <= 512
        assert len(mask.recipe._cache) <= 5


def test_blocks_nobody_sees_are_left_out_and_full_ones_carry_no_bias() -> None:
    window = stock.sliding_window_causal_mask_function(8)
    mask = headinfer_mask(1, 64, 128, q_offset=64, mask_function=window)
    with mask_elements(16):
        blocks = list(mask.recipe.blocks((0, 64), (0, 128)))
    assert min(block.keys[1] for block in blocks) > 56
    assert any(block.bias is None for block in blocks)
    assert len(blocks) < 64 * 128 // 16 / 4

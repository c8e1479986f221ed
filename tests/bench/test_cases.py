# SPDX-License-Identifier: Apache-2.0
"""Choosing by name, lengths as people write them, and shapes that count what their models hold."""

from __future__ import annotations

import pytest

from headinfer.bench.cases import (
    CASES,
    CONTESTANTS,
    CPU_DEFAULT,
    KNOWN,
    Mode,
    chosen_cases,
    format_tokens,
    narrowed,
    parse_contexts,
)
from headinfer.bench.models import build, config_of
from headinfer.bench.must_hold import BOUNDS
from headinfer.bench.plots import STYLES
from headinfer.bench.shapes import SHAPES
from headinfer.errors import InputError


def test_a_case_names_a_shape_and_contestants_that_exist() -> None:
    for name, case in CASES.items():
        assert case.name == name
        assert not case.shape or case.shape in SHAPES
        assert set(case.contestants) <= set(KNOWN)
        alone = (Mode.RATES, Mode.PINNING, Mode.KERNELS, Mode.PACKED)
        assert bool(case.contestants) == (case.mode not in alone)
        assert str(case)
    assert set(STYLES) == set(CONTESTANTS)
    assert len({bound.what for bound in BOUNDS}) == len(BOUNDS)


def test_the_default_is_what_the_machine_can_run() -> None:
    assert [case.name for case in chosen_cases([], devices=["cpu"])] == list(CPU_DEFAULT)
    on_gpu = [case.name for case in chosen_cases([], devices=["cuda", "cpu"])]
    assert {"rates", "pinning", "prefill-8b", "decode-8b", "smollm2-cpu"} <= set(on_gpu)
    assert not [name for name in on_gpu if "tiny" in name]


def test_cases_are_chosen_by_pattern_in_the_order_of_the_registry() -> None:
    found = chosen_cases(["decode-*", "rates"], devices=["cpu"])
    assert [case.name for case in found] == ["rates", "decode-1b-cpu", "decode-tiny"]


@pytest.mark.parametrize(
    ("patterns", "says"),
    [(["nope"], "known: rates, pinning"), (["prefill-8b"], "needs a cuda device")],
)
def test_what_cannot_be_chosen_is_refused_with_what_can(patterns: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        chosen_cases(patterns, devices=["cpu"])


def test_contestants_and_lengths_narrow_a_case() -> None:
    case = narrowed(CASES["decode-8b"], contestants=["*resident"], contexts=[4096])
    assert case.contestants == ("resident", "all-resident")
    assert case.contexts == (4096,)
    assert narrowed(CASES["rates"], contestants=[], contexts=[4096]).contexts == (0,)
    with pytest.raises(InputError, match="known: resident, offloaded"):
        narrowed(CASES["decode-8b"], contestants=["nobody"], contexts=[])


@pytest.mark.parametrize(
    ("text", "tokens"), [("32K,128k", (32768, 131072)), ("1M", (2**20,)), ("9000", (9000,))]
)
def test_lengths_are_read_and_written(text: str, tokens: tuple[int, ...]) -> None:
    assert parse_contexts(text) == tokens
    assert parse_contexts(",".join(format_tokens(n).replace(",", "") for n in tokens)) == tokens


@pytest.mark.parametrize("text", ["", "K", "32Q", "0", "-4", "1.5K", "8K,"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a length"):
        parse_contexts(text)


@pytest.mark.parametrize("name", ["tiny", "tiny, odd"])
def test_a_shape_counts_what_its_model_holds(name: str) -> None:
    shape = SHAPES[name]
    model = build(shape, "float32", "cpu")
    norms = (2 * shape.layers + 1) * shape.hidden
    embedding = 0 if shape.tied else shape.vocab * shape.hidden
    counted = shape.weight_bytes("float32") // 4 + norms + embedding
    assert counted == sum(weight.numel() for weight in model.parameters())


def test_the_8b_shape_is_that_of_the_bounds() -> None:
    shape = SHAPES["Llama-3-8B"]
    assert shape.kv_bytes(1, "bfloat16") == 128 * 1024
    assert shape.weight_bytes("bfloat16") == pytest.approx(15e9, rel=0.01)
    assert config_of(shape, "bfloat16").num_key_value_heads == 8


def test_flops_of_attention_add_up_over_chunks() -> None:
    shape = SHAPES["tiny"]
    parts = sum(shape.attention_flops(10, past=past) for past in range(0, 100, 10))
    assert parts == shape.attention_flops(100)

# SPDX-License-Identifier: Apache-2.0
"""Sizes as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.budget import GIB, MIB, MemoryBudget, format_bytes, parse_bytes
from headinfer.errors import HeadInferError, InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("24g", 24 * GIB),
        ("1.5GiB", GIB + GIB // 2),
        (".5m", MIB // 2),
        ("2GB", 2 * 10**9),
        ("100", 100),
        ("100B", 100),
        (123, 123),
        (0, 0),
    ],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["banana", "", "GiB", "1 2", "-1GiB", "1e9", "24GiBs", -1, True])
def test_other_text_is_refused_with_an_example(text):
    with pytest.raises(InputError, match=r"gpu_memory=.*(24GiB|0 bytes or more)") as caught:
        parse_bytes(text, name="gpu_memory")
    assert isinstance(caught.value, (HeadInferError, ValueError))
    assert "\n" not in str(caught.value)


@given(st.integers(0, 2**60))
def test_whole_bytes_survive(count):
    assert parse_bytes(count) == count
    assert parse_bytes(str(count)) == pytest.approx(count, rel=1e-12)


@given(st.integers(1, 2**50))
def test_what_is_printed_reads_back_within_its_digits(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=5e-3, abs=1)


def test_a_budget_keeps_what_was_not_given_open():
    budget = MemoryBudget.parse("24GiB", None)
    assert budget == MemoryBudget(gpu_bytes=24 * GIB, host_bytes=None)

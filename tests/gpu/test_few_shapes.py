# SPDX-License-Identifier: Apache-2.0
"""cuDNN over a long prompt: heads in calls of their own, keys in spans of a power of two chunks."""

from __future__ import annotations

import pytest
import torch

from headinfer.attention import sdpa
from headinfer.attention.masks import Causal
from headinfer.layer import RunnerSettings
from headinfer.runner import Runner
from headinfer.testing.numerics import check, eager, oracle
from headinfer.totals import Query

CHUNK, CHUNKS, HEADS, PER_KV, DIM = 2048, 4, 2, 8, 128


@pytest.mark.gpu
@pytest.mark.parametrize("residents", [HEADS, 1, 0])
def test_a_long_prompt_obeys_the_rule_and_builds_few_plans(residents, monkeypatch):
    seen = set()
    one_stride = sdpa.of_one_stride

    def spy(x):
        found = one_stride(x)
        seen.add((tuple(found.shape), found.stride()))
        return found

    monkeypatch.setattr(sdpa, "of_one_stride", spy)
    monkeypatch.setattr("headinfer.totals.fills_alone", lambda *_: True)
    runner = Runner(
        RunnerSettings(
            staging=True,
            slot_bytes=4 * 2**20,
            num_slots=3,
            write_bytes=2**20,
            resident_heads=(residents,),
            expected_tokens=CHUNK * CHUNKS,
            poison=True,
        )
    )
    random = torch.Generator("cuda").manual_seed(0)

    def normal(heads):
        shape = (1, CHUNK, heads, DIM)
        x = torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2)

    keys, values = [], []
    for chunk in range(CHUNKS):
        k, v, q = normal(HEADS), normal(HEADS), normal(HEADS * PER_KV)
        keys.append(k)
        values.append(v)
        length = runner.append(0, k, v)
        out = runner.attend(0, length, Query(q, DIM**-0.5, Causal(chunk * CHUNK), DIM))
        rows = slice(-64, None)
        whole = torch.cat(keys, 2), torch.cat(values, 2)
        mask = torch.arange(length, device="cuda") <= torch.arange(
            length - 64, length, device="cuda"
        ).unsqueeze(1)
        how = {"scale": DIM**-0.5, "bias": mask[None, None]}
        found = out.transpose(1, 2)[:, :, rows]
        expected = eager(q[:, :, rows], *whole, **how).out, oracle(q[:, :, rows], *whole, **how).out
        check(found, *expected)
    runner.close()
    # Squares of all heads and of one, and spans of one and two chunks; keys and values share them.
    assert len(seen) <= 5

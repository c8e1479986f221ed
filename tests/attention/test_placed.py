# SPDX-License-Identifier: Apache-2.0
"""Attention over keys whose place and number the device knows: on a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from headinfer.attention import placed
from headinfer.attention.placed import Kind, PlaceTable, place_of
from headinfer.attention.types import Window
from headinfer.testing.interpreter import INTERPRETED, interpreter, run_interpreted
from headinfer.testing.numerics import check, eager, oracle

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def runs(test):
    """On a GPU, or in the interpreter's process."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter():
    with interpreter() if INTERPRETED else nullcontext():
        yield


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's process compiles nothing")
def test_the_kernels_obey_the_rule_in_the_interpreter():
    run_interpreted(__file__)


class Case:
    """Keys [h, b, room, d] with `past` tokens and `rows` new ones, poison in the room behind them."""

    def __init__(self, dtype, *, b=1, h=2, g=2, past=37, rows=1, d=64, e=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.past, self.rows = past, rows

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        room = past + rows + 19
        self.k, self.v = normal(h, b, room, d), normal(h, b, room, e or d)
        for stored in (self.k, self.v):
            stored[:, :, past:] = torch.nan
        self.new = normal(b, rows, h, d).transpose(1, 2), normal(b, rows, h, e or d).transpose(1, 2)
        self.q = normal(b, rows, h * g, d).transpose(1, 2)

    def run(self, table=None, **how):
        how.setdefault("scale", self.q.shape[-1] ** -0.5)
        table = table or PlaceTable(torch.device(DEVICE))
        row = table.row(3, place_of(self.k, self.v))
        table.length.fill_(self.past)
        placed.store(*self.new, row, table.length)
        batch, heads, rows, _ = self.q.shape
        out = self.q.new_full((batch, rows, heads, self.v.shape[-1]), torch.nan)
        placed.attend(self.q, row, table.length, out, kv_heads=self.k.shape[0], **how)
        return out.transpose(1, 2)

    def check(self, **how):
        found = self.run(**how)
        stop = self.past + self.rows
        k, v = (x[:, :, :stop].transpose(0, 1) for x in (self.k, self.v))
        for stored, given in zip((k, v), self.new, strict=True):
            assert torch.equal(stored[:, :, self.past :], given)
        index = torch.arange(self.rows, device=DEVICE)[:, None], torch.arange(stop, device=DEVICE)
        seen = Window(self.past, 2 * stop).visible(*index)[None, None]
        how.setdefault("scale", self.q.shape[-1] ** -0.5)
        check(found, eager(self.q, k, v, bias=seen, **how).out,
              oracle(self.q, k, v, bias=seen, **how).out)  # fmt: skip


@runs
@every_type
@pytest.mark.parametrize("dim", [20, 64, 80, 128, 256])
def test_every_head_dim(dtype, dim):
    Case(dtype, d=dim, b=2, h=4).check()  # some thousand outputs: of few, one side may be lucky


@runs
@every_type
def test_widths_softcap_and_a_batch(dtype):
    Case(dtype, d=96, e=64, h=3, g=1).check()
    Case(dtype, d=64, b=3).check(softcap=3.0)


@runs
@every_type
@pytest.mark.parametrize("past", [0, 1, 255, 256, 700, 2600])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_every_number_of_keys_and_new_tokens(dtype, past, rows):
    """Around the shortest split, and as many as there are splits."""
    Case(dtype, past=past, rows=rows, d=32, h=1, g=4).check()


@runs
def test_one_table_follows_a_context_that_grows_and_one_that_lies_elsewhere():
    """The tensors that a recorded call was given stay the same, what they hold does not."""
    table = PlaceTable(torch.device(DEVICE))
    one, other = Case(torch.float16, past=300), Case(torch.float16, past=90, seed=1)
    row = table.row(3, place_of(one.k, one.v))
    for case in (one, other, one):
        assert torch.equal(case.run(table), case.run())
        assert table.row(3, place_of(case.k, case.v)) is row


@runs
def test_nothing_behind_the_new_tokens_is_touched():
    case = Case(torch.float16, past=12, rows=3)
    case.run()
    assert torch.isnan(case.k[:, :, 15:]).all()
    assert torch.isnan(case.v[:, :, 15:]).all()


@pytest.mark.gpu
def test_kernels_are_compiled_on_a_thread_and_the_answer_changes_when_they_are():
    from headinfer.attention.compiling import finish_compiling, nothing_ahead

    kind = Kind(torch.bfloat16, 72, 72, 3, 1, False)
    device = torch.device("cuda", 0)
    with nothing_ahead():
        assert not placed.ready(kind, device)
    placed.ready(kind, device)
    finish_compiling()
    assert placed.ready(kind, device)
    assert not placed.ready(kind._replace(rows=placed.MOST_ROWS + 1), device)
    assert not placed.ready(kind._replace(dtype=torch.float32), device)
    assert not placed.ready(kind, torch.device("cpu"))


@pytest.mark.gpu
def test_recorded_calls_go_on_while_the_context_grows():
    table, case = PlaceTable(torch.device(DEVICE)), Case(torch.bfloat16, past=1000, d=128, h=8, g=4)
    row = table.row(0, place_of(case.k, case.v))
    out = case.q.new_empty((1, 1, 32, 128))

    def step():
        placed.store(*case.new, row, table.length)
        placed.attend(case.q, row, table.length, out, kv_heads=8, scale=0.1)

    step()
    torch.cuda.synchronize()  # noqa: TID251  capturing begins on a stream with nothing before it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for past in (10, 256, 999, 1000):
        table.length.fill_(past)
        graph.replay()
        recorded = out.clone()
        step()
        assert torch.equal(recorded, out)

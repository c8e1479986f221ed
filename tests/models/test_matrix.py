# SPDX-License-Identifier: Apache-2.0
"""Every model family answers the same with its keys and values streamed as with transformers' resident cache.

Tiny random-weight models, fp32, `eager` attention and `DynamicCache` as the oracle. Tiles are one KV head and a
few tokens and pass through the staging ring; every test checks that tiles did move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.errors import HeadInferError
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.testing.zoo import REFUSED, ZOO, Column, Entry, ModelAbsent, Refused
from headinfer.testing.zoo.measure import (
    BOUND,
    CHUNKED_STEPS,
    PROMPT_TOKENS,
    compare,
    forwards,
    head_wise_layers,
    prompt,
    relative_error,
    run,
    streamed,
)
from headinfer.transfer import Copy, InlineEngine, Lane, Ticket

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning"),
]

REMEDY = "materialize|eager|sdpa|stock cache"
MATERIALIZED = ("llama", "gpt2", "gemma2", "gpt_oss")
# Values stored wrongly here move the logits of these models by ten times the bound at least.
FAULTY_SPAN = slice(16, 32)
FAULT = 1.01


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of the zoo and what it answers with the resident cache."""

    entry: Entry
    model: Any
    reference: dict[Column, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    """Subjects built so far."""
    return {}


@pytest.fixture
def subject(name: str, subjects: dict[str, Subject]) -> Subject:
    """The subject called `name`; its reference is computed once, before anything is attached to it."""
    if name not in subjects:
        entry, model = ZOO[name], built(ZOO[name])
        reference = {c: run(model, entry, c, resident=True) for c in entry.columns()}
        subjects[name] = Subject(entry, model, reference)
    return subjects[name]


def built(entry: Entry | Refused) -> Any:
    """The model of an entry; skips the test where transformers does not have it."""
    try:
        return entry.build()
    except ModelAbsent as absent:
        pytest.skip(str(absent))


@pytest.mark.parametrize("column", Column, ids=lambda column: column.name.lower())
@pytest.mark.parametrize("name", ZOO)
def test_streaming_answers_like_the_resident_cache(subject: Subject, column: Column) -> None:
    entry = subject.entry
    if column not in entry.columns():
        pytest.skip(entry.skips[column].reason)
    with streamed(subject.model) as session:
        got = run(subject.model, entry, column, resident=False)
        stats = session.stats
    cell = compare(subject.reference[column], got)
    assert cell.tokens_equal, f"tokens {got.tolist()} for {subject.reference[column].tolist()}"
    assert cell.error <= BOUND
    if entry.head_wise:
        # A prompt in one piece is attended as it comes; it is only written.
        moved = stats.written_bytes if column is Column.ONE_SHOT else stats.loaded_tiles
        assert moved > 0, f"nothing was streamed: {stats}"


@pytest.mark.parametrize("name", ZOO)
def test_the_declared_layers_are_kept_head_by_head(subject: Subject) -> None:
    entry = subject.entry
    with streamed(subject.model):
        head_wise, cached = head_wise_layers(subject.model, entry)
    assert head_wise == entry.head_wise
    assert cached <= entry.layers, "layers that share another layer's keys may have none cached"


@pytest.mark.parametrize("name", ZOO)
def test_transformers_itself_chunks_as_declared(subject: Subject) -> None:
    whole = forwards(subject.model, subject.entry, [sum(CHUNKED_STEPS)])
    error = relative_error(whole, subject.reference[Column.CHUNKED])
    if subject.entry.unchunkable:
        assert error > 1e-3
    else:
        assert error <= 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_says_what_to_do_instead(name: str) -> None:
    model = built(REFUSED[name])
    with pytest.raises(HeadInferError, match=REMEDY), torch.no_grad(), streamed(model):
        model(prompt())
    assert model.config._attn_implementation == "eager", "the model is as it was"


@pytest.mark.parametrize("name", [n for n, refused in REFUSED.items() if refused.materializes])
def test_materialising_a_refused_model_changes_no_bit(name: str) -> None:
    model = built(REFUSED[name])
    expected = stepped_logits(model)
    with headinfer.attach(model, on_unsupported="materialize"):
        assert torch.equal(stepped_logits(model), expected)


@pytest.mark.parametrize("name", MATERIALIZED)
def test_materialising_under_eager_attention_changes_no_bit(name: str) -> None:
    model = built(ZOO[name])
    expected = stepped_logits(model)
    cache = headinfer.HeadCache(model.config, on_unsupported="materialize")
    assert torch.equal(stepped_logits(model, cache), expected)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "gemma3n_text", "qwen3_next", "bart"]
)
def test_one_percent_in_one_span_of_one_head_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = headinfer.HeadCache.update
    monkeypatch.setattr(headinfer.HeadCache, "update", update_with_fault(store))
    for column in (Column.ONE_SHOT, Column.CHUNKED):
        with streamed(subject.model):
            got = run(subject.model, subject.entry, column, resident=False)
        assert compare(subject.reference[column], got).error > 10 * BOUND


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "falcon_h1"])
def test_one_percent_in_one_copied_tile_is_noticed(subject: Subject) -> None:
    engine = FaultyEngine()
    cache = headinfer.HeadCache(
        subject.model.config, engine=lambda device: engine, staging=True, tile_bytes=4096
    )
    with streamed(subject.model):
        got = forwards(subject.model, subject.entry, CHUNKED_STEPS, cache)
    assert engine.faults == 1
    assert compare(subject.reference[Column.CHUNKED], got).error > 10 * BOUND


@pytest.mark.parametrize(("name", "argument"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_a_dropped_argument_of_the_attention_call_is_noticed(
    subject: Subject, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with streamed(subject.model):
        attend = ALL_ATTENTION_FUNCTIONS["headinfer"]

        def forgetful(*args: Any, **kwargs: Any) -> Any:
            assert kwargs.pop(argument) is not None
            return attend(*args, **kwargs)

        # In the table that registering writes to: an entry of the instance would hide it for good.
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "headinfer", forgetful)
        got = run(subject.model, subject.entry, Column.ONE_SHOT, resident=False)
    assert compare(subject.reference[Column.ONE_SHOT], got).error > 100 * BOUND


def test_the_zoo_is_as_large_as_promised() -> None:
    types = {entry.model_type for entry in ZOO.values()}
    assert len(types) >= 66
    assert not types & {refused.model_type for refused in REFUSED.values() if not refused.until}
    streaming_now = {refused.model_type for refused in REFUSED.values() if refused.until}
    assert streaming_now <= types


class FaultyEngine(InlineEngine):
    """Copies one tile into staging, the fifth, with every number 1 % too large."""

    def __init__(self) -> None:
        self.loads = 0
        self.faults = 0

    def submit(self, copies: Sequence[Copy], *, lane: Lane, after: Sequence[Ticket] = ()) -> Ticket:
        ticket = super().submit(copies, lane=lane, after=after)
        if lane is Lane.IN:
            self.loads += 1
            if self.loads == 5:
                self.faults += 1
                for copy in copies:
                    copy.dst.view(torch.float32).mul_(FAULT)
        return ticket


def stepped_logits(model: Any, cache: Any = None) -> Tensor:
    """Logits of a prompt in two pieces and four single tokens, through `cache` or the model's own."""
    ids, logits, start = prompt(), [], 0
    with torch.no_grad():
        for tokens in (150, PROMPT_TOKENS - 150, 1, 1, 1, 1):
            piece = ids[:, start : start + tokens]
            out = model(piece, **cache_argument(model, cache), use_cache=True)
            cache = cache_returned(out)
            logits.append(out.logits)
            start += tokens
    return torch.cat(logits, dim=1)


def update_with_fault(update: Any) -> Any:
    """`HeadCache.update` that stores values of one head 1 % too large in `FAULTY_SPAN`."""

    def faulty(self: Any, keys: Tensor, values: Tensor, layer: int, *args: Any, **kw: Any) -> Any:
        past = self.layers[layer].get_seq_length()
        first, last = (max(0, edge - past) for edge in (FAULTY_SPAN.start, FAULTY_SPAN.stop))
        values = values.clone()
        values[:, 0, first:last] *= FAULT
        return update(self, keys, values, layer, *args, **kw)

    return faulty

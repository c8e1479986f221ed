# SPDX-License-Identifier: Apache-2.0
"""Runs one zoo model in every column of the matrix, with the resident cache or with streaming, and compares.

Both sides run the same calls on the same weights; only the cache and the attention implementation differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.testing.zoo.record import VOCAB_SIZE, Column, Entry, Kind, TokenTypes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A layer keeps the tokens of an unfinished block of 128 beside the staging ring: the prompt has more, the
# decoded tokens complete a second block, and the padding of the shorter prompt fills a block and some.
PROMPT_TOKENS = 254
SHORT_PROMPT_TOKENS = 110
DECODE_TOKENS = 4
CHUNK_TOKENS = 48
CHUNKED_STEPS = (48, 48, 48, 48, 48, 14, 1, 1, 1, 1)
ENCODER_TOKENS = 20
NEW_TOKENS = 6
SPEECH_TOKENS = 140
BEAMS = 3
BOUND = 1e-5
_WHOLE_PROMPT = 4096
_PLAIN_TOKEN = 5
_TILE_BYTES = 4096


@contextmanager
def streamed(model: PreTrainedModel) -> Iterator[Any]:
    """Streaming that really streams on a CPU: tiles of one KV head and a few tokens, through the staging ring."""
    import headinfer

    with headinfer.attach(
        model, chunk_tokens=CHUNK_TOKENS, tile_bytes=_TILE_BYTES, staging=True
    ) as session:
        yield session


@dataclass(frozen=True, slots=True)
class Cell:
    """The comparison of one column: relative error of logits (0 for token columns) and equality of tokens."""

    error: float
    tokens_equal: bool

    @property
    def ok(self) -> bool:
        """Within the bound, with equal tokens."""
        return self.error <= BOUND and self.tokens_equal


def run(model: PreTrainedModel, entry: Entry, column: Column, *, resident: bool) -> Tensor:
    """The logits or tokens of one column; `resident` passes transformers' own cache, else none."""
    _forget(model)
    cache = DynamicCache(config=model.config) if resident and not entry.has_encoder else None
    match column:
        case Column.ONE_SHOT:
            return forwards(model, entry, (PROMPT_TOKENS,), cache)
        case Column.CHUNKED:
            return forwards(model, entry, CHUNKED_STEPS, cache)
        case Column.PADDED:
            return forwards(model, entry, (PROMPT_TOKENS, 1, 1), cache, rows=2)
        case Column.GREEDY:
            return _generate(model, entry)
        case Column.GREEDY_CHUNKED:
            return _generate(model, entry, prefill_chunk_size=CHUNK_TOKENS)
        case Column.BEAMS:
            rows = 1 if entry.has_encoder else 2
            beams = {"num_beams": BEAMS, "num_return_sequences": BEAMS}
            return _generate(model, entry, rows, **beams)


def compare(reference: Tensor, got: Tensor) -> Cell:
    """The cell of one column from its two results."""
    if not reference.is_floating_point():
        return Cell(0.0, torch.equal(reference, got))
    return Cell(relative_error(reference, got), True)


def relative_error(reference: Tensor, got: Tensor) -> float:
    """Largest absolute difference over largest absolute reference; infinite if anything is not finite."""
    if reference.shape != got.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - reference).abs().max() / reference.abs().max())


@torch.no_grad()
def head_wise_layers(model: PreTrainedModel, entry: Entry) -> tuple[int, int]:
    """How many layers of an attached model are kept head by head, of how many in the cache."""
    inputs: dict[str, Any] = _encoder_inputs(model, entry, 1)
    inputs["decoder_input_ids" if entry.has_encoder else "input_ids"] = prompt(1, 8)
    cache = cache_returned(model(**inputs, use_cache=True))
    cache = getattr(cache, "self_attention_cache", cache)
    ours = [layer for layer in cache.layers if type(layer).__module__.startswith("headinfer.")]
    return len(ours), len(cache.layers)


def prompt(rows: int = 1, tokens: int = PROMPT_TOKENS + DECODE_TOKENS) -> Tensor:
    """Fixed random token ids without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(_PLAIN_TOKEN, VOCAB_SIZE, (rows, tokens), generator=generator)


def padding(rows: int, tokens: int) -> Tensor:
    """The 2D mask of a left-padded batch whose second row is the shorter prompt."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[1:, : PROMPT_TOKENS - SHORT_PROMPT_TOKENS] = 0
    return mask


@torch.no_grad()
def forwards(
    model: PreTrainedModel, entry: Entry, steps: Sequence[int], cache: Any = None, *, rows: int = 1
) -> Tensor:
    """Logits of consecutive forwards over one teacher-forced sequence, without those of padding."""
    total = sum(steps)
    ids, mask = prompt(rows, total), padding(rows, total)
    prefix = "decoder_" if entry.has_encoder else ""
    logits, start = [], 0
    for step in steps:
        inputs: dict[str, Any] = _encoder_inputs(model, entry, rows)
        inputs[prefix + "input_ids"] = ids[:, start : start + step]
        if rows > 1:
            inputs[prefix + "attention_mask"] = mask[:, : start + step]
        if start == 0 and entry.token_types is not TokenTypes.NONE:
            inputs["token_type_ids"] = _token_types(entry, rows, step)
        out = model(**inputs, use_cache=True, **cache_argument(model, cache))
        cache = cache_returned(out)
        logits.append(out.logits)
        start += step
    return torch.cat(logits, dim=1)[mask.bool()]


def _generate(model: PreTrainedModel, entry: Entry, rows: int = 1, **options: Any) -> Tensor:
    """Tokens of a run without sampling; decoders get their prompt in one piece unless `options` say otherwise."""
    inputs: dict[str, Any] = _encoder_inputs(model, entry, rows)
    inputs["max_new_tokens"] = NEW_TOKENS
    ids = prompt(rows, PROMPT_TOKENS)
    if entry.kind is Kind.SPEECH:
        inputs["max_new_tokens"] = SPEECH_TOKENS
    elif entry.kind is Kind.ENCODER_DECODER:
        inputs["decoder_input_ids"] = ids
    else:
        inputs |= {"input_ids": ids, "attention_mask": padding(rows, PROMPT_TOKENS)}
        inputs["prefill_chunk_size"] = _WHOLE_PROMPT
    out = model.generate(**{**inputs, "do_sample": False, **options})
    if not isinstance(out, Tensor):
        raise TypeError(f"generate returned {type(out).__name__}, a tensor of tokens was expected")
    return out


def _encoder_inputs(model: PreTrainedModel, entry: Entry, rows: int) -> dict[str, Any]:
    """What the encoder reads; nothing for decoders."""
    generator = torch.Generator().manual_seed(2)
    if entry.kind is Kind.ENCODER_DECODER:
        shape = (rows, ENCODER_TOKENS)
        return {"input_ids": torch.randint(_PLAIN_TOKEN, VOCAB_SIZE, shape, generator=generator)}
    if entry.kind is Kind.SPEECH:
        frames = 2 * model.config.max_source_positions
        shape_of_sound = (rows, model.config.num_mel_bins, frames)
        return {"input_features": torch.randn(shape_of_sound, generator=generator)}
    return {}


def _token_types(entry: Entry, rows: int, tokens: int) -> Tensor:
    """An image block, or a prefix, that crosses the first chunk border."""
    marked = torch.zeros(rows, tokens, dtype=torch.long)
    if entry.token_types is TokenTypes.PREFIX:
        marked[:, CHUNK_TOKENS + 4 :] = 1
    else:
        marked[:, 6 : CHUNK_TOKENS + 4] = 1
    return marked


def _forget(model: PreTrainedModel) -> None:
    """Drops the position offsets that some multimodal models keep from their last prompt."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None

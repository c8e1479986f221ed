# SPDX-License-Identifier: Apache-2.0
"""The prefill of `generate()`: told how long it will be, and cut where transformers' own cannot.

Only here is the whole prompt known before its first chunk runs. transformers' chunks are cut from token ids: a prompt of embeddings loses its attention mask there, and a
call without a cache is refused. Here embeddings are cut the way transformers itself continues
from a cache (the whole prompt so far, of which it takes what the cache lacks), and without a
cache nothing is cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

_BY_POSITION = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs with a column per prompt token."""

Prefill = Callable[..., Any]


def prefill_of(model: PreTrainedModel, announce: Callable[[int, int], None]) -> Prefill:
    """What takes the place of `model._prefill`; it has to be restored by `del model._prefill`.

    Args:
        model: the model to generate with.
        announce: told, before a prompt runs, its tokens and the most tokens there will be.
    """
    stock: Prefill = model._prefill

    def prefill(
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
        **more: Any,
    ) -> Any:
        chunk = generation_config.prefill_chunk_size
        embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        if model.config.is_encoder_decoder:
            embeds = None
        cache = model_kwargs.get("past_key_values")
        if is_first_iteration and not model.config.is_encoder_decoder:
            prompt = (input_ids if embeds is None else embeds).shape[1]
            announce(prompt, max(generation_config.max_length or 0, prompt + 1))
        if chunk is None or (cache is not None and embeds is None):
            before = set(model_kwargs)
            outputs = stock(input_ids, generation_config, model_kwargs, is_first_iteration, **more)
            # It leaves empty arguments behind that some models (Whisper) take for their own.
            for name in [name for name in model_kwargs if name not in before]:
                if model_kwargs[name] is None:
                    del model_kwargs[name]
            return outputs
        whole = copy.copy(generation_config)
        whole.prefill_chunk_size = None
        if cache is not None and embeds is not None and _can_be_cut(model_kwargs):
            for stop in range(cache.get_seq_length() + chunk, embeds.shape[1], chunk):
                part = _upto(model_kwargs, stop)
                outputs = stock(input_ids, whole, part, is_first_iteration, **more)
                model_kwargs["past_key_values"] = outputs.past_key_values
        return stock(input_ids, whole, model_kwargs, is_first_iteration, **more)

    return prefill


def _can_be_cut(model_kwargs: dict[str, Any]) -> bool:
    """Whether every tensor of the prompt is one whose columns are known to be its tokens."""
    known = {"inputs_embeds", *_BY_POSITION}
    tensors = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)}
    return tensors <= known


def _upto(model_kwargs: dict[str, Any], stop: int) -> dict[str, Any]:
    """The arguments of a prompt that ends at token `stop`."""
    part = {**model_kwargs, "inputs_embeds": model_kwargs["inputs_embeds"][:, :stop]}
    for name in _BY_POSITION:
        if part.get(name) is not None:
            part[name] = part[name][..., :stop]
    return part

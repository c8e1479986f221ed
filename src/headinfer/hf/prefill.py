# SPDX-License-Identifier: Apache-2.0
"""Prompts in chunks: the prefill of `generate()` while a session lasts, and one by hand.

Only in `generate()` is the whole prompt known before its first chunk runs, so that is where the
session is told. transformers' own chunks serve where they can; prompts of embeddings and prompts
that go on from a filled cache are cut here, as transformers itself continues from a cache: it gets
the whole prompt so far and takes of it what the cache lacks. Without a cache nothing is cut.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headinfer.errors import InputError
from headinfer.hf.cache import HeadCache
from headinfer.hf.cache_name import (
    NAMES,
    cache_argument,
    cache_given,
    cache_name,
    cache_returned,
)
from headinfer.hf.exhausted import kept_when_exhausted
from headinfer.hf.geometry import resolve_budget
from headinfer.plan import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, make_plan

_BY_POSITION = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs with a column per prompt token."""

Announce = Callable[[int, int, int], int | None]


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Any,
    attention_mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> Any:
    """`cache` holds `input_ids` too, read in chunks, so that activations stay bounded.

    Args:
        model: a decoder that runs with the attention implementation the cache needs.
        input_ids: token ids [batch, tokens] that follow what the cache holds.
        cache: a `HeadCache`, or any cache of transformers.
        attention_mask: 0 for padding, [batch, tokens in the cache + tokens]; None: no padding.
        chunk_tokens: tokens per forward pass; None lets the plan of the cache decide.
        on_chunk: told, after each forward pass, how many tokens the cache holds.

    Returns:
        The model's output for the last chunk, with the logits of the last token only.

    Raises:
        InputError: no tokens, a mask of another shape, or an encoder-decoder.
        BudgetTooSmall: a budget of the cache holds no chunk at all.
        GpuOutOfMemory: with the cache complete up to the token the error names.
    """
    past = length_of(cache)
    _check(model, input_ids, attention_mask, past, chunk_tokens)
    names = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    chunk = chunk_tokens or chunk_of(model, cache, batch=input_ids.shape[0])
    output: Any = None
    held = cache if isinstance(cache, HeadCache) else None
    with (
        torch.no_grad(),
        kept_when_exhausted(lambda: held, chunk, past + input_ids.shape[1], cache_name(model)),
    ):
        for start in range(0, input_ids.shape[1], chunk):
            ids = input_ids[:, start : start + chunk]
            if attention_mask is not None:
                mask = attention_mask[:, : past + start + ids.shape[1]]
                given["attention_mask"] = mask
                if "position_ids" in names:
                    given["position_ids"] = _positions(mask)[:, past + start :]
            output = model(input_ids=ids, use_cache=True, **cache_argument(model, cache), **given)
            cache = cache_returned(output)
            if on_chunk is not None:
                on_chunk(past + start + ids.shape[1])
    if "logits_to_keep" not in names:
        output.logits = output.logits[:, -1:]
    return output


class Prefill:
    """What takes the place of `model._prefill`; it has to be restored by `del model._prefill`.

    Args:
        model: the model to generate with.
        chunk_tokens: tokens per forward pass where the generation config names none.
        announce: told, before a prompt runs, its tokens, the most tokens there will be, and
            sequences; says how many tokens to read per forward pass where it decides that. None
            leaves all to transformers.
        cache_now: names the cache that is being filled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chunk_tokens: int | None = None,
        announce: Announce | None = None,
        cache_now: Callable[[], HeadCache | None] = lambda: None,
    ) -> None:
        self._model = model
        self._cache_now = cache_now
        self._chunk_tokens = chunk_tokens
        self._announce = announce

    def __deepcopy__(self, memo: dict[int, Any]) -> Prefill:
        # A copied model is a plain one: its session stays with the original.
        return Prefill(copy.deepcopy(self._model, memo))

    def __call__(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
        **more: Any,
    ) -> Any:
        if self._announce is None:
            run = type(self._model)._prefill
            return run(
                self._model, input_ids, generation_config, model_kwargs, is_first_iteration, **more
            )
        chunk = generation_config.prefill_chunk_size or self._chunk_tokens or input_ids.shape[1]
        embeds = model_kwargs.get("inputs_embeds")
        length = (input_ids if embeds is None else embeds).shape[1]
        with kept_when_exhausted(self._cache_now, chunk, length, cache_name(self._model)):
            return self._run(input_ids, generation_config, model_kwargs, is_first_iteration, **more)

    def _run(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool,
        **more: Any,
    ) -> Any:
        def stock(ids: Tensor, config: Any, arguments: dict[str, Any]) -> Any:
            run = type(self._model)._prefill
            return run(self._model, ids, config, arguments, is_first_iteration, **more)

        is_decoder = not self._model.config.is_encoder_decoder
        embeds = model_kwargs.get("inputs_embeds") if is_first_iteration and is_decoder else None
        prompt = (input_ids if embeds is None else embeds).shape[1]
        if is_first_iteration and is_decoder and self._announce is not None:
            # transformers counts a prompt of embeddings apart.
            beside = prompt - input_ids.shape[1]
            most = max((generation_config.max_length or 0) + beside, prompt + 1)
            rows = (input_ids if embeds is None else embeds).shape[0]
            self._chunk_tokens = self._announce(prompt, most, rows) or self._chunk_tokens
        chunk = generation_config.prefill_chunk_size or self._chunk_tokens
        whole = _changed(generation_config, prefill_chunk_size=None)
        cache = cache_given(model_kwargs)
        if chunk is None or cache is None:
            return stock(input_ids, whole, model_kwargs)
        past = length_of(cache)
        full = embeds is not None or _holds_past(input_ids, model_kwargs, whole)
        new = prompt - past if full else prompt
        cuttable = is_decoder and _can_be_cut(model_kwargs)
        if new <= chunk or (embeds is not None and not cuttable):
            return stock(input_ids, whole, model_kwargs)
        if cuttable and (past or embeds is not None):
            for stop in range(chunk, new, chunk):
                cut = new - stop
                ids = input_ids
                if embeds is None:
                    ids = input_ids[:, 0 if full else stop - chunk : input_ids.shape[1] - cut]
                part = _without_last(model_kwargs, cut)
                outputs = stock(ids, _changed(whole, mask_cut=cut), part)
                name = next(name for name in NAMES if name in model_kwargs)
                model_kwargs[name] = cache_returned(outputs)
            last = input_ids if full else input_ids[:, (new - 1) // chunk * chunk :]
            return stock(last, whole, model_kwargs)
        before = set(model_kwargs)
        outputs = stock(input_ids, _changed(whole, prefill_chunk_size=chunk), model_kwargs)
        # It leaves empty arguments behind that some models (Whisper) take for their own.
        for name in [name for name in model_kwargs if name not in before]:
            if model_kwargs[name] is None:
                del model_kwargs[name]
        return outputs


def length_of(cache: Any) -> int:
    """Tokens in a cache of transformers."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no attention layer at all
        return 0


def _changed(config: Any, *, mask_cut: int = 0, **fields: Any) -> Any:
    """A generation config with other fields, or with a mask that is `mask_cut` columns shorter."""
    changed = copy.copy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    if mask_cut and getattr(changed, "_mask_length", None) is not None:
        changed._mask_length -= mask_cut
    return changed


def _holds_past(input_ids: Tensor, model_kwargs: dict[str, Any], config: Any) -> bool:
    """The ids are the whole text so far, as transformers decides it: as long as the mask."""
    mask = model_kwargs.get("attention_mask")
    # A mask without padding is dropped in newer versions, and its length kept in the config.
    length = getattr(config, "_mask_length", None) if mask is None else mask.shape[1]
    return bool(length == input_ids.shape[1])


def _can_be_cut(model_kwargs: dict[str, Any]) -> bool:
    """Whether every tensor of the prompt is one whose columns are known to be its tokens."""
    known = {"inputs_embeds", *_BY_POSITION}
    tensors = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)}
    return tensors <= known


def _without_last(model_kwargs: dict[str, Any], cut: int) -> dict[str, Any]:
    """The arguments of a prompt that ends `cut` tokens earlier."""
    part = dict(model_kwargs)
    if part.get("inputs_embeds") is not None:
        part["inputs_embeds"] = part["inputs_embeds"][:, :-cut]
    for name in _BY_POSITION:
        if part.get(name) is not None:
            part[name] = part[name][..., :-cut]
    return part


def _check(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None,
    past: int,
    chunk_tokens: int | None,
) -> None:
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder: its prompt goes through the encoder, "
            "which keeps no cache. Use headinfer.attach(model) and model.generate()"
        )
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise InputError(f"input_ids of shape {tuple(input_ids.shape)}: give [batch, tokens >= 1]")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InputError(f"chunk_tokens={chunk_tokens} is not usable; give a whole number >= 1")
    wanted = (input_ids.shape[0], past + input_ids.shape[1])
    if mask is not None and tuple(mask.shape) != wanted:
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: the cache holds {past} tokens and "
            f"{input_ids.shape[1]} are new, so it has to be {wanted}"
        )


def chunk_of(model: PreTrainedModel, cache: Any, *, batch: int) -> int:
    """Tokens per forward pass as the plan of the cache has it, made beforehand if need be."""
    device = model.device
    if isinstance(cache, HeadCache):
        backing = cache.backing
        if backing.plan is not None:
            return backing.plan.chunk_tokens
        if backing.options.chunk_tokens is not None:
            return backing.options.chunk_tokens
        if backing.chunk is not None:
            return backing.chunk
        if backing.geometry is not None and backing.geometry.full_layers:
            options = resolve_budget(backing.options, device)
            plan = make_plan(backing.geometry, options, device=device.type, batch=batch)
            return plan.chunk_tokens
    return GPU_CHUNK_TOKENS if device.type == "cuda" else CPU_CHUNK_TOKENS


def _positions(mask: Tensor) -> Tensor:
    """Positions that do not count padding."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

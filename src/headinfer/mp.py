# SPDX-License-Identifier: Apache-2.0
"""The import path of the published HeadInfer code: `from headinfer.mp import mp_headinfer`.

A thin shell over `headinfer.hf.attach`: the model is not patched, its attention implementation is
set and one hook supplies or completes the cache.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headinfer.cache import OffloadedCache
from headinfer.hf.attach import attach, session_of
from headinfer.hf.geometry import weight_bytes_of
from headinfer.hf.simulate import simulate_context

NEW_TOKENS = 4096
"""Room kept after a simulated context before memory has to grow."""


def mp_headinfer(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """`model` from now on runs head by head; returns it. Calling again changes nothing.

    `num_logits_to_keep`, the name of transformers 4.45, is understood as `logits_to_keep`.

    Raises:
        UnsupportedModel: see `headinfer.attach`.
    """
    if session_of(model) is None:
        attach(model, **options)
    if _old_names not in model._forward_pre_hooks.values():
        # In front, so that it runs before the hook that reads the cache.
        model.register_forward_pre_hook(_old_names, with_kwargs=True, prepend=True)
    return model


def mp_simulate_decode(
    model: PreTrainedModel, start_length: int = 1_024_000, **options: Any
) -> OffloadedCache:
    """A cache that holds `start_length` tokens without a prefill, to time decoding.

    Its keys and values are random: see `headinfer.hf.simulate`.

    Raises:
        InputError: `start_length` below 1.
        BudgetTooSmall: it does not fit; names the smallest budget that works.
    """
    mp_headinfer(model)
    cache = OffloadedCache(
        model.config,
        weight_bytes=weight_bytes_of(model, model.device),
        **{"expected_tokens": start_length + NEW_TOKENS, **options},
    )
    simulate_context(model, cache, start_length)
    return cache


def _old_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "num_logits_to_keep" in kwargs:
        kwargs = {**kwargs, "logits_to_keep": kwargs["num_logits_to_keep"]}
        del kwargs["num_logits_to_keep"]
    cache = kwargs.get("past_key_values")
    if isinstance(cache, OffloadedCache) and isinstance(module, PreTrainedModel):
        cache.learn(module.config, weight_bytes=weight_bytes_of(module, module.device))
    return args, kwargs


__all__ = ["mp_headinfer", "mp_simulate_decode"]

# SPDX-License-Identifier: Apache-2.0
"""The names of the published HeadInfer code, on current transformers and for every model.

The model is not patched: its attention implementation is set, and one hook supplies or completes
the cache and understands the argument names of transformers 4.45.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from headinfer.hf.attach import attach, session_of
from headinfer.hf.backing import CacheOptions
from headinfer.hf.cache import HeadCache
from headinfer.hf.cache_name import cache_given
from headinfer.hf.geometry import weight_bytes_of
from headinfer.hf.simulate import simulate_context

NEW_TOKENS = 4096
"""Room kept after a simulated context before memory has to grow."""


class OffloadedCache(HeadCache):
    """A `HeadCache` that may be made before the model is known.

    `OffloadedCache()` learns the model's layers at its first forward pass through a model patched
    by `headinfer.mp.mp_headinfer`; attributes the published examples set on it are ignored.
    """

    def __init__(self, config: PreTrainedConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._options: CacheOptions = options  # type: ignore[assignment]
        self.learned = config is not None

    def learn(self, config: PreTrainedConfig, *, weight_bytes: int = 0) -> None:
        """Take the layers of `config`; only while empty."""
        if not self.learned and not self.get_seq_length():
            HeadCache.__init__(self, config, weight_bytes=weight_bytes, **self._options)
            self.learned = True


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
    cache = cache_given(kwargs)
    if isinstance(cache, OffloadedCache) and isinstance(module, PreTrainedModel):
        cache.learn(module.config, weight_bytes=weight_bytes_of(module, module.device))
    return args, kwargs

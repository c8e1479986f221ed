# SPDX-License-Identifier: Apache-2.0
"""What a forward pass is given, by position or by name: its cache, and how many tokens."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from headinfer.errors import UnsupportedAttention
from headinfer.hf.cache_name import cache_given, cache_name, names_for
from headinfer.hf.prefill import length_of


class PassArguments:
    """The arguments of the forward passes of one model.

    Raises:
        UnsupportedModel: it takes no cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._names = _positional_names(model)
        self._cache_name = cache_name(model)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of them by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def cache_among(self, named: dict[str, Any]) -> Any:
        """The cache of a forward pass; None if it is given none.

        Raises:
            UnsupportedAttention: it is not a cache of transformers that grows.
        """
        cache = cache_given(named, self._cache_name)
        if cache is None or isinstance(cache, Cache):
            return cache
        reason = (
            f"{type(cache).__name__} is no Cache of transformers: its paged cache (continuous "
            "batching) keeps keys on the GPU, and tuples of keys are of older versions"
        )
        raise UnsupportedAttention(
            f"{type(self._model).__name__} is given a cache that cannot be kept head by head: {reason}. "
            "Give none, a DynamicCache or a headinfer.HeadCache",
            reasons=[reason],
        )

    def caches(self, named: dict[str, Any]) -> bool:
        """Whether this forward pass would use a cache."""
        asked = named.get("use_cache")
        if asked is None:
            text = self._model.config.get_text_config(decoder=True)
            asked = self.cache_among(named) is not None or getattr(text, "use_cache", True)
        return bool(asked)

    def with_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with `cache` in the place of theirs."""
        name = self._cache_name
        place = self._names.index(name) if name in self._names else len(args)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        # Under the model's own name for it, whichever it was given by: the old one warns.
        others = {key: value for key, value in kwargs.items() if key not in names_for(name)}
        return args, {**others, name: cache}

    def lengths(self, named: dict[str, Any]) -> tuple[int, int]:
        """Tokens in the cache, and new ones."""
        cache = self.cache_among(named)
        past = 0 if cache is None else length_of(cache)
        for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
            given = named.get(name)
            if given is not None:
                return past, int(given.shape[1])
        return past, 0


def _positional_names(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [found.name for found in parameters if found.kind in kinds]

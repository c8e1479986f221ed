# SPDX-License-Identifier: Apache-2.0
"""Looks at a model before anything runs: what rules streaming out, and what may surprise."""

from __future__ import annotations

import logging
from inspect import signature

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)

from headinfer.errors import UnsupportedModel
from headinfer.hf.cache_name import cache_name
from headinfer.options import Options

_log = logging.getLogger(__name__)

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary frequencies that depend on the length seen so far: transformers' own chunked prefill
then differs from a prefill in one go, with any cache."""

STATELESS_SCANS = ("jamba", "bamba")
"""Seen with transformers 5.23, whose fallback starts every chunk from an empty state."""

ONE_GO = "give chunk_tokens >= the prompt length to prefill in one go"

STREAMABLE = (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def preflight(model: PreTrainedModel, options: Options) -> list[str]:
    """Warnings about running `model` head by head; each is logged once.

    Raises:
        UnsupportedModel: streaming is ruled out, with the way round.
    """
    config = model.config
    text = config.get_text_config(decoder=True)
    name = type(model).__name__
    if options.on_unsupported == "error":
        if not model._can_set_attn_implementation():
            raise UnsupportedModel(
                f"{name} computes attention in its own code rather than through transformers' "
                "attention interface, so its keys and values cannot be streamed. Use "
                "on_unsupported='materialize': exact, one layer at a time on the device"
            )
        indexed = _index_fields(text)
        if indexed:
            raise UnsupportedModel(
                f"{name} selects keys with an indexer ({', '.join(indexed)} in its config), which "
                "reads all keys and masks itself. It cannot be streamed head by head; use a stock "
                "cache"
            )
    cache_name(model)  # raises where there is none
    warnings = [*_warnings(config, text, name), *_chunk_warnings(model, name)]
    for warning in warnings:
        _log.warning("%s", warning)
    return warnings


def _warnings(config: PreTrainedConfig, text: PreTrainedConfig, name: str) -> list[str]:
    found = []
    layers = DynamicCache(config=config).layers
    streamed = [layer for layer in layers if type(layer) in STREAMABLE]
    if not streamed:
        kept = {type(layer).__name__ for layer in layers if isinstance(layer, CacheLayerMixin)}
        found.append(
            f"{name} has no full-attention layer: nothing is offloaded, its cache does not grow "
            f"with the context ({', '.join(sorted(kept)) or 'states only'})"
        )
    rope = _rope_types(text) & set(LENGTH_DEPENDENT_ROPE)
    if rope:
        found.append(
            f"{name} scales its rotary positions by the length seen so far ({', '.join(rope)}): "
            "prefill in chunks gives other results than in one go beyond the original length, with "
            f"any cache; {ONE_GO}"
        )
    if "longrope" in rope:
        found.append(
            f"{name} computes the whole prompt again, in one go, when its length passes the "
            "original one while tokens are generated: activations then grow with the prompt"
        )
    return found


def _chunk_warnings(model: PreTrainedModel, name: str) -> list[str]:
    """Models whose prefill in chunks is not the one in one go, in transformers itself."""
    found = []
    if _masks_by_token_type(model):
        found.append(
            f"{name} attends blocks of tokens (an image, a prefix) in both directions: a chunk "
            f"border inside a block changes the result, with any cache; {ONE_GO}"
        )
    if model.config.model_type in STATELESS_SCANS:
        found.append(
            f"{name}: where its own kernels are not installed, transformers' scan does not go on "
            f"from the state of the chunk before, with any cache; {ONE_GO}"
        )
    return found


def _masks_by_token_type(model: PreTrainedModel) -> bool:
    """A model says so by the arguments of its own function that makes masks for generate()."""
    make = getattr(type(model), "create_masks_for_generate", None)
    if make is None:
        return False
    return any(argument.endswith("token_type_ids") for argument in signature(make).parameters)


def _index_fields(text: PreTrainedConfig) -> list[str]:
    names = ("index_topk", "index_n_heads", "indexer_types")
    return [name for name in names if getattr(text, name, None)]


def _rope_types(text: PreTrainedConfig) -> set[str]:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return {
        str(found)
        for part in (rope, *nested)
        if (found := part.get("rope_type", part.get("type"))) is not None
    }

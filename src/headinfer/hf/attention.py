# SPDX-License-Identifier: Apache-2.0
"""The attention function registered with transformers as "headinfer".

Handles are streamed from where the keys and values lie; plain tensors (sliding layers, encoders,
vision towers, training without a cache) are attended in memory. Every argument a model passes is
honoured or refused by name: an unknown one may change the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headinfer.attention.masks import (
    Biased,
    Causal,
    Everything,
    Given,
    MaskRecipe,
    PaddedCausal,
    Sliding,
)
from headinfer.errors import HandleError, UnsupportedAttention
from headinfer.hf.handles import KVHandle, LazyMask
from headinfer.hf.masks import register_mask
from headinfer.hf.step import StepLayer, active_step
from headinfer.totals import Expand, Query, attend_in_memory

_log = logging.getLogger(__name__)

NAME = "headinfer"

WHOLE_MASK_ELEMENTS = 2**24
"""Plain calls up to this many mask elements go to torch's scaled_dot_product_attention."""

POSITION_BIAS_ELEMENTS = 2**30
"""Largest position bias accepted; the model makes it in full, heads x queries x keys."""

HARMLESS = frozenset(
    {
        "sliding_window",  # already in the mask
        "position_ids",
        "cache_position",
        "use_cache",
        "max_length_q",
        "max_length_k",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "position_embeddings",
        "token_type_ids",
        "mm_token_type_ids",
        "layer_idx",
    }
)
"""Arguments that do not change what attention computes."""

REFUSED = {
    "indices": "sparse top-k attention over selected keys",
    "block_indices": "sparse attention over selected blocks",
    "cache": "transformers' paged cache (continuous batching), which keeps keys on the GPU",
    "block_table": "a paged cache, which keeps keys on the GPU",
    "cu_seq_lens_q": "packed variable-length sequences",
    "cu_seq_lens_k": "packed variable-length sequences",
}
"""Arguments that ask for something else than attention over the cache."""


@torch.compiler.disable
def headinfer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [b, hq, t, d] over key, value [b, h, s, d]; returns ([b, t, hq, d], None).

    Raises:
        UnsupportedAttention: an argument that would change the result in a way not supported.
        HandleError: key and value do not stand for the same layer.
        CacheStateError: the cache was cropped since the handles were made.
    """
    _refuse(module, kwargs)
    sink = s_aux if s_aux is not None else sinks
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, KVHandle) or isinstance(value, KVHandle):
        if dropout:
            raise UnsupportedAttention(
                f"{_where(module)} asks for attention dropout {dropout} over a head-wise cache; "
                "call model.eval(), or train without a cache"
            )
        recipe = _recipe(module, query, attention_mask, is_causal, position_bias)
        out = _stream(module, query, key, value, scale, recipe, softcap, sink)
        return out, None
    _notice_resident(module, query, key, attention_mask)
    groups = query.shape[1] // key.shape[1]
    if softcap is None and sink is None and groups == getattr(module, "num_key_value_groups", 1):
        plain, causal = _plain_mask(attention_mask, query, key, is_causal)
        if not isinstance(plain, LazyMask):
            out, _ = sdpa_attention_forward(
                module,
                query,
                key,
                value,
                plain,
                dropout=dropout,
                scaling=scale,
                is_causal=causal,
                position_bias=position_bias,
            )
            return out, None
    if dropout:
        raise UnsupportedAttention(
            f"{_where(module)} asks for attention dropout {dropout} together with softcap, sinks "
            "or a long mask; call model.eval(), or train with attn_implementation='eager'"
        )
    recipe = _recipe(module, query, attention_mask, is_causal, position_bias)
    width = value.shape[-1]
    call = Query(query, scale, recipe, width, softcap=softcap, sink=sink)
    return attend_in_memory(call, key, value), None


def register() -> None:
    """Make attention and mask function known to transformers; idempotent."""
    AttentionInterface.register(NAME, headinfer_attention)
    register_mask(NAME)


def _notice_resident(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Say once when a layer that sees everything attends keys that another cache holds."""
    if isinstance(mask, LazyMask) and isinstance(mask.recipe, (Causal, PaddedCausal)):
        if key.shape[2] > query.shape[2]:
            _say_resident(type(module).__name__)


@lru_cache(maxsize=64)
def _say_resident(module: str) -> None:
    _log.warning(
        "%s runs with attn_implementation='headinfer', but its cache is not head-wise: nothing is "
        "offloaded. Use headinfer.attach(model), or pass a HeadCache(model.config)",
        module,
    )


def _stream(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    recipe: MaskRecipe,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    if not isinstance(key, KVHandle) or not isinstance(value, KVHandle):
        raise HandleError(
            f"{_where(module)} attends over {type(key).__name__} keys and {type(value).__name__} "
            "values: its code replaced one of the two after the cache update; use "
            "on_unsupported='materialize'"
        )
    origin = key.origin
    if value.origin.source is not origin.source or value.origin.length != origin.length:
        raise HandleError(
            f"{_where(module)} attends over {key!r} with {value!r}: not the same layer and length"
        )
    call = Query(
        query,
        scale,
        recipe,
        value.shape[-1],
        softcap=softcap,
        sink=sink,
        expand=_expand(module) if origin.derived else None,
    )
    step = active_step()
    with torch.no_grad():
        if step is not None:
            out = step.attend(cast(StepLayer, origin.source), call)
        else:
            out = origin.source.attend(origin.length, call)
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)  # type: ignore[no-untyped-call]
    return out


class _NoGradient(torch.autograd.Function):
    """Keys and values are stored without their graph: a gradient through them would be wrong."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise UnsupportedAttention(
            "a gradient was asked for through a head-wise cache, which stores keys and values "
            "without their graph; call the model with use_cache=False, or in model.train() mode"
        )


def _expand(module: nn.Module) -> Expand:
    expand: Callable[..., Any] | None = getattr(module, "expand_kv", None)
    if expand is None:
        raise UnsupportedAttention(
            f"{_where(module)} expands cached latents but has no expand_kv to call tile by tile; "
            "use on_unsupported='materialize'"
        )

    def run(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        k, v = expand(latent, rotary)
        return k, v

    return run


def _recipe(
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
) -> MaskRecipe:
    recipe: MaskRecipe
    if isinstance(mask, LazyMask):
        recipe = mask.recipe
    elif mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise UnsupportedAttention(
                f"{_where(module)} is given a mask {list(mask.shape)} of type {mask.dtype}, which "
                "may mean either of two things; pass a bool mask (True is visible) or one of "
                "floats that is added to the scores"
            )
        recipe = Given(mask)
    else:
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        # The rule of scaled_dot_product_attention: aligned at the first key.
        recipe = Causal(0) if is_causal and query.shape[2] > 1 else Everything()
    if position_bias is None:
        return recipe
    if position_bias.numel() > POSITION_BIAS_ELEMENTS:
        raise UnsupportedAttention(
            f"{_where(module)} passes a position bias of {position_bias.numel():,} elements "
            f"(heads x queries x keys), above {POSITION_BIAS_ELEMENTS:,}; lower chunk_tokens"
        )
    return Biased(recipe, position_bias)


def _plain_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool | None
) -> tuple[Tensor | None, bool | None]:
    """Mask and causal flag for torch's own attention; still lazy when it would be too large."""
    if not isinstance(mask, LazyMask):
        return mask, is_causal
    if mask.shape[-1] != key.shape[2]:
        raise HandleError(
            f"keys of {key.shape[2]} tokens meet a mask made for {mask.shape[-1]}: several forward "
            "passes ran on a sliding layer without a crop between them; update transformers"
        )
    recipe, rows, keys = mask.recipe, query.shape[2], key.shape[2]
    if isinstance(recipe, Sliding):
        if recipe.padding is not None or recipe.hides_past(rows):
            return mask, False  # a fused kernel takes the window; a mask would be t x s
        recipe = Causal(recipe.offset)
    if isinstance(recipe, Everything):
        return None, False
    if isinstance(recipe, Causal) and recipe.offset + rows == keys:
        if recipe.offset == 0:
            return None, True
        if rows == 1:
            return None, False
    return (mask.make() if mask.numel() <= WHOLE_MASK_ELEMENTS else mask), False


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is None or name in HARMLESS:
            continue
        if name in REFUSED:
            raise UnsupportedAttention(
                f"{_where(module)} asks for {REFUSED[name]} ({name}=...), which is not attention "
                "over a head-wise cache; use attn_implementation='eager' or 'sdpa' for this model",
                reasons=[f"{name}: {REFUSED[name]}"],
            )
        if name == "output_attentions":
            if given:
                raise UnsupportedAttention(
                    f"{_where(module)} asks for attention weights (output_attentions=True): they "
                    "are never formed here; use attn_implementation='eager'",
                    reasons=["output_attentions"],
                )
            continue
        raise UnsupportedAttention(
            f"{_where(module)} passes {name}={type(given).__name__} to attention, which headinfer "
            "does not know and will not ignore; use attn_implementation='eager' with "
            "on_unsupported='materialize', and report the model",
            reasons=[f"unknown argument {name}"],
        )


def _where(module: nn.Module) -> str:
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if index is None else f" (layer {index})")

# SPDX-License-Identifier: Apache-2.0
"""Fills a cache as if a long context had been read, to time decoding without a prefill.

Keys and values are random, the same block over and over: right for bytes moved and time taken,
meaningless as a context. Shapes come from one real forward pass of one token, so any model works.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headinfer.errors import InputError
from headinfer.hf.cache import HeadCache, HeadLayer
from headinfer.hf.cache_name import cache_argument

FILL_TOKENS = 8192


@torch.no_grad()
def simulate_context(model: PreTrainedModel, cache: HeadCache, tokens: int) -> HeadCache:
    """`cache`, which must be empty, holds `tokens` tokens of random keys and values.

    The model must run with attn_implementation="headinfer".

    Raises:
        InputError: `tokens` is below 1, or the cache is not empty.
        TierFull: a memory budget does not allow that many.
    """
    if tokens < 1:
        raise InputError(f"start_length={tokens} is not a context; give 1 token or more")
    if cache.get_seq_length():
        raise InputError(
            f"the cache holds {cache.get_seq_length()} tokens; simulate into an empty one"
        )
    one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    model(input_ids=one, use_cache=True, **cache_argument(model, cache))
    cache.backing.simulated = True
    try:
        _fill(cache, tokens)
    finally:
        cache.backing.simulated = False
    return cache


def _fill(cache: HeadCache, tokens: int) -> None:
    """All tokens but the first, which is there."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    blocks: dict[tuple[object, ...], Tensor] = {}
    for index, layer in enumerate(cache.layers):
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if key is None or value is None:
            continue  # linear-attention states stay as the one token left them
        # A stock layer keeps a window; what is before it need not pass through.
        count = tokens - 1 if isinstance(layer, HeadLayer) else min(tokens - 1, FILL_TOKENS)
        for done in range(0, count, FILL_TOKENS):
            size = min(FILL_TOKENS, count - done)
            k = _block(blocks, key, generator)[:, :, :size]
            v = _block(blocks, value, generator)[:, :, :size]
            cache.update(k, v, index)
        if hasattr(layer, "cumulative_length") and isinstance(layer.cumulative_length, int):
            layer.cumulative_length = tokens


def _block(
    blocks: dict[tuple[object, ...], Tensor], like: Tensor, generator: torch.Generator
) -> Tensor:
    """Random keys or values [1, h, FILL_TOKENS, d] of the shape and type of `like`."""
    key = (like.shape[1], like.shape[3], like.dtype, like.device)
    if key not in blocks:
        shape = (1, like.shape[1], FILL_TOKENS, like.shape[3])
        block = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        blocks[key] = block.to(device=like.device, dtype=like.dtype)
    return blocks[key]

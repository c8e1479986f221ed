# SPDX-License-Identifier: Apache-2.0
"""What is left when the GPU runs out of memory during a prefill: everything that was complete.

Frames of the failed pass keep its activations alive, so they are cleared first; then the cache
goes back to the last token that every layer holds, and the error says how to go on.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator

import torch

from headinfer.errors import CacheStateError, GpuOutOfMemory
from headinfer.hf.cache import HeadCache
from headinfer.layout import BLOCK_TOKENS


@contextlib.contextmanager
def kept_when_exhausted(
    cache_now: Callable[[], HeadCache | None], chunk: int, length: int, name: str
) -> Iterator[None]:
    """Forward passes over chunks of `chunk` tokens until the cache that `cache_now` names, and the
    model calls `name`, holds `length`.

    Raises:
        GpuOutOfMemory: instead of torch's error, once the cache is usable again.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        why = ". ".join(" ".join(str(error).split()).split(". ")[:2])  # what was asked for
    else:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise _explained(cache_now(), chunk, length, name, why)


def _explained(
    cache: HeadCache | None, chunk: int, length: int, name: str, why: str
) -> GpuOutOfMemory:
    smaller = max(chunk // 2 // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS)
    remedy = (
        f"chunks of {smaller:,} tokens (chunk_tokens={smaller})"
        if smaller < chunk
        else "a smaller gpu_memory, or less in use by others"
    )
    complete = 0
    state = "nothing was complete; begin again with"
    try:
        if cache is not None:
            complete = cache.crop_to_complete()
            if complete >= length:  # the last token's logits are still wanted
                cache.crop(-1)
                complete -= 1
    except CacheStateError:
        if cache is not None:
            cache.reset()
        state = "this model's windows or states cannot go back, so its cache was emptied; use"
    if complete:
        state = (
            f"the cache is complete up to token {complete:,}: go on with generate(..., "
            f"{name}=run.cache, prefill_chunk_size={smaller}), or begin again with"
        )
    return GpuOutOfMemory(
        f"the GPU ran out of memory in a chunk of {chunk:,} tokens ({why}); {state} {remedy}",
        chunk_tokens=chunk,
        complete_tokens=complete,
        remedy_chunk_tokens=smaller,
    )

# SPDX-License-Identifier: Apache-2.0
"""The mask function registered with transformers: a recipe instead of a [b, 1, t, s] tensor.

A block of any pattern (sliding, chunked, packed, image blocks, custom) is transformers' own
`sdpa_mask` at shifted offsets, so no pattern is written again here. Offsets are frozen as whole
numbers when the mask is made: some caches hand out tensors they later change in place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from headinfer.attention.api import fuses_windows
from headinfer.attention.masks import (
    MASK_ELEMENTS,
    Block,
    Causal,
    Everything,
    MaskRecipe,
    PaddedCausal,
    Padding,
    Sliding,
)
from headinfer.errors import HandleError
from headinfer.hf.handles import LazyMask
from headinfer.hf.step import StepRefused, active_step

CACHED_BYTES = 64 * 2**20
"""Evaluated blocks kept per mask, for the other layers that use it."""

MaskFunction = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The arguments of `sdpa_mask` that do not depend on the block."""

    batch: int
    q_offset: int
    kv_offset: int
    function: MaskFunction
    visible: Tensor | None
    use_vmap: bool
    device: torch.device

    def block(self, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """bool [b, 1, rows, keys]."""
        mask: Tensor | None = sdpa_mask(
            batch_size=self.batch,
            q_length=rows[1] - rows[0],
            kv_length=keys[1] - keys[0],
            q_offset=self.q_offset + rows[0],
            kv_offset=self.kv_offset + keys[0],
            mask_function=self.function,
            attention_mask=self.visible,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )
        if mask is None:  # only with the skips that are switched off above
            raise HandleError("transformers' sdpa_mask made no mask for a block")
        return mask


class FunctionRecipe:
    """Any other pattern: evaluated block by block, blocks remembered for later layers."""

    def __init__(self, pattern: _Pattern) -> None:
        self._pattern = pattern
        self._cache: OrderedDict[tuple[int, ...], tuple[Tensor, bool | None]] = OrderedDict()
        self._cached_bytes = 0

    def blocks(self, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Block]:
        if rows[0] >= rows[1] or keys[0] >= keys[1]:
            return
        most = max(1, MASK_ELEMENTS // self._pattern.batch)
        row_step = min(rows[1] - rows[0], max(isqrt(most), most // (keys[1] - keys[0])))
        key_step = most // row_step
        for r0 in range(rows[0], rows[1], row_step):
            for k0 in range(keys[0], keys[1], key_step):
                part = (r0, min(r0 + row_step, rows[1])), (k0, min(k0 + key_step, keys[1]))
                mask, uniform = self._evaluate(*part)
                if uniform is None:
                    yield Block(*part, bias=mask)
                elif uniform:
                    yield Block(*part)

    def _evaluate(self, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[Tensor, bool | None]:
        place = (*rows, *keys)
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        mask = self._pattern.block(rows, keys)
        uniform: bool | None = None
        if mask.device.type == "cpu":  # elsewhere the answer would have to be waited for
            if not bool(mask.any()):
                uniform = False
            elif bool(mask.all()):
                uniform = True
        self._cache[place] = mask, uniform
        self._cached_bytes += mask.numel()
        while self._cached_bytes > CACHED_BYTES and len(self._cache) > 1:
            _, (old, _) = self._cache.popitem(last=False)
            self._cached_bytes -= old.numel()
        return mask, uniform


@torch.compiler.disable
def headinfer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> LazyMask | None:
    """A lazy mask for these lengths, or None where every key is visible to every query.

    Arguments as transformers passes them to mask functions; `attention_mask` is [b, s].
    """
    if device is None:
        device = torch.device("cpu") if attention_mask is None else attention_mask.device
    device = torch.device(device)
    q_offset, kv_offset, kv_length = int(q_offset), int(kv_offset), int(kv_length)
    shape = (batch_size, 1, q_length, kv_length)
    step = active_step()
    if step is not None:
        if mask_function is not causal_mask_function or use_vmap or kv_offset:
            raise StepRefused("a mask that is not causal")
        return LazyMask(shape, device, step.recipe, _never)
    padding = None
    if attention_mask is not None:
        shifted = attention_mask[:, kv_offset : kv_offset + kv_length]
        padding = Padding(shifted.to(device=device, dtype=torch.bool), kv_length)
        if not padding.hides:
            attention_mask = padding = None
    if allow_is_bidirectional_skip and padding is None:
        if local_size is None or kv_length < local_size:
            return None
    pattern = _Pattern(
        batch=batch_size,
        q_offset=q_offset,
        kv_offset=kv_offset,
        function=mask_function,
        visible=attention_mask,
        use_vmap=use_vmap,
        device=device,
    )
    recipe: MaskRecipe
    if mask_function is causal_mask_function and not use_vmap:
        offset = q_offset - kv_offset
        recipe = Causal(offset) if padding is None else PaddedCausal(offset, padding)
    elif mask_function is bidirectional_mask_function and not use_vmap and padding is None:
        recipe = Everything()
    elif local_size is not None and not use_vmap and _slides(mask_function, local_size, device):
        recipe = Sliding(q_offset - kv_offset, local_size, padding)
    else:
        recipe = FunctionRecipe(pattern)
    return LazyMask(shape, device, recipe, lambda: pattern.block((0, q_length), (0, kv_length)))


def _never() -> Tensor:
    raise StepRefused("model code reads a mask")


def _slides(function: MaskFunction, size: int, device: torch.device) -> bool:
    """Whether `function` is exactly a causal window of `size` and this device fuses windows.

    Where gradients are recorded, blocks keep their masks: the fused kernel has no backward.
    """
    if torch.is_grad_enabled() or not fuses_windows(device):
        return False
    return _same(function, sliding_window_causal_mask_function(size))


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal, functions by their code and all that it closes over."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        closed = [cell.cell_contents for cell in a.__closure__ or ()]
        other = [cell.cell_contents for cell in b.__closure__ or ()]
        return a is b or (
            a.__code__ is b.__code__
            and a.__defaults__ == b.__defaults__
            and a.__kwdefaults__ == b.__kwdefaults__
            and _same(closed, other)
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, int) and isinstance(b, int) and a == b


def register_mask(name: str) -> None:
    """Make the mask function known to transformers under `name`."""
    AttentionMaskInterface.register(name, headinfer_mask)

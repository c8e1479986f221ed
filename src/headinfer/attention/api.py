# SPDX-License-Identifier: Apache-2.0
"""Chooses the attention implementation for a call, or says why none can run it.

The choice depends on the call's spec alone and is remembered; a caller may insist on one by name.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from headinfer.attention.native import NativeAttention
from headinfer.attention.reference import ReferenceAttention
from headinfer.attention.sdpa import (
    CpuFlashAttention,
    CudnnAttention,
    EfficientAttention,
    FlashAttention,
)
from headinfer.attention.triton import TritonAttention
from headinfer.attention.types import AttentionImpl, AttentionSpec, Partial, Window
from headinfer.errors import InputError, UnsupportedAttention

IMPLEMENTATIONS: dict[str, AttentionImpl] = {
    impl.name: impl
    for impl in (
        NativeAttention(),
        CpuFlashAttention(),
        CudnnAttention(),
        FlashAttention(),
        EfficientAttention(),
        TritonAttention(),
        ReferenceAttention(),
    )
}
"""In order of preference, but for calls that `_stands_back` names."""

AUTO = "auto"
SHORT_QUERY_TOKENS = 64


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    window: Window | None = None,
    impl: str = AUTO,
) -> Partial:
    """Attention of q over one span, by `impl` or the preferred implementation that can.

    Arguments as in `AttentionImpl.__call__`; s == 0 gives the merge identity.

    Raises:
        UnsupportedAttention: no implementation can, or not the one insisted on; with all reasons.
    """
    if k.shape[2] == 0 or q.shape[2] == 0:
        shape = (*q.shape[:3], v.shape[-1])
        return Partial(q.new_zeros(shape), q.new_full(shape[:3], -torch.inf, dtype=torch.float32))
    biased, capped, windowed = bias is not None, softcap is not None, window is not None
    spec = spec_of(q, k, v, causal=causal, biased=biased, softcap=capped, windowed=windowed)
    run = choose(spec, impl)
    return run(q, k, v, scale=scale, causal=causal, bias=bias, softcap=softcap, window=window)


def spec_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    biased: bool = False,
    softcap: bool = False,
    windowed: bool = False,
) -> AttentionSpec:
    """The spec of a call with these tensors."""
    return AttentionSpec(
        device=q.device.type,
        dtype=q.dtype,
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        q_per_kv=q.shape[1] // k.shape[1],
        query_tokens=min(q.shape[2], SHORT_QUERY_TOKENS),
        causal=causal,
        biased=biased,
        softcap=softcap,
        windowed=windowed,
        gradient=torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad),
    )


def grows_with_keys(spec: AttentionSpec, impl: str = AUTO) -> bool:
    """Whether the implementation that runs `spec` makes tensors as long as its keys: copies of
    them in float32, and scores."""
    return choose(spec, impl).name == ReferenceAttention.name


def built_per_shape(spec: AttentionSpec, impl: str = AUTO) -> bool:
    """Whether the implementation that runs `spec` is built anew for every shape; see `few_shapes`."""
    return choose(spec, impl).name == CudnnAttention.name


@lru_cache(maxsize=256)
def choose(spec: AttentionSpec, impl: str = AUTO) -> AttentionImpl:
    """The implementation that runs `spec`.

    Raises:
        InputError: `impl` names none.
        UnsupportedAttention: see `attend`.
    """
    reasons = why_not(spec)
    if impl == AUTO:
        able = [name for name, found in reasons.items() if not found]
        if able:
            first = [name for name in able if not _stands_back(name, spec)]
            return IMPLEMENTATIONS[(first or able)[0]]
    elif impl not in IMPLEMENTATIONS:
        raise InputError(f"attention={impl!r} is not known; known: {', '.join(IMPLEMENTATIONS)}")
    elif not reasons[impl]:
        return IMPLEMENTATIONS[impl]
    lines = [f"{name}: {'; '.join(found)}" for name, found in reasons.items() if found]
    raise UnsupportedAttention(
        f"attention={impl!r} cannot run {spec}: {' | '.join(lines)}. Use attention='auto', or "
        "'reference', which runs everything.",
        reasons=lines,
    )


def fuses_windows(device: torch.device) -> bool:
    """Whether calls with a window run fused on `device`; elsewhere masks are made for them."""
    return not IMPLEMENTATIONS["triton"].unsupported(
        AttentionSpec(device.type, torch.bfloat16, 64, 64, 1, 64, False, False, False, True)
    )


def _stands_back(name: str, spec: AttentionSpec) -> bool:
    """Whether `name` leaves a call it could run to those after it, the reference excepted."""
    if name == "cudnn":  # FlashAttention splits the keys of short queries, cuDNN does not
        return spec.query_tokens < SHORT_QUERY_TOKENS
    if name == "mem-efficient":  # one call per KV head without Hopper's tensor cores: for masks
        return not spec.biased
    return name == ReferenceAttention.name


def why_not(spec: AttentionSpec) -> dict[str, list[str]]:
    """For every implementation the reasons why it cannot run `spec`; empty where it can."""
    return {name: impl.unsupported(spec) for name, impl in IMPLEMENTATIONS.items()}

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
from headinfer.attention.types import AttentionImpl, AttentionSpec, Partial
from headinfer.errors import InputError, UnsupportedAttention

IMPLEMENTATIONS: dict[str, AttentionImpl] = {
    impl.name: impl
    for impl in (
        NativeAttention(),
        CpuFlashAttention(),
        CudnnAttention(),
        FlashAttention(),
        EfficientAttention(),
        ReferenceAttention(),
    )
}
"""In order of preference. Short queries skip cuDNN: FlashAttention splits the keys there."""

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
    spec = AttentionSpec(
        device=q.device.type,
        dtype=q.dtype,
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        q_per_kv=q.shape[1] // k.shape[1],
        query_tokens=min(q.shape[2], SHORT_QUERY_TOKENS),
        causal=causal,
        biased=bias is not None,
        softcap=softcap is not None,
    )
    run = choose(spec, impl)
    return run(q, k, v, scale=scale, causal=causal, bias=bias, softcap=softcap)


@lru_cache(maxsize=256)
def choose(spec: AttentionSpec, impl: str = AUTO) -> AttentionImpl:
    """The implementation that runs `spec`.

    Raises:
        InputError: `impl` names none.
        UnsupportedAttention: see `attend`.
    """
    reasons = why_not(spec)
    if impl == AUTO:
        for name, found in reasons.items():
            if not found and not (name == "cudnn" and spec.query_tokens < SHORT_QUERY_TOKENS):
                return IMPLEMENTATIONS[name]
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


def why_not(spec: AttentionSpec) -> dict[str, list[str]]:
    """For every implementation the reasons why it cannot run `spec`; empty where it can."""
    return {name: impl.unsupported(spec) for name, impl in IMPLEMENTATIONS.items()}

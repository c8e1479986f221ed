# SPDX-License-Identifier: Apache-2.0
"""torch's fused attention kernels, called below `scaled_dot_product_attention` because only there
do they return the log-sum-exp that merging spans needs.

Grouped queries never expand keys or values: without a mask between rows the query heads of a KV
head are packed as rows of one head; otherwise keys are expanded with stride 0, head by head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from headinfer.attention.few_shapes import of_one_stride
from headinfer.attention.types import AttentionSpec, Partial, Window

_HALF = (torch.float16, torch.bfloat16)


class CpuFlashAttention:
    """torch's blocked CPU kernel; takes grouped queries and additive masks as they are."""

    name = "cpu-flash"

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        reasons = _common(spec, "cpu")
        if spec.dtype not in (torch.float32, *_HALF):
            reasons.append(f"type {spec.dtype}; runs float32, float16, bfloat16")
        return reasons

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool = False,
        bias: Tensor | None = None,
        softcap: float | None = None,
        window: Window | None = None,
    ) -> Partial:
        q, k, padded = _equal_dims(q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, padded, 0.0, causal, attn_mask=_additive(bias, torch.float32), scale=scale
        )
        return _blank_hidden(Partial(out[..., : v.shape[-1]], lse), bias)


class FlashAttention:
    """FlashAttention-2 as torch ships it."""

    name = "flash"

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        return [*_common(spec, "cuda"), *_half_only(spec, 256), *_no_bias(spec)]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool = False,
        bias: Tensor | None = None,
        softcap: float | None = None,
        window: Window | None = None,
    ) -> Partial:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Partial:
            result = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, False, scale=scale
            )
            return Partial(result[0], result[1])

        return _grouped(run, q, k, v, bias=None, causal=causal)


class CudnnAttention:
    """cuDNN's kernel: the fastest for long queries on Hopper and later; see `few_shapes`."""

    name = "cudnn"

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        reasons = [*_common(spec, "cuda"), *_half_only(spec, 128), *_no_bias(spec)]
        if spec.key_dim != spec.value_dim:
            reasons.append(f"key dim {spec.key_dim} and value dim {spec.value_dim} differ")
        if spec.device == "cuda":
            if not torch.backends.cudnn.is_available():
                reasons.append("cuDNN is not available")
            elif torch.cuda.get_device_capability() < (8, 0):
                reasons.append("the GPU is older than compute capability 8.0")
        return reasons

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool = False,
        bias: Tensor | None = None,
        softcap: float | None = None,
        window: Window | None = None,
    ) -> Partial:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Partial:
            result = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, of_one_stride(k), of_one_stride(v), None, True, 0.0, causal, False, scale=scale
            )
            return Partial(result[0], result[1].view(q.shape[:3]))

        # Takes grouped queries itself; packed they are one longer head, which a causal square
        # cannot be: there one call over all heads takes the place of one call per head.
        return run(q, k, v, None) if causal else _grouped(run, q, k, v, bias=None, causal=False)


class EfficientAttention:
    """The memory-efficient kernel: masked calls on CUDA.

    Not for float32: in one case (dims 24 and 8, 128 keys, an H200) it erred 2.4 times as much as
    eager attention and one rounding, beyond the rule.
    """

    name = "mem-efficient"

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        reasons = _common(spec, "cuda")
        if spec.dtype not in _HALF:
            reasons.append(f"type {spec.dtype}; runs float16 and bfloat16")
        return reasons

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool = False,
        bias: Tensor | None = None,
        softcap: float | None = None,
        window: Window | None = None,
    ) -> Partial:
        q, k, v, value_dim = *_round_dims(q, k), *_rounded(v)
        additive = _additive(bias, q.dtype)

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Partial:
            if bias is not None:
                bias = _aligned_bias(bias, q, k)
            result = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, True, 0.0, causal, scale=scale
            )
            return Partial(result[0], result[1][..., : q.shape[2]])

        found = _grouped(run, q, k, v, bias=additive, causal=causal)
        return _blank_hidden(Partial(found.out[..., :value_dim], found.lse), bias)


_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Partial]
"""A kernel once grouped queries are taken care of: q, k, v, bias."""


def _grouped(
    run: _Kernel, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, causal: bool
) -> Partial:
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    per_kv = heads // kv_heads
    if per_kv == 1:
        return run(q, k, v, bias)
    if bias is None and not causal:
        packed = run(q.reshape(batch, kv_heads, per_kv * rows, dim), k, v, None)
        return Partial(
            packed.out.reshape(batch, heads, rows, -1), packed.lse.reshape(batch, heads, rows)
        )
    parts = []
    for head in range(kv_heads):
        mine = slice(head * per_kv, (head + 1) * per_kv)
        wide = (batch, per_kv, -1, -1)
        head_bias = bias if bias is None or bias.shape[1] == 1 else bias[:, mine]
        one = slice(head, head + 1)
        parts.append(run(q[:, mine], k[:, one].expand(wide), v[:, one].expand(wide), head_bias))
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return Partial(torch.cat(outs, dim=1), torch.cat(lses, dim=1))


def _common(spec: AttentionSpec, device: str) -> list[str]:
    reasons = []
    if spec.device != device:
        reasons.append(f"tensors are on {spec.device}; runs on {device}")
    if spec.softcap:
        reasons.append("softcap")
    if spec.windowed:
        reasons.append("a window")
    return reasons


def _half_only(spec: AttentionSpec, limit: int) -> list[str]:
    reasons = []
    if spec.dtype not in _HALF:
        reasons.append(f"type {spec.dtype}; runs float16 and bfloat16")
    if spec.key_dim != spec.value_dim:
        reasons.append(f"key dim {spec.key_dim} and value dim {spec.value_dim} differ")
    if spec.key_dim > limit or spec.key_dim % 8:
        reasons.append(f"head dim {spec.key_dim}; runs multiples of 8 up to {limit}")
    return reasons


def _no_bias(spec: AttentionSpec) -> list[str]:
    return ["a mask or bias"] if spec.biased else []


def _additive(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    if bias.dtype != torch.bool:
        return bias.to(dtype)
    hidden = torch.full((), -torch.inf, dtype=dtype, device=bias.device)
    return torch.where(bias, torch.zeros((), dtype=dtype, device=bias.device), hidden)


def _blank_hidden(partial: Partial, bias: Tensor | None) -> Partial:
    """Rows that see no key become (0, -inf): kernels return other values there."""
    if bias is None:
        return partial
    seen = bias if bias.dtype == torch.bool else bias > -torch.inf
    hidden = ~seen.any(dim=-1)
    return Partial(
        partial.out.masked_fill(hidden[..., None], 0.0), partial.lse.masked_fill(hidden, -torch.inf)
    )


def _equal_dims(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero columns until keys and values are equally wide: they change no score and no output."""
    missing = k.shape[-1] - v.shape[-1]
    if missing > 0:
        v = pad(v, (0, missing))
    elif missing < 0:
        q, k = pad(q, (0, -missing)), pad(k, (0, -missing))
    return q, k, v


def _rounded(x: Tensor) -> tuple[Tensor, int]:
    dim = x.shape[-1]
    return (x if dim % 8 == 0 else pad(x, (0, -dim % 8))), dim


def _round_dims(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return _rounded(q)[0], _rounded(k)[0]


def _aligned_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Expanded to the kernel's shape; rows start at multiples of 16 elements as it requires."""
    keys = k.shape[2]
    if keys % 16:
        bias = pad(bias, (0, -keys % 16))[..., :keys]
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], keys)

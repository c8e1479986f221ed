# SPDX-License-Identifier: Apache-2.0
"""Attention written out: scores, softcap, bias, log-sum-exp, weighted sum.

The oracle for every other implementation, in float64 when given float64, and the one that runs
what no fused kernel does. Works through query rows in slices so that the scores stay bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headinfer.attention.types import AttentionSpec, Partial, Window

SCORE_ELEMENTS = 2**24
"""Scores held at a time (64 MiB in float32)."""


class ReferenceAttention:
    """Any device, type, dims, softcap and bias."""

    name = "reference"

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        return []

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
        batch, heads, rows, _ = q.shape
        step = max(1, SCORE_ELEMENTS // max(batch * heads * k.shape[2], 1))
        if window is not None:  # slices as long as the window see at most twice its keys
            step = max(step, min(window.size, SCORE_ELEMENTS // (batch * heads * 2 * window.size)))
        parts = [
            _rows(
                q, k, v, slice(start, min(start + step, rows)), scale, causal, bias, softcap, window
            )
            for start in range(0, rows, step)
        ]
        if not parts:
            return _rows(q, k, v, slice(0, 0), scale, causal, bias, softcap, None)
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2))


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: slice,
    scale: float,
    causal: bool,
    bias: Tensor | None,
    softcap: float | None,
    window: Window | None,
) -> Partial:
    dtype = _arithmetic(q)
    batch, heads, _, dim = q.shape
    if window is not None:
        k, v, bias, window = _within(window, rows, k, v, bias)
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q[:, :, rows].to(dtype).reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ k.to(dtype).transpose(-1, -2) * scale).view(batch, heads, -1, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        index = torch.arange(q.shape[2], device=q.device)[rows]
        hidden = torch.arange(keys, device=q.device) > index[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    if window is not None:
        seen = window.visible(
            torch.arange(rows.start, rows.stop, device=q.device)[:, None],
            torch.arange(keys, device=q.device),
        )
        scores = scores.masked_fill(~seen, -torch.inf)
    if bias is not None:
        block = bias if bias.shape[-2] == 1 else bias[..., rows, :]
        if block.dtype == torch.bool:
            scores = scores.masked_fill(~block, -torch.inf)
        else:
            scores = scores + block
    # softmax divides by the sum it took: going through the rounded log-sum-exp instead would
    # scale a whole row by up to eps * |lse|. Rows that see nothing are 0 / 0 there.
    weights = torch.softmax(scores, dim=-1).nan_to_num_(nan=0.0)
    out = weights.view(batch, kv_heads, -1, keys) @ v.to(dtype)
    found = torch.promote_types(q.dtype, torch.float32)
    lse = torch.logsumexp(scores, dim=-1)
    return Partial(out.view(batch, heads, -1, v.shape[-1]).to(found), lse.to(found))


def _within(
    window: Window, rows: slice, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Window]:
    """The keys that some of `rows` see, and the window counted from the first of them."""
    keys = k.shape[2]
    start = min(max(0, window.offset + rows.start - window.size + 1), keys)
    stop = min(max(start, window.offset + rows.stop), keys)
    if start == stop:  # nothing is seen: one key, which the window hides, keeps the shapes
        start = max(0, start - 1)
        stop = start + 1
    here = slice(start, stop)
    bias = None if bias is None else bias[..., here]
    return k[:, :, here], v[:, :, here], bias, Window(window.offset - start, window.size)


def _arithmetic(q: Tensor) -> torch.dtype:
    """float32 is computed in float64, which costs little where this still runs: matrix products of
    few rows add in another order than eager attention and erred up to 1.25 times the rule."""
    if q.dtype == torch.float32 and q.device.type != "mps":  # which has no float64
        return torch.float64
    return torch.promote_types(q.dtype, torch.float32)

# SPDX-License-Identifier: Apache-2.0
"""The records attention speaks in. Order is `[b, h, t, d]` everywhere: batch, head, token, dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some span of keys.

    Attributes:
        out: [b, h, t, d] softmax-weighted values, normalised over this span only.
        lse: [b, h, t] natural log of the sum of exp of scaled scores, float32 (float64 for
            float64 inputs). A row that sees no key has out 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor


class Window(NamedTuple):
    """Row i sees keys j with offset + i - size < j <= offset + i, both counted within the call."""

    offset: int
    size: int

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Which of `keys` each of `rows` sees, bool; both whole numbers that broadcast."""
        last = rows + self.offset
        return (keys <= last) & (keys > last - self.size)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a call needs, so that an implementation can say beforehand why it cannot."""

    device: str
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    q_per_kv: int
    query_tokens: int
    causal: bool
    biased: bool
    softcap: bool
    windowed: bool = False
    gradient: bool = False


class AttentionImpl(Protocol):
    """One way to compute attention. Called on the current stream; never waits for the device."""

    name: str

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        """Reasons why `spec` cannot run here; empty means it can."""
        ...

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
        """Attention of q [b, h * q_per_kv, t, d] over k [b, h, s, d], v [b, h, s, e], s >= 1.

        Args:
            scale: factor on q k^T.
            causal: needs t == s; query i sees keys 0..i.
            bias: [b or 1, h * q_per_kv or 1, t or 1, s]: bool (True is visible) or added to the
                scaled scores.
            softcap: scores x become softcap * tanh(x / softcap), before the bias.
            window: keys outside it are hidden, whatever the bias; not together with causal.
        """
        ...

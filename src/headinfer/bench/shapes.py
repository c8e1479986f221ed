# SPDX-License-Identifier: Apache-2.0
"""Shapes of models that are measured: numbers from which bytes and FLOPs follow, no weights.

Speed and memory do not depend on the values of weights, so a shape with random ones stands for
the model it is named after.
"""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP.

    Attributes:
        name: what it is shaped like.
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocab: as in its config.
        tied: the embedding doubles as the output projection.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Keys and values of `tokens` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * ITEM_BYTES[dtype]

    def weight_bytes(self, dtype: str) -> int:
        """Weights read by one forward pass; of an untied embedding one row, which is nothing."""
        return (self.layers * self._layer_weights + self.vocab * self.hidden) * ITEM_BYTES[dtype]

    def linear_flops(self, tokens: int, *, logits: int = 1) -> int:
        """Matrix products of `tokens` tokens, with the logits of `logits` of them."""
        return (
            2 * tokens * self.layers * self._layer_weights + 2 * logits * self.vocab * self.hidden
        )

    def attention_flops(self, new: int, *, past: int = 0) -> int:
        """Both products of causal attention of `new` tokens that follow `past` ones."""
        pairs = new * past + new * (new + 1) // 2
        return 4 * self.layers * self.heads * self.head_dim * pairs

    @property
    def _layer_weights(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256),
        Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True),
        Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, tied=True),
        Shape("tiny", 256, 512, 4, 8, 2, 32, 1000),
        Shape("tiny, odd", 112, 160, 3, 7, 1, 80, 333),
    )
}

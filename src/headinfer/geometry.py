# SPDX-License-Identifier: Apache-2.0
"""The shape of a model's key-value cache, counted in bytes.

A layer either keeps every token ("full": what headinfer places head by head), a window, a fixed
state, or nothing. Knows no tensors and no model classes; `headinfer.hf.geometry` reads it off a
transformers config.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class LayerKind(Enum):
    """What a layer caches."""

    FULL = "full"
    SLIDING = "sliding"
    STATE = "state"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One layer's cache.

    Attributes:
        kind: what is kept.
        num_kv_heads: KV heads (1 for a latent cache).
        key_dim: elements of one key.
        value_dim: elements of one value.
        num_query_heads: attention heads that read it.
        window: tokens kept by a sliding layer, else 0.
        attended_key_dim, attended_value_dim: of what is attended, where the model expands what is
            kept (latents) for every query head; 0: as kept.
        state_bytes: of a layer with a fixed state, what that takes for one sequence.
    """

    kind: LayerKind
    num_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    num_query_heads: int = 0
    window: int = 0
    attended_key_dim: int = 0
    attended_value_dim: int = 0
    state_bytes: int = 0

    @property
    def attended_dims(self) -> tuple[int, int]:
        """Elements of a key and of a value in the arithmetic of attention."""
        return (
            self.attended_key_dim or self.key_dim,
            self.attended_value_dim or self.value_dim,
        )

    @property
    def expansion_flops(self) -> float:
        """FLOPs to expand what is kept of one token, 0 where it is attended as it is."""
        if not self.attended_key_dim:
            return 0.0
        # The key's last part, positions, is kept as the second latent and not expanded.
        width = self.attended_key_dim - self.value_dim + self.attended_value_dim
        return 2.0 * self.key_dim * self.num_query_heads * width

    def head_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of one KV head over `tokens` tokens of one sequence."""
        return tokens * (self.key_dim + self.value_dim) * itemsize

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the whole layer over `tokens` tokens of one sequence."""
        kept = min(tokens, self.window) if self.kind is LayerKind.SLIDING else tokens
        if self.kind in (LayerKind.STATE, LayerKind.NONE):
            return 0
        return self.num_kv_heads * self.head_bytes(kept, itemsize)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights beyond their sum on the device; 0 where it is not known.

    Attributes:
        token_params: weights that multiply one token, experts it does not pass and both
            embeddings left out.
        token_bytes: bytes that one token reads, the output projection included.
        host_bytes, disk_bytes: what accelerate keeps elsewhere and brings for every forward pass.
        largest_moved_bytes: of these, the most that is on the device at once.
    """

    token_params: int = 0
    token_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    largest_moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Geometry:
    """The cache and the sizes that set a run's memory.

    Attributes:
        layers: in model order.
        itemsize: bytes per element of keys and values.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP (the active experts' for a mixture).
        vocab_size: rows of the output projection.
        weight_bytes: bytes of all weights on the device, 0 if unknown.
        max_positions: positions the model was made for, 0 if unknown.
        name: for messages.
        weights: more about them.
        dtype: type of keys and values, "bfloat16" for example; empty if unknown.
    """

    layers: tuple[LayerGeometry, ...]
    itemsize: int
    hidden_size: int = 0
    intermediate_size: int = 0
    vocab_size: int = 0
    weight_bytes: int = 0
    max_positions: int = 0
    name: str = "model"
    weights: Weights = Weights()
    dtype: str = ""

    @property
    def full_layers(self) -> tuple[LayerGeometry, ...]:
        """The layers whose keys and values grow with the context."""
        return tuple(layer for layer in self.layers if layer.kind is LayerKind.FULL)

    def kv_bytes(self, tokens: int, *, batch: int = 1) -> int:
        """Bytes of keys and values over `tokens` tokens, windows and states included as kept."""
        return batch * sum(layer.kv_bytes(tokens, self.itemsize) for layer in self.layers)

    def offloadable_bytes(self, tokens: int, *, batch: int = 1) -> int:
        """Bytes of keys and values of the full layers over `tokens` tokens."""
        return batch * sum(layer.kv_bytes(tokens, self.itemsize) for layer in self.full_layers)


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """How stored keys and values are encoded.

    Attributes:
        name: as users write it.
        exact: decoding gives the same bits back.
        bytes_per_byte: stored bytes per byte of the model's dtype.
    """

    name: str
    exact: bool
    bytes_per_byte: float


EXACT = FormatSpec(name="exact", exact=True, bytes_per_byte=1.0)
LOSSLESS = FormatSpec(name="lossless", exact=True, bytes_per_byte=193.75 / 256)
FORMATS: dict[str, FormatSpec] = {EXACT.name: EXACT, LOSSLESS.name: LOSSLESS}

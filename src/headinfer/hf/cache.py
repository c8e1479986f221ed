# SPDX-License-Identifier: Apache-2.0
"""The cache handed to transformers: full-attention layers become head-wise, all others stay stock.

transformers builds the right list of layers from the config; those whose exact type is
`DynamicLayer` (and the attention half of hybrid layers) are replaced. `update` stores and returns
handles; the "headinfer" attention function streams them. Plan and memory come to exist at the
first update, when device, type and batch are known.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from typing_extensions import Unpack

from headinfer.errors import CacheStateError
from headinfer.geometry import Weights
from headinfer.hf.attention import register
from headinfer.hf.backing import Backing, CacheOptions, EngineFactory, options_from
from headinfer.hf.geometry import geometry_of
from headinfer.hf.handles import KVHandle, Origin
from headinfer.hf.step import active_step
from headinfer.hf.tokens import TokenLog
from headinfer.layer import Stats
from headinfer.plan import Plan
from headinfer.runner import Runner
from headinfer.totals import Query

_log = logging.getLogger(__name__)

_warned: WeakSet[Backing] = WeakSet()
"""Caches that have had a forward pass longer than their chunks."""

# With the cache at hand, model.set_attn_implementation("headinfer") has to work.
register()


@contextmanager
def _lasting() -> Iterator[None]:
    """What is stored outlives the call: no tensor of inference mode, which could not be written
    to outside it, and no part of a gradient's graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class HeadLayer(CacheLayerMixin):
    """One full-attention layer, kept head by head."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, backing: Backing, index: int) -> None:
        super().__init__()
        self.backing = backing
        self.index = index
        self.length = 0

    @property
    def on_unsupported(self) -> str:
        return self.backing.options.on_unsupported

    @property
    def keys(self) -> Tensor | None:
        return self._handle(self.length, values=False)

    @keys.setter
    def keys(self, given: Tensor | None) -> None:
        self._refuse_assignment(given)

    @property
    def values(self) -> Tensor | None:
        return self._handle(self.length, values=True)

    @values.setter
    def values(self, given: Tensor | None) -> None:
        self._refuse_assignment(given)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [b, h, t, d]; returns handles on all of them.

        Raises:
            CacheStateError: the batch size or a shape changed.
            TierFull: a memory budget is used up.
            BudgetTooSmall: at the first update, when the plan does not fit.
        """
        step = active_step()
        if step is not None:
            step.update(self, key_states, value_states)
            length = self.length + key_states.shape[2]
            keys, values = self._handle(length, values=False), self._handle(length, values=True)
        else:
            self.store(key_states, value_states)
            keys, values = self.keys, self.values
        if keys is None or values is None:
            raise CacheStateError(f"layer {self.index} was given no tokens to store")
        return keys, values

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Store new keys and values [b, h, t, d]; raises what `update` raises."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        runner = self.backing.runner_for(keys, values, self.index + 1)
        self._warn_if_long(keys.shape[2])
        with _lasting():
            self.length = runner.append(self.index, keys, values)

    def extend(self, tokens: int) -> None:
        """The layer holds `tokens` more, which a recorded step puts where `Runner.places` says."""
        self.length = self._runner().extend(self.index, tokens)

    def attend(self, length: int, query: Query) -> Tensor:
        """Attention over the first `length` tokens, [b, t, h, d]."""
        with _lasting():  # staging slots are written to in every pass
            return self._runner().attend(self.index, length, query)

    def gather(self, length: int, *, values: bool) -> Tensor:
        """Keys or values [b, h, t, d] of the first `length` tokens, on the compute device."""
        return self._runner().gather(self.index, length, values=values)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, Tensor) else int(query_length)
        return self.length + new, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def offload(self) -> None:
        """Keys and values are where the plan wants them already."""

    def prefetch(self) -> None:
        """The runner prefetches by tile."""

    def reset(self) -> None:
        if self.backing.runner is not None:
            self.backing.runner.drop(self.index)
        self.length = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-n` tokens; a positive n is the length to keep, as older callers mean."""
        count = int(tokens_to_remove)
        if count == 0 or self.length == 0:
            return
        length = self.length + count if count < 0 else min(count, self.length)
        length = max(length, 0)
        with _lasting():
            self._runner().crop(self.index, length)
        self.length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._reorder([row for row in range(self._batch()) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._reorder(_row_numbers(indices))

    def _warn_if_long(self, tokens: int) -> None:
        plan = self.backing.plan
        known = self.backing in _warned or self.backing.simulated
        if plan is None or tokens <= plan.chunk_tokens or known:
            return
        _warned.add(self.backing)
        _log.warning(
            "one forward pass of %d tokens, where the plan has chunks of %d: the memory of its "
            "activations is not bounded. Use headinfer.attach and generate(), or set "
            "generation_config.prefill_chunk_size, or call headinfer.prefill",
            tokens,
            plan.chunk_tokens,
        )

    def _batch(self) -> int:
        runner = self.backing.runner
        layer = None if runner is None else runner.layers.get(self.index)
        return 0 if layer is None else layer.batch

    def _reorder(self, rows: Sequence[int]) -> None:
        if self.length:
            with _lasting():
                self._runner().reorder(self.index, rows)

    def _runner(self) -> Runner:
        runner = self.backing.runner
        if runner is None:
            raise CacheStateError(
                f"layer {self.index} holds no tokens, after reset() or from the start; run a forward "
                "pass first"
            )
        return runner

    def _handle(self, length: int, *, values: bool) -> Tensor | None:
        runner = self.backing.runner
        layer = None if runner is None else runner.layers.get(self.index)
        if layer is None or not length:
            return None
        shape = layer.shape
        width = shape.value_dim if values else shape.key_dim
        latent = self.backing.latent and shape.num_kv_heads == 1
        origin = Origin(self, length, values, latent=latent)
        full = (layer.batch, shape.num_kv_heads, length, width)
        return KVHandle(full, shape.dtype, layer.device, origin)

    def _refuse_assignment(self, given: Tensor | None) -> None:
        if given is not None:
            raise CacheStateError(
                f"something assigned keys or values of layer {self.index}, which are kept head by "
                "head outside the GPU; use update(), or a DynamicCache for code that rewrites them"
            )


class HybridHeadLayer(LinearAttentionLayer, HeadLayer):
    """A layer with linear-attention states beside full attention (Falcon-H1, Zamba2)."""

    is_compileable = False

    def __init__(self, backing: Backing, index: int, number_of_states: int = 1) -> None:
        HeadLayer.__init__(self, backing, index)
        # transformers before 5.13 keeps one state and takes no count.
        count = {"number_of_states": number_of_states} if number_of_states > 1 else {}
        LinearAttentionLayer.__init__(self, **count)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Attention passes two positional tensors, linear attention its states by keyword.
        if len(args) == 2 and not kwargs:
            HeadLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        HeadLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        HeadLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._keep_rows([row for row in range(self._batch()) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keep_rows(_row_numbers(indices))

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        HeadLayer.crop(self, tokens_to_remove)

    def _keep_rows(self, rows: Sequence[int]) -> None:
        LinearAttentionLayer.reorder_cache(self, torch.tensor(rows, device="cpu"))
        self._reorder(rows)


class HeadCache(DynamicCache):
    """A transformers cache whose full-attention layers are kept head by head.

    Pass it as `cache=` (before transformers 5.24 `past_key_values=`); the model must run with
    attn_implementation="headinfer" (which
    `headinfer.attach` sets), or the cache be made with on_unsupported="materialize".

    Args:
        config: the model's config. Without one every layer is kept in full, windows too.
        weight_bytes: bytes of the model's weights on the compute device, for the plan.
        weights: more about them.
        engine: makes the transfer engine of a device (for tests).
        options: see `CacheOptions`.

    Raises:
        InputError: an option that is not one, or an unusable value.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        weight_bytes: int = 0,
        weights: Weights | None = None,
        engine: EngineFactory | None = None,
        **options: Unpack[CacheOptions],
    ) -> None:
        super().__init__(config=config)
        text = None if config is None else config.get_text_config(decoder=True)
        geometry = None
        if config is not None:
            geometry = geometry_of(config, weight_bytes=weight_bytes, weights=weights)
        latent = getattr(text, "kv_lora_rank", None) is not None
        self.backing = Backing(options_from(options), geometry, latent=latent, engine=engine)
        self.log = TokenLog()
        self.saved: Any = None  # the context this came from or went to, see headinfer.hf.contexts
        if config is None:
            self.layer_class_to_replicate: Any = _LayerFactory(self.backing)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = HeadLayer(self.backing, index)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                states = getattr(layer, "conv_states", None)
                count = len(states) if isinstance(states, (list, tuple, dict)) else 1
                self.layers[index] = HybridHeadLayer(self.backing, index, max(count, 1))

    @property
    def token_ids(self) -> Tensor | None:
        """Ids [b, t] of what is held, on the host; None if nobody named them."""
        return self.log.ids(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.log.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.log.reorder([row for row in range(self.log.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.log.reorder(_row_numbers(indices))

    @property
    def head_layers(self) -> list[HeadLayer]:
        """The layers kept head by head."""
        return [layer for layer in self.layers if isinstance(layer, HeadLayer)]

    @property
    def plan(self) -> Plan | None:
        """What was decided; None before the first update."""
        return self.backing.plan

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; returns all of them, as its layer keeps them.

        Raises:
            CacheStateError: a model with more layers than the one the cache was made for.
        """
        if layer_idx >= len(self.layers) and self.layer_class_to_replicate is None:
            raise CacheStateError(
                f"a model of at least {layer_idx + 1} layers is given a cache made for "
                f"{len(self.layers)}; make one from its own config: HeadCache(model.config)"
            )
        found: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return found

    def reset(self) -> None:
        """Forget everything, the plan too: what comes next may have another length and batch."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # a window: older versions keep it, as zeros
                layer.is_initialized = False
        self.close()
        self.log.clear()
        self.saved = None
        self.backing.plan = self.backing.length = None

    def stats(self) -> Stats:
        """Bytes held and moved."""
        runner = self.backing.runner
        return Stats() if runner is None else runner.stats()

    def ratios(self) -> dict[int, float]:
        """Per layer whose blocks are packed (`kv_format="lossless"`), the bytes they take by those they
        stand for, raw blocks included. Looks at every block."""
        runner = self.backing.runner
        return {} if runner is None else runner.ratios()

    def crop_to_complete(self) -> int:
        """After a forward pass that failed midway: crop to the tokens every layer holds, and to those
        before what a disk failed to take.

        Returns:
            The length kept.

        Raises:
            CacheStateError: a layer forgets what it would have to go back to (a window that is
                full, recurrent states): `reset` the cache and prefill again.
        """
        layers = [layer for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        lengths = [int(layer.get_seq_length()) for layer in layers]
        keep = min(lengths, default=0)
        if self.backing.runner is not None:
            written = self.backing.runner.complete_tokens()
            keep = keep if written is None else min(keep, written)
        for index, layer in enumerate(self.layers):
            if has_states(layer):
                raise CacheStateError(
                    f"layer {index} ({type(layer).__name__}) has states that cannot go back to an "
                    "earlier token; call reset() and prefill again"
                )
        for index, (layer, length) in enumerate(zip(layers, lengths, strict=True)):
            if length > keep and layer.is_sliding and not _within_window(layer, length):
                raise CacheStateError(
                    f"layer {index} ({type(layer).__name__}) has dropped the tokens of its window "
                    f"that going back from {length} to {keep} needs; call reset() and prefill again"
                )
        for layer, length in zip(layers, lengths, strict=True):
            if length > keep:
                layer.crop(keep - length)
        return keep

    def close(self) -> None:
        """Free all memory now rather than when the cache is collected, and the saved context it
        may have been extending."""
        if self.saved is not None:
            self.saved.close()
        if self.backing.runner is not None:
            self.backing.runner.close()
            self.backing.runner = None
        for layer in self.head_layers:
            layer.length, layer.is_initialized = 0, False

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadCache:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with _lasting():
            backing = self.backing.clone()
        memo[id(self.backing)] = backing
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin


def has_states(layer: Any) -> bool:
    """Whether a layer has linear-attention states of tokens seen."""
    found = getattr(layer, "has_previous_state", False)
    return any(found.values()) if isinstance(found, dict) else bool(found)


def _within_window(layer: Any, length: int) -> bool:
    return length < layer.sliding_window or bool(getattr(layer, "record_past", False))


def _row_numbers(indices: Tensor) -> list[int]:
    chosen = torch.as_tensor(indices, device="cpu")
    if chosen.dtype == torch.bool:
        chosen = chosen.nonzero().flatten()
    return [int(row) for row in chosen.tolist()]


class _LayerFactory:
    """Makes the next layer when a cache without a config meets a new layer index."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._made = 0

    def __call__(self) -> HeadLayer:
        layer = HeadLayer(self._backing, self._made)
        self._made += 1
        return layer

# SPDX-License-Identifier: Apache-2.0
"""A baseline: the schedule that the HeadInfer authors' published program runs, written anew.

What is kept of it is the order of work, with everything that costs time there: one KV head at a
time, two heads on the GPU that take turns, each head concatenated anew with its new tokens and
written back whole into freshly page-locked memory, and a host that waits for every head. Two
things differ: projections run for all heads of a layer at once, because transformers' own model
code does them, and copies wait for each other by events where the original could race.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from headinfer.errors import InputError

NAME = "headinfer-schedule"
_MARK = "_headinfer_schedule"


class ScheduleCache(Cache):
    """A cache of transformers whose keys and values pass by the GPU head by head.

    The model has to run with `attn_implementation=NAME`; one sequence, without padding.

    Attributes:
        schedule: where the heads are.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device) -> None:
        """Raises InputError for a model with windows: the published program knows none."""
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
            raise InputError(
                f"the baseline runs full attention only, and {type(config).__name__} has "
                f"{', '.join(sorted(kinds))}; leave out the contestant 'schedule'"
            )
        AttentionInterface.register(NAME, _attention_of_layer)
        layers = int(text.num_hidden_layers)
        self.schedule = HeadSchedule(layers, int(text.num_key_value_heads), device)
        super().__init__(layers=[_Layer(self.schedule, index) for index in range(layers)])

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Every layer holds keys and values [1, h, s, d], as if they had been read."""
        for index, layer in enumerate(self.layers):
            self.schedule.store(index, keys, values)
            layer.length = keys.shape[2]


@dataclass(slots=True)
class _Head:
    """Keys and values [1, 1, s, d] in host memory, and the event after which they are there."""

    keys: Tensor
    values: Tensor
    landed: torch.cuda.Event | None


class HeadSchedule:
    """All heads of all layers in the order of use, two of them on the device.

    Attributes:
        loaded_bytes, written_bytes: copied to the device and back so far.
    """

    def __init__(self, layers: int, heads: int, device: torch.device) -> None:
        self.heads = heads
        self.loaded_bytes = 0
        self.written_bytes = 0
        self._device = device
        self._host: list[_Head | None] = [None] * (layers * heads)
        self._next: tuple[int, Tensor, Tensor] | None = None
        cuda = device.type == "cuda"
        self._prefetching = torch.cuda.Stream(device) if cuda else None
        self._evicting = torch.cuda.Stream(device) if cuda else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention of q [1, hq, t, d] after adding k, v [1, h, t, d]; [1, hq, t, d]."""
        per_kv = q.shape[1] // self.heads
        outs = []
        for head in range(self.heads):
            place = layer * self.heads + head
            keys, values = self._with_new(place, k[:, head : head + 1], v[:, head : head + 1])
            self._prefetch((place + 1) % len(self._host), unless=place)
            mine = q[:, head * per_kv : (head + 1) * per_kv]
            outs.append(attend_one_head(mine, keys, values, scale))
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            self._evict(place, keys, values)
        return torch.cat(outs, dim=1)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A layer's heads [1, h, s, d] go to host memory."""
        for head in range(self.heads):
            one = slice(head, head + 1)
            place = layer * self.heads + head
            self._evict(place, keys[:, one].contiguous(), values[:, one].contiguous())
        if self._evicting is not None:
            self._evicting.synchronize()

    @property
    def host_bytes(self) -> int:
        """Keys and values held, without what an allocator adds."""
        return sum(_bytes(head.keys) + _bytes(head.values) for head in self._host if head)

    def _with_new(self, place: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The whole head on the device: what was stored, concatenated with what is new."""
        staged, self._next = self._next, None
        if staged is None or staged[0] != place:
            staged = self._load(place)
        if staged is None:
            return k, v
        if self._prefetching is not None:
            self._prefetching.synchronize()
        _, keys, values = staged
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

    def _prefetch(self, place: int, *, unless: int) -> None:
        if place != unless:
            self._next = self._load(place)

    def _load(self, place: int) -> tuple[int, Tensor, Tensor] | None:
        head = self._host[place]
        if head is None:
            return None
        self.loaded_bytes += _bytes(head.keys) + _bytes(head.values)
        if self._prefetching is None:
            return place, head.keys.clone(), head.values.clone()
        with torch.cuda.stream(self._prefetching):
            if head.landed is not None:
                self._prefetching.wait_event(head.landed)
            keys = head.keys.to(self._device, non_blocking=True)
            values = head.values.to(self._device, non_blocking=True)
        for tensor in (keys, values):
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return place, keys, values

    def _evict(self, place: int, keys: Tensor, values: Tensor) -> None:
        """The whole head goes back into memory of its own, however little of it is new."""
        self.written_bytes += _bytes(keys) + _bytes(values)
        landed = None
        with self._eviction():
            # From a GPU, torch page-locks what it copies into, in blocks of powers of two.
            host = [t.to("cpu", non_blocking=True, copy=True) for t in (keys, values)]
            if self._evicting is not None:
                landed = torch.cuda.Event()
                landed.record(self._evicting)
                for tensor in (keys, values):
                    tensor.record_stream(self._evicting)
        self._host[place] = _Head(host[0], host[1], landed)

    def _eviction(self) -> AbstractContextManager[Any]:
        if self._evicting is None:
            return nullcontext()
        self._evicting.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._evicting)


def attend_one_head(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of q [1, g, t, d], the last t of s tokens, over k, v [1, 1, s, d]."""
    new, total = q.shape[2], k.shape[2]
    if new == 1:  # the query heads of one KV head as rows of one head
        rows = scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale)
        return rows.transpose(1, 2)
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if new == total:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if q.is_cuda and q.dtype != torch.float32:
        mask: Any = causal_lower_right(new, total)
    else:  # no fused kernel takes a rectangle there
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _Layer(CacheLayerMixin):
    """Hands new keys and values on with a note of where the older ones are."""

    is_sliding = False

    def __init__(self, schedule: HeadSchedule, index: int) -> None:
        super().__init__()
        self.schedule, self.index, self.length = schedule, index, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.length += key_states.shape[2]
        setattr(key_states, _MARK, (self.schedule, self.index))
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def _attention_of_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, hq, t, d] over new key, value [1, h, t, d]."""
    mark = getattr(key, _MARK, None)
    if mark is None or attention_mask is not None or query.shape[0] != 1:
        raise InputError(
            f"attention {NAME!r} needs a ScheduleCache and one sequence without padding; it is "
            "there to be measured, not to be used"
        )
    schedule, layer = mark
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = schedule.attend(layer, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

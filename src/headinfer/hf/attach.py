# SPDX-License-Identifier: Apache-2.0
"""Attaches headinfer to a loaded model and detaches it again; no model code is touched.

Attaching sets the attention implementation and the prefill chunk size and adds one forward
pre-hook that supplies the cache wherever transformers would have started an empty one. The hook
also guards correctness: models that drop the cache they were given get a head-wise one again.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from typing_extensions import Unpack

from headinfer.budget import format_bytes
from headinfer.geometry import Geometry
from headinfer.hf.attention import NAME, register
from headinfer.hf.cache import CacheOptions, HeadCache, options_from
from headinfer.hf.geometry import geometry_of, resolve_budget, weight_bytes_of
from headinfer.hf.preflight import preflight
from headinfer.plan import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, Options, Plan, make_plan
from headinfer.progress import ForwardFinished, ForwardStarted, Observer
from headinfer.runner import Stats

_log = logging.getLogger(__name__)


def attach(
    model: PreTrainedModel,
    *,
    observer: Observer | None = None,
    **options: Unpack[CacheOptions],
) -> Session:
    """`model` keeps its keys and values head by head until the session is closed.

    Inside `with headinfer.attach(model) as run:` an unmodified `model.generate(...)` prefills in
    chunks and uses a `HeadCache`. Every option has a default the plan chooses.

    Args:
        model: a transformers decoder or encoder-decoder model, in place on its device(s).
        observer: receives an event per forward pass.
        options: see `CacheOptions`.

    Raises:
        InputError: an option that is not one, or an unusable value.
        BudgetTooSmall: with `expected_tokens` given, when the run does not fit.
        UnsupportedModel: the model's code or config rules streaming out; names the way round.
    """
    return Session(model, options, observer)


def plan_for(
    config: PreTrainedConfig,
    *,
    prompt_tokens: int,
    new_tokens: int = 0,
    batch: int = 1,
    device: str | None = None,
    weight_bytes: int = 0,
    **options: Unpack[CacheOptions],
) -> Plan:
    """The plan of a run that has not started; loads no weights.

    Args:
        config: a transformers config.
        prompt_tokens: prompt length.
        new_tokens: tokens to be generated.
        batch: sequences.
        device: "cuda" or "cpu"; default: "cuda" when gpu_memory is given or a GPU is there.
        weight_bytes: bytes of the weights on the device; 0 counts the cache alone.
        options: see `CacheOptions`.

    Raises:
        BudgetTooSmall: with the smallest budget that works.
        InputError: an unusable option.
    """
    rest: CacheOptions = {**options, "expected_tokens": prompt_tokens + new_tokens}
    record = options_from(rest)
    if device is None:
        wanted = record.budget.gpu_bytes is not None or torch.cuda.is_available()
        device = "cuda" if wanted else "cpu"
    if device == "cpu" or torch.cuda.is_available() or record.budget.gpu_bytes is None:
        there = device if device == "cpu" or torch.cuda.is_available() else "cpu"
        record = resolve_budget(record, torch.device(there))
    geometry = geometry_of(config, weight_bytes=weight_bytes)
    return make_plan(geometry, record, device=device, batch=batch)


class Session:
    """A model with headinfer attached; a context manager.

    Attributes:
        cache: the cache of the latest generation, None before the first.
        head_layers: layers kept head by head.
        warnings: what preflight found that may matter.
    """

    def __init__(
        self, model: PreTrainedModel, options: CacheOptions, observer: Observer | None
    ) -> None:
        register()
        self.model = model
        self.cache: HeadCache | None = None
        self._given = options
        self._options: Options = options_from(options)
        self._observer = observer
        self._started = 0.0
        self._closed = False
        self._first_plan: Plan | None = None
        self._geometry = self._geometry_now()
        self.head_layers = len(self._geometry.full_layers)
        if self._options.expected_tokens is not None:
            self._first_plan = self._make_plan(batch=1)
        self._attention = _attention_in_use(model)
        self._chunk = getattr(model.generation_config, "prefill_chunk_size", None)
        self.warnings = preflight(model, self._options)
        self._hooks: list[Any] = []
        try:
            self._enter()
        except BaseException:
            self.close()
            raise

    @property
    def plan(self) -> Plan | None:
        """What was decided; None until it is known (`expected_tokens`, or the first forward)."""
        if self.cache is not None and self.cache.plan is not None:
            return self.cache.plan
        return self._first_plan

    @property
    def stats(self) -> Stats:
        """Bytes held and moved by the latest generation."""
        return Stats() if self.cache is None else self.cache.stats()

    @property
    def materializes(self) -> bool:
        """The model's own attention runs on whole layers copied to the device."""
        return self._options.on_unsupported == "materialize" and not _uses_headinfer(self.model)

    def new_cache(self) -> HeadCache:
        """An empty cache with this session's options, to be passed as `past_key_values`."""
        config = _decoder_config(self.model)
        weights = self._geometry.weight_bytes
        self.cache = HeadCache(config, weight_bytes=weights, **self._given)
        return self.cache

    def close(self) -> None:
        """Restore the model; the caches of this session stay usable only with their handles."""
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        for config, implementation in self._attention:
            config._attn_implementation_internal = implementation
        if self.model.generation_config is not None:
            self.model.generation_config.prefill_chunk_size = self._chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _enter(self) -> None:
        if self._options.on_unsupported == "error" or self.model._can_set_attn_implementation():
            self.model.set_attn_implementation(NAME)
        if self.model.generation_config is not None:
            self.model.generation_config.prefill_chunk_size = self._chunk_tokens()
        self._hooks.append(
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        )
        self._hooks.append(self.model.register_forward_hook(self._after_forward, with_kwargs=True))
        kv = format_bytes(self._geometry.offloadable_bytes(1))
        _log.info(
            "headinfer attached to %s: %d of %d layers head by head, %s of keys and values a token",
            self._geometry.name,
            self.head_layers,
            len(self._geometry.layers),
            kv,
        )

    def _geometry_now(self) -> Geometry:
        device = self.model.device
        weights = weight_bytes_of(self.model, device)
        geometry = geometry_of(_decoder_config(self.model), weight_bytes=weights)
        return geometry

    def _make_plan(self, batch: int) -> Plan:
        options = resolve_budget(self._options, self.model.device)
        return make_plan(self._geometry, options, device=self.model.device.type, batch=batch)

    def _chunk_tokens(self) -> int:
        if self._first_plan is not None:
            return self._first_plan.chunk_tokens
        if self._options.chunk_tokens is not None:
            return self._options.chunk_tokens
        if self.model.device.type == "cuda":
            return self._make_plan(batch=1).chunk_tokens if self.head_layers else GPU_CHUNK_TOKENS
        return CPU_CHUNK_TOKENS

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("use_cache", True) and not module.training:
            given = kwargs.get("past_key_values")
            kwargs = {**kwargs, "past_key_values": self._supply(given)}
        self._started = time.perf_counter()
        if self._observer is not None:
            past, new = _lengths(kwargs)
            self._observer.on_event(ForwardStarted(past, new))
        return args, kwargs

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._observer is not None:
            seconds = time.perf_counter() - self._started
            past, new = _lengths(kwargs)
            self._observer.on_event(ForwardFinished(max(past - new, 0), new, seconds))

    def _supply(self, given: Any) -> Any:
        """A head-wise cache in the place of a missing or empty stock one."""
        if isinstance(given, EncoderDecoderCache):
            if _is_fresh(given.self_attention_cache):
                given.self_attention_cache = self.new_cache()
            return given
        if given is None:
            cache = self.new_cache()
            if self.model.config.is_encoder_decoder:
                return EncoderDecoderCache(cache, DynamicCache(config=_decoder_config(self.model)))
            return cache
        if _is_fresh(given):
            return self.new_cache()
        if isinstance(given, HeadCache):
            self.cache = given
        return given


def _is_fresh(cache: Any) -> bool:
    return type(cache) is DynamicCache and not cache.offloading and not _length(cache)


def _length(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no attention layer at all
        return 0


def _lengths(kwargs: dict[str, Any]) -> tuple[int, int]:
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else _length(cache)
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
        given = kwargs.get(name)
        if given is not None:
            return past, int(given.shape[1])
    return past, 0


def _decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    config: PreTrainedConfig = model.config
    return config


def _uses_headinfer(model: PreTrainedModel) -> bool:
    text = model.config.get_text_config(decoder=True)
    return bool(text._attn_implementation == NAME)


def _attention_in_use(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """Every config of the model and its parts with the implementation it names."""
    found: dict[int, PreTrainedConfig] = {}

    def visit(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                visit(getattr(config, name, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return [(config, config._attn_implementation) for config in found.values()]

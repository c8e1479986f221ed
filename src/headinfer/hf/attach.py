# SPDX-License-Identifier: Apache-2.0
"""Attaches headinfer to a loaded model and detaches it again; no model code is touched.

Attaching sets the attention implementation, prefills in chunks and adds one forward pre-hook that
supplies the cache wherever transformers would have started an empty one. The hook also guards
correctness: models that drop the cache they were given get a head-wise one again.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Self

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
from headinfer.cost import predict
from headinfer.errors import BudgetTooSmall, CacheStateError, InputError
from headinfer.geometry import Geometry
from headinfer.hf.attention import NAME, register
from headinfer.hf.backing import CacheOptions, options_from
from headinfer.hf.cache import HeadCache, has_states
from headinfer.hf.compared import Comparison, RequestClock, compare
from headinfer.hf.geometry import geometry_of, resolve_budget, weight_bytes_of
from headinfer.hf.graphs import StepGraphs
from headinfer.hf.pass_arguments import PassArguments
from headinfer.hf.passes import Passes, mark_on
from headinfer.hf.prefill import Prefill, length_of
from headinfer.hf.preflight import preflight
from headinfer.hf.remembered import known_rates
from headinfer.hf.step import CudaRecorder, Recorder
from headinfer.hf.weights import compute_device, on_one_device, weights_there
from headinfer.layer import Stats
from headinfer.options import Options
from headinfer.plan import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, Plan, make_plan
from headinfer.progress import Observer

_log = logging.getLogger(__name__)

SPARE_TOKENS = 4096
"""Of the new tokens a call may make, those that memory is set aside for beforehand: a limit is
often far above what is generated."""


def attach(
    model: PreTrainedModel,
    *,
    observer: Observer | None = None,
    batch_size: int | None = None,
    step_graphs: bool = True,
    **options: Unpack[CacheOptions],
) -> Session:
    """`model` keeps its keys and values head by head until the session is closed.

    Inside `with headinfer.attach(model) as run:` an unmodified `model.generate(...)` prefills in
    chunks and uses a `HeadCache`. Every option has a default the plan chooses.

    Args:
        model: a transformers decoder or encoder-decoder model, in place on its device(s).
        observer: receives an event per forward pass.
        batch_size: sequences at once, beams counted, for the plan made with `expected_tokens`
            before the first forward pass, which tells by itself; default 1.
        step_graphs: on CUDA, record what lies between the attention calls of a decode step as
            graphs and replay it, after checking that a replayed step agrees with the model's own;
            `session.graphs.refused` says why that is not done for a model. False leaves every
            step to the model's code.
        options: see `CacheOptions`.

    Raises:
        InputError: an option that is not one, or an unusable value.
        BudgetTooSmall: with `expected_tokens` given, when the run does not fit.
        UnsupportedModel: the model's code or config rules streaming out; names the way round.
    """
    return Session(model, options, observer, batch_size, step_graphs=step_graphs)


class Session:
    """A model with headinfer attached; a context manager.

    Attributes:
        cache: the cache of the latest generation, None before the first.
        head_layers: layers kept head by head.
        warnings: what preflight found that may matter.
        graphs: replays decode steps; None unless asked for on a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: CacheOptions,
        observer: Observer | None,
        batch_size: int | None = None,
        *,
        step_graphs: bool = True,
    ) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"batch_size={batch_size!r} is not usable; give a whole number >= 1")
        register()
        if session_of(model) is not None:
            raise InputError(
                f"{type(model).__name__} has headinfer attached already; a second session would "
                "not be used. Close the first one (leave its `with` block, or call close())"
            )
        self.model = model
        self._device = compute_device(model)
        self.cache: HeadCache | None = None
        self._given = options
        self._options: Options = options_from(options)
        self._clock = RequestClock(observer)
        self._passes = Passes(self._clock, mark_on(self._device))
        self._batch = batch_size or 1
        self._closed = False
        self._first_plan: Plan | None = None
        self._length: tuple[int, int] | None = None
        self._chunk: int | None = None
        self._geometry = self._geometry_now()
        self.head_layers = len(self._geometry.full_layers)
        self._cache_layers = len(DynamicCache(config=_decoder_config(model)).layers)
        if self._options.expected_tokens is not None:
            self._first_plan = self._make_plan()
            self._chunk = self._first_plan.chunk_tokens
        self._attention = _attention_in_use(model)
        self.warnings = preflight(model, self._options)
        self._arguments = PassArguments(model)
        self.graphs: StepGraphs | None = None
        self._step_graphs = step_graphs
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
    def compared(self) -> Comparison | None:
        """Predicted and measured figures of the latest generation, side by side; None before the
        first. The GPU's peak is that of the process since its statistics were last reset."""
        plan = self.plan
        if plan is None:
            return None
        self._passes.flush()
        rates = known_rates(self._device, self.model.dtype, plan.disk)
        tokens = self._clock.prompt_tokens
        said = None if rates is None or not tokens else predict(plan, rates, prompt_tokens=tokens)
        peak = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        return compare(plan, self.stats, self._clock, said, peak)

    @property
    def materializes(self) -> bool:
        """The model's own attention runs on whole layers copied to the device."""
        return self._options.on_unsupported == "materialize"

    def new_cache(self, **options: Unpack[CacheOptions]) -> HeadCache:
        """An empty cache with this session's options, or others, to be passed to the model."""
        config = _decoder_config(self.model)
        size, more = self._geometry.weight_bytes, self._geometry.weights
        given: CacheOptions = {**self._given, **options}
        if "expected_tokens" in options and "new_tokens" not in options:
            given["new_tokens"] = None  # the session's are part of another length
        self.cache = HeadCache(config, weight_bytes=size, weights=more, **given)
        self.cache.backing.chunk = self._chunk
        self.cache.backing.one_device = on_one_device(self.model)
        return self.cache

    def replay_with(self, recorder: Callable[[], Recorder]) -> None:
        """Decode steps are recorded by `recorder` from now on."""
        self.graphs = StepGraphs(self.model, recorder)
        if not self.graphs.refused:
            self.model.forward = self.graphs

    def save(self, path: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
        """The context of the latest generation is on disk at `path`; see `headinfer.save_context`.

        Raises:
            CacheStateError: there is none yet.
            SnapshotError: it cannot be saved there.
        """
        if self.cache is None:
            raise CacheStateError("there is nothing to save before the first forward pass")
        from headinfer.hf.contexts import save_context

        save_context(self.model, self.cache, path, tokenizer=tokenizer)

    def close(self) -> None:
        """Restore the model; the caches of this session stay usable only with their handles."""
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        self.model.__dict__.pop("_prefill", None)
        if self.graphs is not None and self.model.__dict__.get("forward") is self.graphs:
            del self.model.forward
        for config, implementation in self._attention:
            config._attn_implementation_internal = implementation
        self._passes.flush()  # last: an observer may raise, and the model is restored by then

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A closed session: the copy of an attached model is a plain one.

        Nobody would hold the session of the copy, and so nobody could close it.
        """
        for config, implementation in self._attention:
            copy.deepcopy(config, memo)._attn_implementation_internal = implementation
        twin = Session.__new__(Session)
        twin._closed = True
        return twin

    def __reduce__(self) -> NoReturn:
        raise InputError(
            f"{type(self.model).__name__} has headinfer attached and cannot be pickled: plan and "
            "memory belong to this process. Close the session first (leave its `with` block, or "
            "call close()), and attach again where the model is loaded"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._passes.drop()  # an observer that raised now would hide `error`
        self.close()

    def _enter(self) -> None:
        # Materializing hands whole layers to the model's own attention, which stays as it is.
        if self._options.on_unsupported == "error":
            self.model.set_attn_implementation(NAME)
        if hasattr(type(self.model), "_prefill"):
            self.model._prefill = Prefill(
                self.model, self._chunk_tokens(), self._announced, lambda: self.cache
            )
        if self._step_graphs and self._device.type == "cuda" and not self.materializes:
            self.replay_with(CudaRecorder)
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

    def _announced(self, prompt: int, most: int, batch: int) -> int | None:
        """`generate()` is about to read `prompt` tokens and may reach `most`: the chunk for that.

        The cache made next is planned with this very chunk: what is resident has to fit beside the
        forward passes that really come.
        """
        known = self._options.expected_tokens
        if known is None:
            most = min(most, prompt + max(prompt, SPARE_TOKENS))
            self._length = prompt, most
        if self._options.chunk_tokens is not None or not self.head_layers:
            return None
        if known is None or batch != self._batch:
            self._chunk = self._chunk_for(prompt, [known] if known else [most, prompt], batch)
        return self._chunk

    def _chunk_for(self, prompt: int, lengths: list[int], batch: int) -> int | None:
        """The chunk that is planned for the first of these lengths that fits, of which `prompt` tokens
        are read at once; None if none does: the cache will say so, with the whole story."""
        options = resolve_budget(self._options, self._device)
        for tokens in lengths:
            try:
                asked = replace(options, expected_tokens=tokens)
                if options.expected_tokens is None:
                    new = options.new_of(prompt, tokens) if tokens > prompt else None
                    asked = replace(asked, new_tokens=new)
                plan = make_plan(self._geometry, asked, device=self._device.type, batch=batch)
            except BudgetTooSmall:
                continue
            return plan.chunk_tokens
        return None

    def _geometry_now(self) -> Geometry:
        device = self._device
        weights = weight_bytes_of(self.model, device)
        more = weights_there(self.model)
        geometry = geometry_of(_decoder_config(self.model), weight_bytes=weights, weights=more)
        dtype = self.model.dtype
        kind = str(dtype).removeprefix("torch.")
        return replace(geometry, itemsize=dtype.itemsize, dtype=kind)

    def _make_plan(self) -> Plan:
        options = resolve_budget(self._options, self._device)
        return make_plan(self._geometry, options, device=self._device.type, batch=self._batch)

    def _chunk_tokens(self) -> int:
        if self._first_plan is not None:
            return self._first_plan.chunk_tokens
        if self._options.chunk_tokens is not None:
            return self._options.chunk_tokens
        if self._device.type == "cuda":
            return self._make_plan().chunk_tokens if self.head_layers else GPU_CHUNK_TOKENS
        return CPU_CHUNK_TOKENS

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._closed:  # the hook of a copied model
            return args, kwargs
        named = self._arguments.named(args, kwargs)
        if self._arguments.caches(named) and not module.training:
            cache = self._supply(self._arguments.cache_among(named))
            self._note_tokens(named, cache)
            args, kwargs = self._arguments.with_cache(args, kwargs, cache)
            named = self._arguments.named(args, kwargs)
        self._passes.begin(*self._arguments.lengths(named))
        return args, kwargs

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._closed:
            return
        if self.cache is not None:
            self.cache.log.passing = False
        past, new = self._arguments.lengths(self._arguments.named(args, kwargs))
        self._passes.end(max(past - new, 0), new)

    def _note_tokens(self, named: dict[str, Any], cache: Any) -> None:
        if isinstance(cache, HeadCache):
            ids = named.get("input_ids")
            cache.log.note(length_of(cache), ids, named.get("attention_mask"))

    def _supply(self, given: Any) -> Any:
        """The cache of a forward pass, which learns the length if `generate()` told."""
        used = self._cache_for(given)
        if self._length is not None and self.cache is not None and self.cache.plan is None:
            self.cache.backing.length = self._length
        self._length = None  # meant for this pass and its cache alone
        return used

    def _cache_for(self, given: Any) -> Any:
        """A head-wise cache in the place of a missing or empty stock one."""
        if isinstance(given, EncoderDecoderCache):
            if _is_fresh(given.self_attention_cache):
                given.self_attention_cache = self._cache_for(given.self_attention_cache)
            elif isinstance(given.self_attention_cache, HeadCache):
                self.cache = self._checked(given.self_attention_cache)
            return given
        if given is None:
            cache = self.new_cache()
            if self.model.config.is_encoder_decoder:
                return EncoderDecoderCache(cache, DynamicCache(config=_decoder_config(self.model)))
            return cache
        if _is_fresh(given):
            cache = self.new_cache()
            if any(getattr(layer, "record_past", False) for layer in given.layers):
                cache.activate_past_recording()  # assisted decoding will want to go back
            return cache
        if isinstance(given, HeadCache):
            self.cache = self._checked(given)
        return given

    def _checked(self, cache: HeadCache) -> HeadCache:
        """A cache of this model."""
        if cache.layer_class_to_replicate is None and len(cache.layers) != self._cache_layers:
            raise CacheStateError(
                f"{type(self.model).__name__} has {self._cache_layers} layers and is given a cache "
                f"made for {len(cache.layers)}; make one from its own config: "
                "HeadCache(model.config), or new_cache() of its session"
            )
        return cache


def session_of(model: nn.Module) -> Session | None:
    """The session attached to `model`, if there is one."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Session) and not owner._closed:
            return owner
    return None


def _is_fresh(cache: Any) -> bool:
    if type(cache) is not DynamicCache or cache.offloading or length_of(cache):
        return False
    return not any(has_states(layer) for layer in cache.layers)


def _decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    config: PreTrainedConfig = model.config
    return config


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

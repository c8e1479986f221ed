# SPDX-License-Identifier: Apache-2.0
"""Decode steps replayed piece by piece instead of run by the model's Python code.

A decode step of a stock model is limited by launching some fifty kernels a layer, not by what they
do. Between two attention calls nothing depends on the context, so these pieces are recorded once
per shape (as CUDA graphs) and replayed; stores and attention run as always, but for layers whose heads
are all resident: those are recorded too, with kernels that find keys by a table, so that one piece
goes through all of them. The first step of a shape runs as ever: nobody waits longer for it, and it may be the only one. The step after the recording
runs both ways and must agree, which finds whatever the model's code derives from
positions in Python; a model that cannot be recorded or does not agree goes on as before.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from headinfer.attention.masks import Causal, MaskRecipe, PaddedCausal, Padding
from headinfer.attention.placed import PlaceTable
from headinfer.errors import GpuOutOfMemory, TierError, TransferError
from headinfer.hf.cache import HeadCache, HeadLayer
from headinfer.hf.cache_name import NAMES, cache_given, cache_name
from headinfer.hf.step import Call, CudaRecorder, Piece, Recorder, Step, StepRefused, activated

_log = logging.getLogger(__name__)

MOST_TOKENS = 16
MOST_SHAPES = 4
"""Shapes of decode steps recorded per model: batches of beams, speculative tokens."""
MOST_WAYS = 2
"""... and of each of them, steps that go through different layers: two contexts may take turns."""
MOST_SEEN = 64
CAPTURING = "transformers.utils.output_capturing"
_OF_MEMORY = (torch.OutOfMemoryError, GpuOutOfMemory, TierError, TransferError)
"""What these say is true of the step however it is run, and nothing of its recording."""
AGREE = 8
"""Roundings by which a replayed step may differ from the model's own: another order of sums."""


@dataclass(slots=True)
class _Recorded:
    """A recorded step, the tensors that feed it and those that it leaves; `None` stands for the
    cache, which is not kept: it would outlive the generation that it belongs to.

    Attributes:
        read: where it finds keys and their number; kept, as a graph knows addresses only.
    """

    inputs: dict[str, Tensor]
    pieces: list[Piece]
    calls: list[Call]
    kind: type
    output: dict[str, Tensor | None]
    read: tuple[dict[int, Tensor], Tensor | None]
    checked: bool = False


class StepGraphs:
    """Stands in for `model.forward` while a session lasts; restored by deleting the attribute.

    Attributes:
        refused: why steps are not replayed; empty while they are, or may be.
        replayed: steps replayed so far.
    """

    def __init__(
        self, model: PreTrainedModel, recorder: Callable[[], Recorder] = CudaRecorder
    ) -> None:
        self._model = model
        self._forward = model.forward
        self._recorder = recorder
        self._steps: dict[tuple[Any, ...], _Recorded] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._names = set(inspect.signature(model.forward).parameters)
        self._modules = tuple(model.modules())
        self._hooks = _hooks_of(self._modules)
        self._recorded_from = _state_of(model)
        self._looked = True
        self._tables: dict[torch.device, PlaceTable] = {}
        self.refused = _why_not(model)
        self.replayed = 0
        functools.update_wrapper(self, model.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied model is a plain one: its session stays with the original.
        return functools.partial(type(self._model).forward, copy.deepcopy(self._model, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._recordable(args, kwargs)
        if given is None:
            self._looked = False
            return self._forward(*args, **kwargs)
        self._look()
        if self.refused:
            return self._forward(*args, **kwargs)
        cache, ids = cache_given(kwargs), given["input_ids"]
        length = int(cache.get_seq_length())
        recipe = _recipe(kwargs.get("attention_mask"), length, ids.shape[1])
        places = self._places(cache, recipe, ids, length)
        how = tuple(sorted(_others(kwargs).items()))
        key = (tuple(ids.shape), ids.device, tuple(given), how, tuple(places))
        found = self._steps.get(key)
        if found is None and not self._comes_again(key):
            return self._forward(*args, **kwargs)
        try:
            if found is None:
                return self._record(key, kwargs, given, recipe, length, places)
            if not found.checked:
                return self._check(found, kwargs, given, recipe, length)
        except (StepRefused, RuntimeError) as error:
            if isinstance(error, _OF_MEMORY):
                raise
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())}")
            self._go_back(cache, length)
            return self._forward(*args, **kwargs)
        return self._replay(found, cache, given, recipe)

    def _places(
        self, cache: HeadCache, recipe: MaskRecipe, ids: Tensor, length: int
    ) -> dict[int, Tensor]:
        """The layers that a recorded step goes through, and where the device finds their keys."""
        runner = cache.backing.runner
        if runner is None or type(recipe) is not Causal:
            return {}
        found = runner.places(ids.shape[1], batch=ids.shape[0])
        if not found:
            return {}
        table = self._tables.get(ids.device)
        if table is None:
            table = self._tables[ids.device] = PlaceTable(ids.device)
        table.length.fill_(length)
        return {index: table.row(index, place) for index, place in found.items()}

    def _comes_again(self, key: tuple[Any, ...]) -> bool:
        """Whether a step like this one was seen before, and there is room to record it."""
        *shape, _ = key
        shapes = {tuple(recorded[:-1]) for recorded in self._steps}
        if tuple(shape) not in shapes and len(shapes) >= MOST_SHAPES:
            return False
        if key in self._seen:
            return True
        if len(self._seen) >= MOST_SEEN:  # a caller who passes something else with every step
            self._seen.clear()
        self._seen.add(key)
        return False

    def _recordable(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor] | None:
        """The tensors that a recorded step reads; None if this pass is not one."""
        ids, cache = kwargs.get("input_ids"), cache_given(kwargs)
        if (
            self.refused
            or args
            or not isinstance(ids, Tensor)
            or ids.dim() != 2
            or ids.shape[1] > MOST_TOKENS
            or torch.is_grad_enabled()
            or self._model.training
            or type(cache) is not HeadCache
            or not all(type(layer) is HeadLayer and layer.length for layer in cache.layers)
        ):
            return None
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return None
        if any(not isinstance(value, (bool, int, str)) for value in _others(kwargs).values()):
            return None
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            return None
        if any(self._hooks) and any(map(_watched, self._modules[1:])):
            return None  # somebody watches: nothing would be seen of a replayed step
        length = int(cache.get_seq_length())
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, length + ids.shape[1], device=ids.device)
            positions = positions.expand(ids.shape[0], -1)
        if positions.dim() != 2:
            return None
        found = {"input_ids": ids, "position_ids": positions}
        if "cache_position" in self._names:
            found["cache_position"] = torch.arange(length, length + ids.shape[1], device=ids.device)
        return found

    def _look(self) -> None:
        """Between generations a model may have been given other weights or modules: what was recorded
        from the old ones goes. Once per generation, as it takes as long as a small layer."""
        if self._looked:
            return
        self._looked = True
        self._hooks = _hooks_of(self._modules)
        state = _state_of(self._model)
        if state != self._recorded_from:
            self._recorded_from = state
            self._modules = tuple(self._model.modules())
            self._hooks = _hooks_of(self._modules)
            self._steps.clear()
            self._seen.clear()
            self.refused = _why_not(self._model, ours=self)

    def _record(
        self,
        key: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[str, Tensor],
        recipe: MaskRecipe,
        length: int,
        places: dict[int, Tensor],
    ) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            inputs = {name: value.clone() for name, value in given.items()}
        table = self._tables.get(inputs["input_ids"].device)
        before = None if table is None else table.length
        step = Step(recipe, length, self._recorder(), places, before)
        # In this order: a recording that failed is ended on the stream that it was begun on.
        with _side_stream(inputs["input_ids"].device), activated(step):
            step.begin()
            output = self._forward(**{**kwargs, **inputs, "attention_mask": None})
            step.finish()
        cache = cache_given(kwargs)
        recorded = _Recorded(
            inputs, step.pieces, step.calls, type(output), _tensors(output), (places, before)
        )
        self._make_room(key)
        self._steps[key] = recorded
        return _fresh(recorded, cache)

    def _make_room(self, key: tuple[Any, ...]) -> None:
        """Of a shape's steps through other layers the oldest goes: kernels have been compiled since, a
        context has outgrown its memory, heads have left the device."""
        others = [recorded for recorded in self._steps if recorded[:-1] == key[:-1]]
        if len(others) >= MOST_WAYS:
            del self._steps[others[0]]

    def _check(
        self,
        recorded: _Recorded,
        kwargs: dict[str, Any],
        given: dict[str, Tensor],
        recipe: MaskRecipe,
        length: int,
    ) -> Any:
        """The model's own step, and the recorded one fed with its attention: equal everywhere."""
        watched = Step(recipe, length)
        with activated(watched):
            output = self._forward(**{**kwargs, **given, "attention_mask": None})
        watched.finish()
        _load(recorded.inputs, given)
        if len(watched.calls) != len(recorded.calls):
            raise StepRefused("the model's steps differ from each other")
        pieces, passed = iter(recorded.pieces), list[tuple[Call, Call]]()
        for mine, theirs in zip(recorded.calls, watched.calls, strict=True):
            passed.append((mine, theirs))
            if not mine.inside:
                next(pieces).replay()
                _compare_calls(passed)
                mine.out.copy_(theirs.out)
        next(pieces).replay()
        _compare_calls(passed)
        for name, value in output.items():
            again = recorded.output.get(name)
            if isinstance(value, Tensor) and again is not None:
                _compare(name, again, value)
        recorded.checked = True
        return output

    def _replay(
        self,
        recorded: _Recorded,
        cache: HeadCache,
        given: dict[str, Tensor],
        recipe: MaskRecipe,
    ) -> Any:
        _load(recorded.inputs, given)
        pieces, tokens = iter(recorded.pieces), given["input_ids"].shape[1]
        inside: list[Any] = []
        for call in recorded.calls:
            layer = cache.layers[call.index]
            if call.inside:
                inside.append(layer)
                continue
            _replay_piece(next(pieces), inside, tokens)
            layer.store(call.keys, call.values)
            call.out.copy_(layer.attend(layer.length, replace(call.query, recipe=recipe)))
        _replay_piece(next(pieces), inside, tokens)
        self.replayed += 1
        return _fresh(recorded, cache)

    def _give_up(self, why: str) -> None:
        self.refused = why
        self._steps.clear()
        self._seen.clear()
        _log.info("decode steps of %s are not replayed: %s", type(self._model).__name__, why)

    def _go_back(self, cache: HeadCache, length: int) -> None:
        for layer in cache.head_layers:
            if layer.length > length:
                layer.crop(length - layer.length)


def _replay_piece(piece: Piece, inside: list[Any], tokens: int) -> None:
    """The layers that it goes through, `inside`, hold the new tokens from then on; the list is empty then."""
    piece.replay()
    for layer in inside:
        layer.extend(tokens)
    inside.clear()


def _others(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a pass is given besides tokens, places and cache: it has to be the same in every step."""
    known = {"input_ids", "position_ids", "cache_position", "attention_mask", *NAMES}
    return {
        name: value for name, value in kwargs.items() if name not in known and value is not None
    }


def _hooks_of(modules: tuple[Any, ...]) -> list[dict[int, Any]]:
    """Where modules below the model keep their hooks: looking into these takes no time to speak of."""
    kept = ((module._forward_hooks, module._forward_pre_hooks) for module in modules[1:])
    return [hooks for pair in kept for hooks in pair]


def _watched(module: Any) -> bool:
    """Whether somebody's hook is called with what `module` computes. Those that transformers leaves
    behind act only in passes that are asked for hidden states or attentions."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != CAPTURING for hook in hooks)


def _state_of(model: Any) -> tuple[int, ...]:
    """Which modules the model is made of, and where its weights lie."""
    modules = (id(module) for module in model.modules())
    return (*modules, *(weight.data_ptr() for weight in model.parameters()))


def _why_not(model: Any, *, ours: Any = None) -> str:
    if model.__dict__.get("forward") is not ours:
        return "something stands in for the model's forward already"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder"
    if not {"input_ids", "position_ids", cache_name(model)} <= set(
        inspect.signature(model.forward).parameters
    ):
        return "the model takes no position_ids"
    if len({weight.device for weight in model.parameters()}) != 1:
        return "its weights are on several devices"
    for name, module in model.named_modules():
        if name and hasattr(module, "_hf_hook"):
            return f"{name} has a hook of accelerate's"
    return ""


def _recipe(mask: Tensor | None, length: int, tokens: int) -> MaskRecipe:
    if mask is not None:
        padding = Padding(mask.to(torch.bool), length + tokens)
        if padding.hides:
            return PaddedCausal(length, padding)
    return Causal(length)


def _load(inputs: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    for name, value in given.items():
        inputs[name].copy_(value)


def _compare_calls(passed: list[tuple[Call, Call]]) -> None:
    """What the model computed for each call, recorded and not, and what came of it; the list is empty
    then."""
    for mine, theirs in passed:
        for name in ("keys", "values"):
            _compare(f"{name} of layer {mine.index}", getattr(mine, name), getattr(theirs, name))
        _compare(f"queries of layer {mine.index}", mine.query.q, theirs.query.q)
        if mine.inside:
            _compare(f"attention of layer {mine.index}", mine.out, theirs.out)
    passed.clear()


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    if torch.equal(found, expected):
        return
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((found.double() - expected.double()).abs().max())
    if not error <= AGREE * torch.finfo(expected.dtype).eps * largest:
        raise StepRefused(f"{what} differ by {error:.1e} when the step is replayed")


def _tensors(output: Any) -> dict[str, Tensor | None]:
    for name, value in output.items():
        if not isinstance(value, (Tensor, Cache)):
            raise StepRefused(f"the model returns {name}, a {type(value).__name__}")
    return {name: value if isinstance(value, Tensor) else None for name, value in output.items()}


def _fresh(recorded: _Recorded, cache: HeadCache) -> Any:
    """An output like the recorded one that later steps leave alone."""
    fields = {
        name: cache if value is None else value.clone() for name, value in recorded.output.items()
    }
    return recorded.kind(**fields)


def _side_stream(device: torch.device) -> Any:
    """Where recording is allowed: on CUDA any stream but the default one."""
    if device.type != "cuda":
        return torch.no_grad()
    return _Side(device)


class _Side:
    """Another stream that begins after this one and that this one goes on after."""

    def __init__(self, device: torch.device) -> None:
        self._outer = torch.cuda.current_stream(device)
        self._stream = _recording_stream(device)
        self._inner = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(self._outer)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.wait_stream(self._stream)


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device that steps are recorded on: cuBLAS keeps a workspace (32 MiB on
    Hopper) for every stream that it has seen, for good."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # here the workspace is not part of any recording's memory
        one = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
        torch.mm(one, one)
    return stream

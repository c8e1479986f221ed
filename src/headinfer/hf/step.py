# SPDX-License-Identifier: Apache-2.0
"""A decode step cut at its attention calls: what lies between two of them is recorded once, and
through those of layers whose keys the device finds by itself.

While a step object is active, the cache and the attention function hand their calls to it. Knows
neither graphs nor models: `headinfer.hf.graphs` decides when a step is recorded, checked, replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from headinfer.attention import placed
from headinfer.attention.masks import MaskRecipe
from headinfer.resident_decode import attends_at_places
from headinfer.totals import Query


class StepRefused(Exception):
    """This step cannot be recorded; never leaves `headinfer.hf`."""


class Piece(Protocol):
    """Recorded work on tensors that stay where they are."""

    def replay(self) -> None:
        """Do it again, on what the tensors it reads hold now."""
        ...


class Recorder(Protocol):
    """Records what is enqueued between `begin` and `end`; it may or may not run meanwhile."""

    def begin(self) -> None: ...

    def end(self) -> Piece: ...

    def include(self, work: Callable[[], None]) -> None:
        """Record kernels that `work` enqueues; they read and write tensors made before."""
        ...

    def abandon(self) -> None:
        """Stop recording, if that was begun, after an error."""
        ...


class StepLayer(Protocol):
    """What a step needs of a cache layer."""

    index: int

    def store(self, keys: Tensor, values: Tensor) -> None: ...

    def extend(self, tokens: int) -> None: ...

    def attend(self, length: int, query: Query) -> Tensor: ...


@dataclass(slots=True)
class Call:
    """One attention call of a step: the tensors that pieces write (q, k, v) and read (out).

    Attributes:
        inside: stored and attended within a piece, which writes `out` too.
    """

    index: int
    keys: Tensor
    values: Tensor
    query: Query
    out: Tensor
    inside: bool = False


@dataclass(slots=True)
class Step:
    """A step under way: stores and attends as always, and keeps what is needed to do it again.

    Attributes:
        recipe: the mask of every layer; the model's own masks are not made.
        length: tokens before the step.
        recorder: records between the calls; None only watches.
        places: of layers that are attended within a piece, where the device knows their keys to be.
        before: [1] tokens before the step, where the device knows it.
        calls: what was asked, in order.
        pieces: what was recorded, one more than calls outside of them once `finish` was called.
    """

    recipe: MaskRecipe
    length: int
    recorder: Recorder | None = None
    places: Mapping[int, Tensor] = field(default_factory=dict)
    before: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    _given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self) -> None:
        if self.recorder is not None:
            self.recorder.begin()

    def finish(self) -> None:
        self._cut()
        if self._given:
            raise StepRefused(f"layers {sorted(self._given)} were given keys and never attended")

    def update(self, layer: StepLayer, keys: Tensor, values: Tensor) -> None:
        """Keys and values of a layer exist from the end of this piece on."""
        if layer.index in self._given or any(call.index == layer.index for call in self.calls):
            raise StepRefused(f"layer {layer.index} is given keys twice in a step")
        self._given[layer.index] = keys, values

    def attend(self, layer: StepLayer, query: Query) -> Tensor:
        """Attention over everything before this step and in it, [b, t, h, d]."""
        if layer.index not in self._given:
            raise StepRefused(f"layer {layer.index} attends without new keys")
        if query.expand is not None:
            raise StepRefused("latent keys are expanded by the model's own code")
        keys, values = self._given.pop(layer.index)
        if self.recorder is not None and layer.index in self.places and attends_at_places(query):
            return self._attend_inside(self.recorder, layer, keys, values, query)
        self._cut()
        layer.store(keys, values)
        length = self.length + keys.shape[2]
        query = replace(query, recipe=self.recipe)
        found = layer.attend(length, query)
        with torch.inference_mode(False), torch.no_grad():
            out = torch.empty(found.shape, dtype=found.dtype, device=found.device)
        out.copy_(found)
        if self.recorder is None:  # somebody compares later: what the model goes on with may change
            keys, values, query = keys.clone(), values.clone(), replace(query, q=query.q.clone())
        self.calls.append(Call(layer.index, keys, values, query, out))
        self.begin()
        return out

    def _attend_inside(
        self, recorder: Recorder, layer: StepLayer, keys: Tensor, values: Tensor, query: Query
    ) -> Tensor:
        """The piece goes on through this layer."""
        place, before = self.places[layer.index], self.before
        if before is None:
            raise StepRefused(f"layer {layer.index} has a place and no length")
        query = replace(query, q=query.q.contiguous(), recipe=self.recipe)
        shape = (*query.q.shape[:3:2], query.q.shape[1], query.value_dim)
        out = torch.empty(shape, dtype=query.q.dtype, device=query.q.device)

        def work() -> None:
            placed.store(keys, values, place, before)
            placed.attend(
                query.q,
                place,
                before,
                out,
                kv_heads=keys.shape[1],
                scale=query.scale,
                softcap=query.softcap,
            )

        recorder.include(work)
        layer.extend(keys.shape[2])
        self.calls.append(Call(layer.index, keys, values, query, out, inside=True))
        return out

    def _cut(self) -> None:
        if self.recorder is not None:
            piece = self.recorder.end()
            piece.replay()
            self.pieces.append(piece)


_active: Step | None = None


def active_step() -> Step | None:
    """The step that cache and attention hand their calls to, if there is one."""
    return _active


@contextlib.contextmanager
def activated(step: Step) -> Iterator[None]:
    """`step` is active; one at a time, on the thread that runs the model."""
    global _active
    if _active is not None:
        raise StepRefused("a step is under way already")
    _active = step
    try:
        yield
    except BaseException:
        if step.recorder is not None:
            step.recorder.abandon()
        raise
    finally:
        _active = None


class CudaRecorder:
    """CUDA graphs in one memory pool: what a piece leaves for later ones stays where it is."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Piece:
        if self._graph is None:
            raise StepRefused("nothing was begun")
        graph, self._graph = self._graph, None
        graph.capture_end()
        return graph

    def include(self, work: Callable[[], None]) -> None:
        work()  # whatever is enqueued is recorded

    def abandon(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            with contextlib.suppress(RuntimeError):  # an invalidated capture ends with an error
                graph.capture_end()

# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs do, without CUDA: operations recorded with the tensors they use, and run again
on what these hold by then. Whatever Python computed while recording stays as it was, as it does in
a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from headinfer.hf.step import Piece, StepRefused


class TapePiece:
    """Operations in order, with their arguments and what they returned."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._recorded_now = True

    def replay(self) -> None:
        if self._recorded_now:  # the operations ran while they were recorded
            self._recorded_now = False
            return
        with torch.inference_mode():
            for function, args, kwargs, before in self.operations:
                after = function(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    same = isinstance(old, Tensor) and old.data_ptr() == new.data_ptr()
                    if isinstance(old, Tensor) and not same:  # a view holds the new values already
                        old.copy_(new)


class TapeRecorder:
    """A `Recorder` on the CPU. Refuses what a graph could not record: a value read by the host."""

    HOST_READS = ("aten._local_scalar_dense", "aten.nonzero")

    def __init__(self) -> None:
        self._mode: _Tape | None = None

    def begin(self) -> None:
        self._mode = _Tape(self.HOST_READS)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> Piece:
        mode, self._mode = self._mode, None
        if mode is None:
            raise StepRefused("nothing was begun")
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return mode.piece

    def include(self, work: Callable[[], None]) -> None:
        if self._mode is None:
            raise StepRefused("nothing was begun")
        with _disable_current_modes():  # its kernels are no operations of torch
            work()
        self._mode.piece.operations.append((work, (), {}, None))

    def abandon(self) -> None:
        if self._mode is not None:
            self.end()


class _Tape(TorchDispatchMode):
    def __init__(self, host_reads: tuple[str, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.piece = TapePiece()
        self._host_reads = host_reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if str(func).startswith(self._host_reads):
            raise RuntimeError(f"{func} is not permitted while a stream is capturing")
        found = func(*args, **(kwargs or {}))
        self.piece.operations.append((func, args, kwargs or {}, found))
        return found

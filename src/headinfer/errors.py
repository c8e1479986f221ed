# SPDX-License-Identifier: Apache-2.0
"""Every error headinfer raises on purpose, and when a caller would catch it.

    HeadInferError                      anything below
    ├── InputError (ValueError)         what the user gave cannot be used: a size, a file, a prompt
    ├── PlanError (ValueError)          the request cannot be placed
    │   ├── BudgetTooSmall              ... in this much memory; names the smallest that works
    │   └── UnsupportedModel            ... because of the model's own code or config
    ├── UnsupportedAttention (NotImplementedError)   an attention call no implementation can run
    ├── HandleError (RuntimeError)      model code did arithmetic on keys or values held elsewhere
    ├── CacheStateError (RuntimeError)  the cache was used in a way its contents do not allow
    ├── GpuOutOfMemory (RuntimeError)   ... during a prefill; the cache stays usable
    ├── TierError (RuntimeError)        memory of a tier
    │   ├── TierFull                    ... is used up; carries the numbers
    │   ├── DiskError                   ... could not be read or written; names layer, head, tokens
    │   └── TierClosed                  ... was used after close
    ├── SnapshotError (RuntimeError)    a saved context
    │   ├── SnapshotMismatch            ... was made by another model; carries what differs
    │   ├── SnapshotCorrupt             ... is damaged; names the file
    │   ├── SnapshotLocked              ... is being written by another process
    │   └── SnapshotWriteError          ... could not be written; what was durable stays
    └── TransferError (RuntimeError)    a copy between tiers did not complete

Messages have four parts: what was asked, the numbers, why it cannot be, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class HeadInferError(Exception):
    """Base class of all errors raised on purpose by headinfer."""


class InputError(HeadInferError, ValueError):
    """The user's input cannot be used; the message says what would be accepted."""


class PlanError(HeadInferError, ValueError):
    """The request cannot be placed on this machine as asked."""


class BudgetTooSmall(PlanError):
    """A memory budget is smaller than the least that works.

    Attributes:
        tier: "gpu", "host" or "disk".
        budget_bytes: what was allowed.
        needed_bytes: the smallest budget of this tier that works for the same request.
    """

    def __init__(self, message: str, *, tier: str, budget_bytes: int, needed_bytes: int) -> None:
        super().__init__(message)
        self.tier = tier
        self.budget_bytes = budget_bytes
        self.needed_bytes = needed_bytes


class UnsupportedModel(PlanError):
    """The model's code or config rules head-wise streaming out; the message names the way round."""


class UnsupportedAttention(HeadInferError, NotImplementedError):
    """No attention implementation can run this call.

    Attributes:
        reasons: one line per implementation (or per offending argument).
    """

    def __init__(self, message: str, *, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)


class HandleError(HeadInferError, RuntimeError):
    """Code outside headinfer computed on a key, value or mask handle."""


class CacheStateError(HeadInferError, RuntimeError):
    """The cache cannot do what was asked in its present state."""


class GpuOutOfMemory(HeadInferError, RuntimeError):
    """The GPU ran out of memory during a prefill; the cache holds what was complete.

    Attributes:
        chunk_tokens: tokens of the forward pass that failed.
        complete_tokens: tokens the cache holds.
        remedy_chunk_tokens: a chunk that takes about half of the memory.
    """

    def __init__(
        self, message: str, *, chunk_tokens: int, complete_tokens: int, remedy_chunk_tokens: int
    ) -> None:
        super().__init__(message)
        self.chunk_tokens = chunk_tokens
        self.complete_tokens = complete_tokens
        self.remedy_chunk_tokens = remedy_chunk_tokens


class TierError(HeadInferError, RuntimeError):
    """Memory of a tier failed."""


class TierFull(TierError):
    """A tier's budget is used up.

    Attributes:
        tier: "gpu", "host" or "disk".
        budget_bytes: the tier's budget.
        used_bytes: what is allocated already.
        asked_bytes: what was asked on top.
    """

    def __init__(
        self, message: str, *, tier: str, budget_bytes: int, used_bytes: int, asked_bytes: int
    ) -> None:
        super().__init__(message)
        self.tier = tier
        self.budget_bytes = budget_bytes
        self.used_bytes = used_bytes
        self.asked_bytes = asked_bytes


class DiskError(TierError):
    """Keys or values on disk could not be read or written; what else is held stays usable.

    Attributes:
        path: the folder.
        code: the system's error number; 0 where a file ended too early.
        where: layer, head and tokens.
        layer: layer number, -1 if it is not known.
        start: first token of those that are not there; the cache can be cropped to it.
    """

    def __init__(
        self, message: str, *, path: str, code: int, where: str, layer: int = -1, start: int = 0
    ) -> None:
        super().__init__(message)
        self.path = path
        self.code = code
        self.where = where
        self.layer = layer
        self.start = start


class TierClosed(TierError):
    """A tier was used after it was closed."""


class TransferError(HeadInferError, RuntimeError):
    """A copy between tiers did not complete, or was waited for too long."""


class SnapshotError(HeadInferError, RuntimeError):
    """A saved context cannot be used as asked."""


class SnapshotMismatch(SnapshotError):
    """A saved context does not belong to this model.

    Attributes:
        differences: name, value when saved, value here.
    """

    def __init__(
        self, message: str, *, differences: Sequence[tuple[str, object, object]] = ()
    ) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class SnapshotCorrupt(SnapshotError):
    """Bytes of a saved context are not those that were written.

    Attributes:
        path: the file.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class SnapshotLocked(SnapshotError):
    """Another process writes to this context."""


class SnapshotWriteError(SnapshotError):
    """A saved context could not be written; it is still what it was when last durable.

    Attributes:
        path: the file.
        code: the system's error number; 0 if it gave none.
    """

    def __init__(self, message: str, *, path: str, code: int) -> None:
        super().__init__(message)
        self.path = path
        self.code = code


class LosslessCorrupt(HeadInferError):
    """A packed block of keys or values is not one that was written: memory was damaged.

    Attributes:
        block: which of the blocks looked at, counted in their order; None if unknown.
    """

    def __init__(self, message: str, *, block: int | None = None) -> None:
        super().__init__(message)
        self.block = block

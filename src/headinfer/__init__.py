# SPDX-License-Identifier: Apache-2.0
"""Exact long-context LLM inference on a GPU that cannot hold the context.

Keys and values live head by head in host memory; only a staging ring and the heads that fit stay
on the GPU. Works inside plain Hugging Face transformers with `generate()` unmodified.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headinfer.budget import MemoryBudget
from headinfer.errors import (
    BudgetTooSmall,
    CacheStateError,
    HandleError,
    HeadInferError,
    InputError,
    PlanError,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotLocked,
    SnapshotMismatch,
    SnapshotWriteError,
    TierClosed,
    TierError,
    TierFull,
    TransferError,
    UnsupportedAttention,
    UnsupportedModel,
)
from headinfer.geometry import Geometry
from headinfer.plan import Plan

if TYPE_CHECKING:
    from headinfer.hf.ahead import plan_for
    from headinfer.hf.attach import Session, attach
    from headinfer.hf.cache import HeadCache
    from headinfer.hf.contexts import load_context, save_context
    from headinfer.hf.doctor import doctor
    from headinfer.hf.prefill import prefill
    from headinfer.hf.reading import read_context

__version__ = "0.1.0"

__all__ = [
    "BudgetTooSmall",
    "CacheStateError",
    "Geometry",
    "HandleError",
    "HeadCache",
    "HeadInferError",
    "InputError",
    "MemoryBudget",
    "Plan",
    "PlanError",
    "Session",
    "SnapshotCorrupt",
    "SnapshotError",
    "SnapshotLocked",
    "SnapshotMismatch",
    "SnapshotWriteError",
    "TierClosed",
    "TierError",
    "TierFull",
    "TransferError",
    "UnsupportedAttention",
    "UnsupportedModel",
    "__version__",
    "attach",
    "doctor",
    "load_context",
    "plan_for",
    "prefill",
    "read_context",
    "save_context",
]

# transformers takes seconds to import: only these names need it, and load it on first use.
_LAZY = {
    "HeadCache": "headinfer.hf.cache",
    "Session": "headinfer.hf.attach",
    "attach": "headinfer.hf.attach",
    "doctor": "headinfer.hf.doctor",
    "load_context": "headinfer.hf.contexts",
    "plan_for": "headinfer.hf.ahead",
    "prefill": "headinfer.hf.prefill",
    "read_context": "headinfer.hf.reading",
    "save_context": "headinfer.hf.contexts",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'headinfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

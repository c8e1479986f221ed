# SPDX-License-Identifier: Apache-2.0
"""A context on disk: token ids, keys and values in blocks, states, and a manifest that counts.

Knows files, tensors and checksums; no cache, no model, no transformers. docs/contexts.md has the
layout.
"""

from __future__ import annotations

from headinfer.snapshot import durable
from headinfer.snapshot.blocks import Run
from headinfer.snapshot.lock import WriterLock, owner_of
from headinfer.snapshot.manifest import LayerRecord, Manifest, Stream, exists
from headinfer.snapshot.reader import Context
from headinfer.snapshot.removal import is_ours, remove_context, size_of
from headinfer.snapshot.writer import ContextWriter, Step

__all__ = [
    "Context",
    "ContextWriter",
    "LayerRecord",
    "Manifest",
    "Run",
    "Step",
    "Stream",
    "WriterLock",
    "durable",
    "exists",
    "is_ours",
    "owner_of",
    "remove_context",
    "size_of",
]

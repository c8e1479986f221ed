# SPDX-License-Identifier: Apache-2.0
"""What goes to disk when host memory is full, and how it comes back.

`SpillTier` decides where a segment lies, `DiskEngine` carries out copies that begin or end on disk.
"""

from __future__ import annotations

from headinfer.spill.engine import DiskEngine
from headinfer.spill.native import queue_for
from headinfer.spill.tier import SpillTier

__all__ = ["DiskEngine", "SpillTier", "queue_for"]

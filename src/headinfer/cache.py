# SPDX-License-Identifier: Apache-2.0
"""The import path of the published HeadInfer code: `from headinfer.cache import OffloadedCache`."""

from __future__ import annotations

from headinfer.hf.published import OffloadedCache

__all__ = ["OffloadedCache"]

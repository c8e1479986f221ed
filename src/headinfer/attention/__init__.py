# SPDX-License-Identifier: Apache-2.0
"""Attention of queries against one span of keys and values, and what joins spans.

Every call gives a `Partial(out, lse)`: partials over spans merge, outputs over heads concatenate.
"""

from __future__ import annotations

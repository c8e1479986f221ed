# SPDX-License-Identifier: Apache-2.0
"""How long a chunk has to be for its attention to hide the transfers of the keys it attends."""

from __future__ import annotations

from headinfer.geometry import Geometry
from headinfer.options import Options


def hiding_tokens(geometry: Geometry, options: Options) -> int | None:
    """The shortest chunk whose attention takes as long as bringing the keys it attends: F / (g B)
    for F FLOP/s of attention, g query heads per KV head and B bytes/s of the link. None if the
    machine was not measured.

    Per key and value 2 (d + e) FLOPs are done for each of g query heads and chunk tokens, and
    (d + e) bytes times the size of an element are brought.
    """
    rates = options.rates
    if rates is None or not rates.h2d_bytes_s:
        return None
    found = 0.0
    for layer in geometry.full_layers:
        per_kv = max(layer.num_query_heads // max(layer.num_kv_heads, 1), 1)
        flops = rates.attention_flops_of(max(layer.attended_dims))
        found = max(found, flops * geometry.itemsize / (2 * per_kv * rates.h2d_bytes_s))
    return int(found) + 1


def roomy(hiding: int | None) -> int:
    """A quarter longer than needed, in whole KiTokens: rates vary."""
    return 0 if hiding is None else -(-hiding * 5 // 4 // 1024) * 1024


def hiding_reason(chunk: int, hiding: int | None) -> str:
    if hiding is None:
        return ""
    if chunk >= hiding:
        return f"; from {hiding:,} tokens on transfers hide behind attention"
    return (
        f"; transfers take longer than its attention, which would hide them from {hiding:,} tokens "
        "on: more gpu_memory makes room for longer chunks"
    )

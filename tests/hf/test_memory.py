# SPDX-License-Identifier: Apache-2.0
"""In a chunked prefill no tensor grows with the context but id vectors and a padding mask.

Every operator's output is logged at two context lengths; what aliases an input is no new memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import headinfer
from headinfer.hf.handles import KVHandle, LazyMask

LENGTHS = (1024, 2048)
CHUNK = 128
BATCH = 2
WAYS = {
    "staged": {"tile_bytes": 2**13, "staging": True, "num_slots": 3},
    "in_place": {},
    "reserved": {"staging": True, "tile_bytes": 2**13, "expected_tokens": max(LENGTHS) + 8},
}


class Outputs(TorchDispatchMode):
    """The largest new tensor of every operator and type."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[tuple[str, torch.dtype], tuple[int, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tensors((args, kwargs))}
        for x in tensors(found):
            if storage(x) in given:
                continue
            key = (str(func), x.dtype)
            known = self.largest.get(key, ())
            if key not in self.largest or x.numel() > torch.Size(known).numel():
                self.largest[key] = tuple(x.shape)
        return found


def tensors(tree: Any) -> Iterator[Tensor]:
    for x in tree_leaves(tree):
        if isinstance(x, Tensor) and not isinstance(x, (KVHandle, LazyMask)):
            yield x


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def growing(model: Any, ids: Any, pad: int, arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(operator, type, shape) of what is larger at the longer length."""
    logs = []
    for length in LENGTHS:
        tokens = ids(length, batch=BATCH)
        mask = torch.ones_like(tokens)
        mask[0, :pad] = 0
        with Outputs() as log:
            model.generate(tokens, attention_mask=mask, max_new_tokens=4, **arguments)
        logs.append(log.largest)
    short, long = logs
    assert len(long) > 30
    return [
        (*key, shape)
        for key, shape in long.items()
        if torch.Size(shape).numel() > torch.Size(short.get(key, (0,))).numel()
    ]


@pytest.mark.parametrize("pad", [0, 40], ids=["unpadded", "padded"])
@pytest.mark.parametrize(
    ("family", "way"),
    [*(("llama", way) for way in WAYS), ("gemma2", "staged"), ("gemma2", "in_place")],
)
def test_only_id_vectors_and_a_padding_mask_grow_with_the_context(
    family: str, way: str, pad: int, build: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, sliding_window=100) if family == "gemma2" else build(family)
    # Softcapped attention copies keys, a fixed amount at a time, and makes scores row by row.
    monkeypatch.setattr("headinfer.attention.reference.SCORE_ELEMENTS", 2**14)
    monkeypatch.setattr("headinfer.totals.EXPAND_BYTES", 2**17)
    # Partials wait for each other up to a fixed size: reached here as it is by real models.
    monkeypatch.setattr("headinfer.totals.PENDING_BYTES", 2**15)
    with headinfer.attach(model, chunk_tokens=CHUNK, **WAYS[way]) as run:
        found = growing(model, ids, pad, {})
        assert run.stats.host_bytes > 0
    assert any(dtype is torch.int64 for _, dtype, _ in found), "the log sees the ids"
    for operator, dtype, shape in found:
        assert dtype in (torch.int64, torch.bool), f"{operator} makes {dtype} {shape}"
        assert len(shape) <= 2, f"{operator} makes {dtype} {shape}"
        assert torch.Size(shape).numel() <= BATCH * (max(LENGTHS) + 4), operator


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_log_sees_what_the_resident_cache_makes(
    implementation: str, build: Any, ids: Any
) -> None:
    model = build("llama", num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    found = growing(model, ids, 40, {"prefill_chunk_size": CHUNK})
    floats = [shape for _, dtype, shape in found if dtype is torch.float32]
    assert any(len(shape) == 4 for shape in floats)


def test_staging_does_not_grow_with_the_context(build: Any, ids: Any) -> None:
    model = build("llama")
    sizes = []
    for length in LENGTHS:
        with headinfer.attach(model, chunk_tokens=CHUNK, **WAYS["staged"]) as run:
            model.generate(ids(length), max_new_tokens=4)
            sizes.append(run.stats)
    assert sizes[0].staging_bytes == sizes[1].staging_bytes > 0
    assert sizes[0].tail_bytes == sizes[1].tail_bytes > 0
    assert sizes[1].loaded_bytes > 2 * sizes[0].loaded_bytes
    # Only new tokens are ever written back, each once.
    token = 2 * 2 * 2 * 16 * 4
    assert [stats.written_bytes for stats in sizes] == [length * token for length in LENGTHS]

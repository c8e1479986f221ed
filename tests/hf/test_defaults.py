# SPDX-License-Identifier: Apache-2.0
"""torch.set_default_dtype and torch.set_default_device, which users of large models call: what lies in
host memory is in host memory, and what the native library writes is as wide as it thinks."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.attention import native
from headinfer.hf.cache_name import cache_argument

NAMED = ("empty", "zeros", "full", "ones", "rand", "randn", "arange", "linspace", "tensor")
NAMED += ("as_tensor", "randint", "randperm", "eye")
STAGED = {"staging": True, "tile_bytes": 2**16, "num_slots": 3, "chunk_tokens": 64}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "in place": {"chunk_tokens": 64},
    "staged": {**STAGED, "near_data": 0.0},
    "near": {**STAGED, "near_data": 1.0},
    "disk": {"disk": tempfile.gettempdir(), "resident_heads": 0, "chunk_tokens": 64},
}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """New tensors are bfloat16 and on no device at all, unless told."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def model(build: Callable[..., Any]) -> Any:
    return build("llama").to(torch.bfloat16)


@torch.no_grad()
def logits_of(model: Any, prompt: Tensor, step: Tensor, **options: Any) -> Tensor:
    with headinfer.attach(model, **options) as run:
        cache = run.new_cache()
        found = []
        positions = torch.arange(prompt.shape[1] + 3, device="cpu")[None]
        for start in range(0, prompt.shape[1], 100):
            part = prompt[:, start : start + 100]
            where = positions[:, start : start + part.shape[1]]
            found.append(
                model(input_ids=part, position_ids=where, **cache_argument(model, cache)).logits
            )
        for at in range(3):
            where = positions[:, prompt.shape[1] + at :][:, :1]
            found.append(
                model(input_ids=step, position_ids=where, **cache_argument(model, cache)).logits
            )
        cache.reorder_cache(torch.tensor([0], device="cpu"))
        cache.crop(prompt.shape[1] - 50)
        return torch.cat(found, dim=1)


@pytest.mark.parametrize("kv_format", ["exact", "lossless"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_defaults_of_torch_change_nothing(
    model: Any, ids: Any, placement: str, kv_format: str, request: pytest.FixtureRequest
) -> None:
    prompt, step = ids(300), torch.tensor([[7]])
    options = {**PLACEMENTS[placement], "kv_format": kv_format}
    expected = logits_of(model, prompt, step, **options)
    request.getfixturevalue("elsewhere")
    assert torch.equal(expected, logits_of(model, prompt, step, **options))


@pytest.mark.skipif(native.why_absent() is not None, reason="no native library")
def test_the_native_library_writes_float32_into_host_memory(elsewhere: None) -> None:
    """Found by a crash: its result was as wide as the default type, and it wrote past the end."""
    q, k = (torch.ones(shape, device="cpu") for shape in ((1, 4, 1, 64), (1, 2, 128, 64)))
    found = native.attend(q, k, k, scale=1.0)
    assert {found.out.dtype, found.lse.dtype} == {torch.float32}
    assert found.out.is_cpu
    assert found.lse.is_cpu


def test_every_tensor_is_made_on_a_named_device() -> None:
    root = Path(headinfer.__file__).parent
    unnamed = []
    for path in root.rglob("*.py"):
        if {"bench", "testing"} & set(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            told = {word.arg for word in node.keywords}
            if of_torch and node.func.attr in NAMED and not told & {"device", None}:
                unnamed.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not unnamed

# SPDX-License-Identifier: Apache-2.0
"""A tiny model and a context of it, made once and copied for every test that damages it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.testing.zoo import ZOO

TOKENS = 300  # two blocks and a tail
CHUNK = 64


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama() -> Any:
    return ZOO["llama"].build()


@pytest.fixture
def attached(llama: Any) -> Iterator[Any]:
    """A session on the tiny model."""
    with headinfer.attach(llama, chunk_tokens=CHUNK, expected_tokens=TOKENS + 100) as run:
        yield run


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(5, 99, (1, TOKENS + 100), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def original(llama: Any, ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts") / "original.ctx"
    with headinfer.attach(llama, chunk_tokens=CHUNK, expected_tokens=TOKENS + 100):
        headinfer.read_context(llama, ids[:, :TOKENS], folder, checkpoint_every=CHUNK)
    return folder


@pytest.fixture
def context(original: Path, tmp_path: Path) -> Path:
    """A context of `TOKENS` tokens that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "book.ctx"))


@pytest.fixture(scope="session")
def bits() -> Callable[[Any], list[Tensor]]:
    """Every key and value that a cache holds, layer by layer."""

    def all_of(cache: Any) -> list[Tensor]:
        found = []
        for layer in cache.layers:
            gather = getattr(layer, "gather", None)
            if gather is not None and layer.length:
                found += [gather(layer.length, values=values) for values in (False, True)]
            elif gather is None and getattr(layer, "keys", None) is not None:
                found += [layer.keys, layer.values]
            for name in ("conv_states", "recurrent_states"):
                held = getattr(layer, name, None) or {}
                held = held.values() if isinstance(held, dict) else held
                found += [state for state in held if state is not None]
        return found

    return all_of

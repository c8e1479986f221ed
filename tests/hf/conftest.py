# SPDX-License-Identifier: Apache-2.0
"""Tiny random models and the ways a CPU holds their keys and values: staged, staged with half of
the heads attended where they lie, all in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import headinfer
from headinfer.hf.cache_name import cache_argument, cache_returned

# A staging slot holds 64 tokens of one head; prompts have more than a block of 128, so that every
# path runs: blocks written back, tiles staged and given back (NaN-filled), the tail.
STAGED = {
    "chunk_tokens": 16,
    "tile_bytes": 2**13,
    "staging": True,
    "poison": True,
    "num_slots": 3,
}
NEAR = {**STAGED, "near_data": 0.5}
IN_PLACE = {"chunk_tokens": 16}
# Everything but the newest tokens is on disk; below, what finds no room in host memory.
ON_DISK = {
    "chunk_tokens": 16,
    "disk": tempfile.gettempdir(),
    "resident_heads": 0,
    "tile_bytes": 2**13,
    "num_slots": 3,
    "poison": True,
}
# Buffers between ring and disk take all but 48 KiB of it.
SPILLING = {**STAGED, "disk": tempfile.gettempdir(), "host_memory": 32 * 2**20 + 2**17}

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}

Build = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]
Steps = Callable[..., Tensor]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    params=[STAGED, NEAR, IN_PLACE, ON_DISK, SPILLING],
    ids=["staged", "near", "in_place", "on_disk", "spilling"],
)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="session")
def staged() -> dict[str, Any]:
    return dict(STAGED)


@pytest.fixture(scope="session")
def build() -> Build:
    """Makes a seeded random model in fp32 on eager attention: build("llama", hidden_size=64)."""

    def make(model_type: str = "llama", *, model_class: str | None = None, **config: Any) -> Any:
        arguments = {**TINY, **config}
        attention = arguments.pop("attn_implementation")
        made = CONFIG_MAPPING[model_type](**arguments)
        torch.manual_seed(0)
        if model_class is None:
            model = transformers.AutoModelForCausalLM.from_config(
                made, attn_implementation=attention
            )
        else:
            model = getattr(transformers, model_class)._from_config(
                made, attn_implementation=attention
            )
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = arguments["eos_token_id"]
            model.generation_config.pad_token_id = 0
        return model.float().eval()

    return make


@pytest.fixture
def llama(build: Build) -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="session")
def ids() -> Ids:
    """Random prompts [batch, tokens]."""

    def make(tokens: int = 150, batch: int = 1, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, TINY["vocab_size"], (batch, tokens), generator=generator)

    return make


@pytest.fixture(scope="session")
def steps() -> Steps:
    """Logits of a prompt passed in pieces: through `cache`, or the one the model starts."""

    @torch.no_grad()
    def run(
        model: PreTrainedModel,
        tokens: Tensor,
        sizes: Sequence[int],
        cache: Any = None,
        mask: Tensor | None = None,
        past: int = 0,
    ) -> Tensor:
        found, start = [], 0
        for size in sizes:
            more = {} if mask is None else {"attention_mask": mask[:, : past + start + size]}
            out = model(
                tokens[:, start : start + size],
                **cache_argument(model, cache),
                use_cache=True,
                **more,
            )
            cache = cache_returned(out)
            found.append(out.logits)
            start += size
        assert start == tokens.shape[1]
        return torch.cat(found, dim=1)

    return run


@pytest.fixture(scope="session")
def resident(steps: Steps) -> Steps:
    """The same through transformers' own cache and eager attention."""

    def run(model: PreTrainedModel, tokens: Tensor, sizes: Sequence[int], **more: Any) -> Tensor:
        assert model.config._attn_implementation == "eager"
        return steps(model, tokens, sizes, DynamicCache(config=model.config), **more)

    return run


@pytest.fixture(scope="session")
def close() -> Callable[[Tensor, Tensor], None]:
    """Asserts equality in fp32: within 1e-5 of the largest logit, and finite."""

    def check(found: Tensor, expected: Tensor) -> None:
        assert found.shape == expected.shape
        assert torch.isfinite(found).all()
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error <= 1e-5, f"relative error {error:.1e}"

    return check


@pytest.fixture
def head_cache(options: dict[str, Any]) -> Callable[..., headinfer.HeadCache]:
    """Makes a HeadCache for a model, with the options of this test."""

    def make(model: PreTrainedModel, **more: Any) -> headinfer.HeadCache:
        return headinfer.HeadCache(model.config, **{**options, **more})

    return make


@pytest.fixture(scope="session")
def dense() -> Callable[..., Tensor]:
    """What a recipe's blocks add up to, bool [b, h, rows, keys]; no pair may come twice."""

    def make(
        recipe: Any,
        rows: tuple[int, int],
        keys: tuple[int, int],
        *,
        batch: int = 1,
        heads: int = 1,
        most: int | None = None,
    ) -> Tensor:
        shape = (rows[1] - rows[0], keys[1] - keys[0])
        seen, count = torch.zeros(batch, heads, *shape, dtype=torch.bool), torch.zeros(shape)
        for block in recipe.blocks(rows, keys):
            (r0, r1), (k0, k1) = block.rows, block.keys
            assert rows[0] <= r0 < r1 <= rows[1]
            assert keys[0] <= k0 < k1 <= keys[1]
            here = (slice(r0 - rows[0], r1 - rows[0]), slice(k0 - keys[0], k1 - keys[0]))
            count[here] += 1
            found = torch.ones(r1 - r0, k1 - k0, dtype=torch.bool)
            if block.causal:
                assert r1 - r0 == k1 - k0
                assert block.bias is None
                found = found.tril()
            if block.bias is not None:
                assert most is None or block.bias.numel() <= most
                found = block.bias
                if found.dtype != torch.bool:
                    found = found > -torch.inf
            if block.window is not None:
                assert not block.causal
                index = torch.arange(r1 - r0)[:, None], torch.arange(k1 - k0)
                found = found & block.window.visible(*index)
            seen[:, :, *here] |= found
        assert not (count > 1).any()
        return seen

    return make

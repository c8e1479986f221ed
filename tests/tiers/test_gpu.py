# SPDX-License-Identifier: Apache-2.0
"""Memory of the compute device: in extents of exact size, taken at once where that is planned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import headinfer
from headinfer.errors import TierFull
from headinfer.testing.zoo import ZOO
from headinfer.tiers import DeviceTier

CPU = torch.device("cpu")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of what tiers took from torch, in order."""
    sizes: list[int] = []
    memory = DeviceTier._memory

    def noted(self: DeviceTier, nbytes: int) -> Tensor:
        sizes.append(nbytes)
        return memory(self, nbytes)

    monkeypatch.setattr(DeviceTier, "_memory", noted)
    return sizes


def test_what_was_taken_at_once_is_what_is_allocated_later(taken: list[int]) -> None:
    tier = DeviceTier(CPU, budget_bytes=4096)
    tier.take([1024, 1000, 512])
    assert taken == [1024, 1024, 512]
    assert tier.used_bytes == 0
    extents = [tier.allocate(size) for size in (512, 1000, 1024)]
    assert taken == [1024, 1024, 512], "nothing more was taken"
    assert tier.used_bytes == 2560
    places = {tier.view(extent, 0, (1,), torch.uint8).data_ptr() for extent in extents}
    assert len(places) == 3
    tier.allocate(1024)
    assert taken == [1024, 1024, 512, 1024]


def test_an_extent_of_another_size_gives_the_rest_back(taken: list[int]) -> None:
    tier = DeviceTier(CPU)
    tier.take([1024, 1024])
    tier.allocate(256)
    tier.allocate(1024)
    assert taken == [1024, 1024, 256, 1024]


def test_no_more_is_taken_than_the_budget_allows(taken: list[int]) -> None:
    tier = DeviceTier(CPU, budget_bytes=2048)
    tier.allocate(512)
    tier.take([1024, 1024])
    assert taken == [512, 1024]
    tier.allocate(1024)
    with pytest.raises(TierFull):
        tier.allocate(1024)


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gemma2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_resident_heads_of_all_layers_are_there_before_the_first_is_computed(
    name: str, batch: int, taken: list[int]
) -> None:
    model: PreTrainedModel = ZOO[name].build()
    ids = torch.randint(3, 90, (batch, 50))
    with headinfer.attach(model, staging=True, resident_heads=1, batch_size=batch) as run:
        first: list[int] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *args: first.append(len(taken)))
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert run.plan is not None
        planned = sum(1 for heads in run.plan.resident_heads if heads)
        assert planned == run.head_layers
        begins = next(count for count in first if count)  # after the first head-wise layer
        assert begins == planned
        assert len(taken) == planned
        assert sum(taken) == run.stats.resident_bytes

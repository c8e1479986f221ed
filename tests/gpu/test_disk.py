# SPDX-License-Identifier: Apache-2.0
"""Keys and values that pass from a disk to a GPU through page-locked memory."""

from __future__ import annotations

import pytest
import torch

import headinfer
from headinfer.testing.zoo import ZOO

pytestmark = pytest.mark.gpu

BUFFERS = 33 * 2**20
"""Of host memory: less than 1 MiB of it is left for keys and values."""


def generated(model, ids, **options):
    with headinfer.attach(model, chunk_tokens=64, tile_bytes=8192, **options) as run:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
        )
        return out, run.stats, run.plan


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("near", [0.0, 0.5, 1.0])
def test_spilling_yields_the_tokens_of_the_stream(tmp_path, near, batch):
    model = ZOO["llama"].build().to("cuda")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (batch, 4000), generator=random).to("cuda")
    how = {"resident_heads": 0, "near_data": near}
    expected, stats, _ = generated(model, ids, **how)
    assert stats.disk_bytes == 0
    found, stats, plan = generated(model, ids, disk=tmp_path, host_memory=BUFFERS, **how)
    assert torch.equal(found, expected)
    assert 0 < stats.disk_bytes <= plan.disk_bytes + 2**20
    assert stats.host_bytes <= plan.host_bytes
    assert stats.disk_written_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_reads_from_disk_are_the_bits_that_were_written(tmp_path):
    model = ZOO["llama"].build().to("cuda")
    layers = model.config.num_hidden_layers
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    with headinfer.attach(
        model, disk=tmp_path, host_memory=BUFFERS, resident_heads=0, tile_bytes=8192
    ) as run:
        cache, written = run.new_cache(), []
        for _ in range(16):
            k, v = torch.randn((2, 1, heads, 256, dim), device="cuda").unbind()
            written.append((k, v))
            for layer in range(layers):
                cache.update(k, v, layer)
        for layer in cache.head_layers:
            for place, values in enumerate((False, True)):
                expected = torch.cat([both[place] for both in written], dim=2)
                assert torch.equal(layer.gather(4096, values=values), expected)
        assert cache.stats().disk_bytes > 0

# SPDX-License-Identifier: Apache-2.0
"""Contexts saved from a GPU and loaded onto it, from every placement and onto every other."""

from __future__ import annotations

import tempfile

import pytest
import torch

import headinfer
from headinfer.snapshot import Context
from headinfer.testing.zoo import ZOO

pytestmark = pytest.mark.gpu

PLACEMENTS = {
    "resident": {},
    "streamed": {"resident_heads": 0, "near_data": 0.0, "tile_bytes": 4096},
    "partly": {"resident_heads": 1, "near_data": 0.0, "tile_bytes": 4096},
}
# Page-locked buffers take 32 MiB of the host budget, all but what the ring's take.
PLACEMENTS["disk"] = {
    **PLACEMENTS["streamed"],
    "disk": tempfile.gettempdir(),
    "host_memory": 33 * 2**20,
}
CHUNK, TOKENS = 64, 420


def everything(cache):
    found = []
    for layer in cache.layers:
        gather = getattr(layer, "gather", None)
        if gather is not None and layer.length:
            found += [gather(layer.length, values=values) for values in (False, True)]
        elif getattr(layer, "keys", None) is not None:
            found += [layer.keys, layer.values]
    return found


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 99, (1, TOKENS), generator=generator).to("cuda")


@pytest.mark.parametrize("saved", PLACEMENTS)
@pytest.mark.parametrize("loaded", PLACEMENTS)
def test_placement_is_not_saved(saved, loaded, tmp_path):
    model = ZOO["llama"].build().to("cuda")
    with headinfer.attach(model, chunk_tokens=CHUNK, **PLACEMENTS[saved]):
        cache = headinfer.read_context(model, tokens(), tmp_path / "a.ctx", checkpoint_every=CHUNK)
        expected = everything(cache)
    for _ in Context(tmp_path / "a.ctx").check_all():
        pass
    with headinfer.attach(model, chunk_tokens=CHUNK, **PLACEMENTS[loaded]):
        found = everything(headinfer.load_context(model, tmp_path / "a.ctx"))
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_reading_goes_on_to_the_same_bits(name, placement, tmp_path):
    model = ZOO[name].build().to("cuda")
    options = {"chunk_tokens": CHUNK, "expected_tokens": TOKENS + 1, **PLACEMENTS[placement]}

    class Stop:
        left = 4

        def on_event(self, event):
            if isinstance(event, headinfer.progress.ForwardStarted):
                self.left -= 1
                if self.left < 0:
                    raise InterruptedError

    with headinfer.attach(model, **options):
        whole = headinfer.read_context(model, tokens(), tmp_path / "a.ctx", checkpoint_every=CHUNK)
        expected = everything(whole)
    with headinfer.attach(model, observer=Stop(), **options), pytest.raises(InterruptedError):
        headinfer.read_context(model, tokens(), tmp_path / "b.ctx", checkpoint_every=CHUNK)
    there = []
    with headinfer.attach(model, **options):
        parts = headinfer.read_context(
            model, tokens(), tmp_path / "b.ctx", on_start=lambda done, total: there.append(done)
        )
        assert there == [4 * CHUNK]
        assert all(map(torch.equal, expected, everything(parts)))


def test_another_device_gets_the_same_bytes(tmp_path):
    model = ZOO["llama"].build()
    with headinfer.attach(model, chunk_tokens=CHUNK):
        cache = headinfer.read_context(model, tokens().cpu(), tmp_path / "a.ctx")
        expected = everything(cache)
    model.to("cuda")
    with headinfer.attach(model):
        found = everything(headinfer.load_context(model, tmp_path / "a.ctx"))
    assert all(torch.equal(one, other.cpu()) for one, other in zip(expected, found, strict=True))

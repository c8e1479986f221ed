# SPDX-License-Identifier: Apache-2.0
"""Reading that was interrupted goes on, and nobody can tell afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.errors import InputError, SnapshotError, SnapshotMismatch
from headinfer.hf.reading import Every
from headinfer.progress import Event, ForwardStarted
from headinfer.snapshot import Manifest
from headinfer.testing.zoo import ZOO

CHUNK = 64
STAGED = {"staging": True, "tile_bytes": 4096, "num_slots": 3, "poison": True, "near_data": 0.0}
OPTIONS: dict[str, Any] = {"chunk_tokens": CHUNK, "expected_tokens": 520}


class Stop(Exception):
    """Something happened."""


class StopBefore:
    """An observer that stops before forward pass number `count`."""

    def __init__(self, count: int) -> None:
        self.left = count

    def on_event(self, event: Event) -> None:
        if isinstance(event, ForwardStarted):
            self.left -= 1
            if self.left < 0:
                raise Stop


def read(model: Any, tokens: Tensor, folder: Path, stop: int | None = None, **more: Any) -> Any:
    """A cache, what was there before, after reading; or None if stopped before pass `stop`."""
    there: list[int] = []
    given = {"checkpoint_every": CHUNK, "on_start": lambda done, _: there.append(done), **more}
    options = {**OPTIONS, **{name: given.pop(name) for name in list(given) if name in STAGED}}
    options["chunk_tokens"] = given.pop("chunk_tokens", CHUNK)
    observer = None if stop is None else StopBefore(stop)
    with headinfer.attach(model, observer=observer, **options):
        try:
            return headinfer.read_context(model, tokens, folder, **given), there[0]
        except Stop:
            return None


def bits(cache: Any) -> list[Tensor]:
    found = []
    for layer in cache.layers:
        gather = getattr(layer, "gather", None)
        if gather is not None and layer.length:
            found += [gather(layer.length, values=values) for values in (False, True)]
        elif getattr(layer, "keys", None) is not None:
            found += [layer.keys, layer.values]
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, None) or {}
            found += [state for state in held.values() if isinstance(state, Tensor)]
    return found


@pytest.fixture(scope="module")
def tokens() -> Callable[..., Tensor]:
    def make(count: int = 500, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(5, 99, (1, count), generator=generator)

    return make


@pytest.fixture(scope="module")
def model() -> Any:
    return ZOO["llama"].build()


@pytest.mark.parametrize("options", [{}, STAGED], ids=["in place", "staged"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", "qwen3_next", "deepseek_v3"])
def test_an_interrupted_reading_goes_on_to_the_same_bits(
    name: str, options: dict[str, Any], tokens: Any, tmp_path: Path
) -> None:
    model = ZOO[name].build()
    whole, _ = read(model, tokens(), tmp_path / "whole.ctx", **options)
    for stop in (2, 1, 3):
        assert read(model, tokens(), tmp_path / "parts.ctx", stop=stop, **options) is None
    parts, there = read(model, tokens(), tmp_path / "parts.ctx", **options)
    assert there == 6 * CHUNK
    assert all(map(torch.equal, bits(whole), bits(parts)))
    with headinfer.attach(model, **OPTIONS, **options):
        loaded = headinfer.load_context(model, tmp_path / "parts.ctx", verify="now")
        assert all(map(torch.equal, bits(whole), bits(loaded)))


def test_a_pass_that_breaks_off_in_the_middle_leaves_whole_chunks(
    tokens: Any, tmp_path: Path
) -> None:
    for name in ("llama", "gemma2"):
        model = ZOO[name].build()
        whole, _ = read(model, tokens(), tmp_path / f"{name}.ctx")
        calls = [0]

        def broken(*args: Any, _calls: list[int] = calls) -> None:
            _calls[0] += 1
            if _calls[0] == 4:
                raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(broken)
        with pytest.raises(KeyboardInterrupt):
            read(model, tokens(), tmp_path / f"{name}-2.ctx", checkpoint_every="1h")
        hook.remove()
        parts, there = read(model, tokens(), tmp_path / f"{name}-2.ctx")
        # Windows have moved on in the layers that ran: only whole checkpoints are good there.
        assert there == (2 * CHUNK if name == "llama" else 0)
        assert all(map(torch.equal, bits(whole), bits(parts)))


def test_a_complete_context_is_not_read_again(model: Any, tokens: Any, tmp_path: Path) -> None:
    whole, _ = read(model, tokens(), tmp_path / "a.ctx")
    before = (tmp_path / "a.ctx" / "manifest.json").read_bytes()
    again, there = read(model, tokens(), tmp_path / "a.ctx", stop=0)
    assert there == 500
    assert all(map(torch.equal, bits(whole), bits(again)))
    assert (tmp_path / "a.ctx" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(("changed", "kept"), [(499, 384), (300, 256), (128, 128)])
def test_of_a_changed_text_the_common_chunks_are_kept(
    model: Any, tokens: Any, tmp_path: Path, changed: int, kept: int
) -> None:
    edited = tokens().clone()
    edited[0, changed:] = tokens(seed=1)[0, changed:]
    edited[0, changed] = (tokens()[0, changed] + 1) % 90 + 5
    read(model, tokens(), tmp_path / "a.ctx")
    with headinfer.attach(model, **OPTIONS):
        reader = headinfer.load_context(model, tmp_path / "a.ctx")  # of the text as it was
        expected = bits(headinfer.load_context(model, tmp_path / "a.ctx"))
    whole, _ = read(model, edited, tmp_path / "whole.ctx")
    parts, there = read(model, edited, tmp_path / "a.ctx")
    assert there == kept
    assert all(map(torch.equal, bits(whole), bits(parts)))
    assert all(map(torch.equal, bits(reader), expected))
    told = Manifest.read(tmp_path / "a.ctx")
    assert (told.tokens, told.complete) == (500, True)


def test_a_longer_and_a_shorter_text_go_on(model: Any, tokens: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a.ctx"
    for count, kept in ((300, 0), (500, 256), (300, 256), (300, 300)):
        parts, there = read(model, tokens()[:, :count], folder)
        assert there == kept
        whole, _ = read(model, tokens()[:, :count], tmp_path / "whole.ctx", restart=True)
        assert all(map(torch.equal, bits(whole), bits(parts)))
        assert Manifest.read(folder).tokens == count


def test_another_text_is_refused_unless_asked_to_begin_again(
    model: Any, tokens: Any, tmp_path: Path
) -> None:
    read(model, tokens(), tmp_path / "a.ctx")
    said = "holds another text: 0 of its 500 tokens .*--restart"
    other = (tokens() + 1) % 90 + 5
    with pytest.raises(SnapshotError, match=said):
        read(model, other, tmp_path / "a.ctx")
    assert Manifest.read(tmp_path / "a.ctx").tokens == 500
    _, there = read(model, other, tmp_path / "a.ctx", restart=True)
    assert there == 0


def test_windows_cannot_go_back(tokens: Any, tmp_path: Path) -> None:
    model = ZOO["gemma2"].build()
    read(model, tokens(), tmp_path / "a.ctx")
    edited = tokens().clone()
    edited[0, 400] += 1
    with pytest.raises(SnapshotError, match="windows or states cannot go back"):
        read(model, edited, tmp_path / "a.ctx")
    _, there = read(model, tokens(510), tmp_path / "b.ctx", stop=None)
    assert there == 0


def test_another_model_or_chunk_is_noticed(model: Any, tokens: Any, tmp_path: Path) -> None:
    assert read(model, tokens(), tmp_path / "a.ctx", stop=3) is None
    with pytest.raises(SnapshotMismatch, match="or begin again there with --restart"):
        read(ZOO["llama"].build(seed=1), tokens(), tmp_path / "a.ctx")
    _, there = read(model, tokens(), tmp_path / "a.ctx", chunk_tokens=None)
    assert there == 3 * CHUNK
    assert Manifest.read(tmp_path / "a.ctx").chunk_tokens == CHUNK  # not what a plan would choose


def test_padded_batches_are_read_and_go_on(model: Any, tokens: Any, tmp_path: Path) -> None:
    both = torch.cat([tokens(), tokens(seed=1)])
    mask = torch.ones_like(both)
    mask[1, :150] = 0
    whole, _ = read(model, both, tmp_path / "whole.ctx", attention_mask=mask)
    assert read(model, both, tmp_path / "a.ctx", stop=4, attention_mask=mask) is None
    with pytest.raises(SnapshotError, match="holds another text"):
        read(model, both, tmp_path / "a.ctx")
    parts, there = read(model, both, tmp_path / "a.ctx", attention_mask=mask)
    assert there == 4 * CHUNK
    assert all(map(torch.equal, bits(whole), bits(parts)))


def test_checkpoints_come_as_often_as_asked(model: Any, tokens: Any, tmp_path: Path) -> None:
    def left(every: str) -> int:
        folder = tmp_path / every
        assert read(model, tokens(), folder, stop=6, checkpoint_every=every) is None
        return Manifest.read(folder).serial

    assert left("128") == 3
    assert left("1h") == 1  # what was whole when it was interrupted


@pytest.mark.parametrize("text", ["", "often", "-3", "0", "3x", "1.5"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="30s, 5m or 4096"):
        Every.parse(text)


def test_intervals_are_times_or_tokens() -> None:
    assert Every.parse("30s") == Every(seconds=30)
    assert Every.parse("1.5m") == Every(seconds=90)
    assert Every.parse("512") == Every.parse(512) == Every(tokens=512)

# SPDX-License-Identifier: Apache-2.0
"""A saved context comes back bit for bit, for every kind of model, and belongs to its model only."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.errors import CacheStateError, SnapshotError, SnapshotMismatch
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.fingerprint import differences, fingerprint_of
from headinfer.snapshot import Manifest
from headinfer.testing.zoo import ZOO

PLACEMENTS = {
    "in place": {},
    "staged": {
        "staging": True,
        "tile_bytes": 4096,
        "num_slots": 3,
        "poison": True,
        "near_data": 0.0,
    },
    "partly resident": {
        "staging": True,
        "tile_bytes": 4096,
        "num_slots": 3,
        "poison": True,
        "near_data": 0.0,
        "resident_heads": 1,
    },
}
DISK = {"disk": tempfile.gettempdir(), "tile_bytes": 4096, "num_slots": 3, "poison": True}
PLACEMENTS["on disk"] = {**DISK, "resident_heads": 0}
PLACEMENTS["host and disk"] = {**DISK, "resident_heads": 1}
PLACEMENTS["spilling"] = {**PLACEMENTS["staged"], **DISK, "host_memory": 32 * 2**20 + 2**17}
KINDS = (
    "llama",
    "gemma2",
    "mistral-windowed",
    "falcon_h1",
    "zamba2",
    "qwen3_next",
    "gpt_oss",
    "deepseek_v3",
    "lfm2",
)
LENGTH, STEPS = 290, 6


@pytest.fixture(scope="module")
def zoo() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            made[name] = ZOO[name].build()
        return made[name]

    return model


def held(cache: Any) -> dict[str, Tensor]:
    """Every tensor a cache holds, by name."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        gather = getattr(layer, "gather", None)
        if gather is not None and layer.length:
            found[f"{index}.k"] = gather(layer.length, values=False)
            found[f"{index}.v"] = gather(layer.length, values=True)
        for name, value in vars(layer).items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            found |= {f"{index}.{name}.{k}": v for k, v in items if isinstance(v, Tensor)}
    return found


def assert_equal(one: Any, other: Any) -> None:
    first, second = held(one), held(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@torch.no_grad()
def go_on(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the tokens after what the cache holds, one by one."""
    found = []
    for _ in range(STEPS):
        at = cache.get_seq_length()
        more = {} if mask is None else {"attention_mask": mask[:, : at + 1]}
        out = model(tokens[:, at : at + 1], **cache_argument(model, cache), **more)
        found.append(out.logits)
    return torch.cat(found, dim=1)


def tokens_of(batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 99, (batch, LENGTH + STEPS), generator=generator)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", KINDS)
def test_what_is_loaded_is_what_was_saved(
    zoo: Any, tmp_path: Path, name: str, placement: str
) -> None:
    model, tokens = zoo(name), tokens_of(batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :140] = 0  # padding: a whole block of it
    with headinfer.attach(model, chunk_tokens=LENGTH, **PLACEMENTS[placement]) as run:
        with torch.no_grad():
            model(tokens[:, :LENGTH], attention_mask=mask[:, :LENGTH])
        run.save(tmp_path / "a.ctx")
        saved = run.cache
        loaded = headinfer.load_context(model, tmp_path / "a.ctx")
        assert_equal(saved, loaded)
        assert torch.equal(loaded.token_ids, tokens[:, :LENGTH])
        padding = loaded.log.padding(LENGTH)
        assert padding is not None
        assert torch.equal(padding, mask[:, :LENGTH].to(torch.uint8))
        again = headinfer.load_context(model, tmp_path / "a.ctx")
        assert torch.equal(go_on(model, saved, tokens, mask), go_on(model, loaded, tokens, mask))
        assert_equal(saved, loaded)
        # Going on has left the context alone.
        assert_equal(again, headinfer.load_context(model, tmp_path / "a.ctx", verify="now"))
        assert again.get_seq_length() == LENGTH


@pytest.mark.parametrize("saved", PLACEMENTS)
@pytest.mark.parametrize("loaded", PLACEMENTS)
def test_where_heads_lie_is_not_saved(
    llama: Any, ids: Any, tmp_path: Path, saved: str, loaded: str
) -> None:
    with headinfer.attach(llama, **PLACEMENTS[saved]) as run:
        headinfer.prefill(llama, ids(200), run.new_cache())
        run.save(tmp_path / "a.ctx")
        expected = held(run.cache)
    with headinfer.attach(llama, **PLACEMENTS[loaded]):
        found = held(headinfer.load_context(llama, tmp_path / "a.ctx"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_it_grows_with_its_cache(llama: Any, ids: Any, tmp_path: Path) -> None:
    folder, tokens = tmp_path / "a.ctx", ids(500)
    with headinfer.attach(llama, chunk_tokens=64) as run:
        cache = run.new_cache()
        for start, stop in ((0, 50), (50, 128), (128, 129), (129, 400), (400, 500)):
            headinfer.prefill(llama, tokens[:, start:stop], cache)
            run.save(folder)
            assert Manifest.read(folder).tokens == stop
            assert_equal(cache, headinfer.load_context(llama, folder, verify="now"))
            run.cache = cache
        run.save(folder)  # nothing new


def test_runs_of_attention_are_where_they_were(llama: Any, ids: Any, tmp_path: Path) -> None:
    """Without a length beforehand heads in place lie in several runs, summed one after the other."""
    tokens = ids(2500)
    with headinfer.attach(llama, chunk_tokens=100) as run:
        cache = run.new_cache()
        headinfer.prefill(llama, tokens[:, :1990], cache)
        run.save(tmp_path / "a.ctx")
        loaded = headinfer.load_context(llama, tmp_path / "a.ctx")
        assert len(Manifest.read(tmp_path / "a.ctx").layers[0].cuts) > 1
        for start in range(1990, 2500, 85):
            part = tokens[:, start : start + 85]
            with torch.no_grad():
                one = llama(part, **cache_argument(llama, cache)).logits
                assert torch.equal(one, llama(part, **cache_argument(llama, loaded)).logits)


def test_questions_append_only_when_asked(llama: Any, ids: Any, tmp_path: Path) -> None:
    folder, tokens = tmp_path / "a.ctx", ids(300)
    with headinfer.attach(llama):
        headinfer.read_context(llama, tokens[:, :200], folder)
        cache = headinfer.load_context(llama, folder, append=True)
        headinfer.prefill(llama, tokens[:, 200:], cache)
        headinfer.save_context(llama, cache, folder)
        cache.saved.close()
        loaded = headinfer.load_context(llama, folder)
        assert torch.equal(loaded.token_ids, tokens)
        assert_equal(cache, loaded)


def test_a_context_answers_generate(llama: Any, ids: Any, tmp_path: Path) -> None:
    tokens = ids(200)
    question = ids(9, seed=5)
    whole = torch.cat([tokens, question], dim=1)
    mask = torch.ones_like(whole)
    with headinfer.attach(llama, chunk_tokens=64):
        headinfer.read_context(llama, tokens, tmp_path / "a.ctx")
        expected = llama.generate(whole, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for _ in range(2):
            cache = headinfer.load_context(llama, tmp_path / "a.ctx")
            told = torch.cat([cache.token_ids, question], dim=1)
            found = llama.generate(
                told,
                attention_mask=mask,
                **cache_argument(llama, cache),
                max_new_tokens=5,
                do_sample=False,
            )
            assert torch.equal(found, expected)


def test_a_cropped_cache_goes_elsewhere(llama: Any, ids: Any, tmp_path: Path) -> None:
    tokens, other = ids(300), ids(300, seed=9)
    with headinfer.attach(llama, chunk_tokens=64) as run:
        cache = headinfer.read_context(llama, tokens, tmp_path / "a.ctx")
        cache.crop(-120)
        with pytest.raises(SnapshotError, match="it was cropped, or went another way"):
            run.save(tmp_path / "a.ctx")
        headinfer.prefill(llama, other[:, :200], cache)
        with pytest.raises(SnapshotError, match="Save to another folder"):
            headinfer.save_context(llama, cache, tmp_path / "a.ctx")
        headinfer.save_context(llama, cache, tmp_path / "b.ctx")
        loaded = headinfer.load_context(llama, tmp_path / "b.ctx")
        assert_equal(cache, loaded)
        loaded.crop(-150)
        cache.crop(-150)
        headinfer.prefill(llama, other[:, :50], loaded)
        headinfer.prefill(llama, other[:, :50], cache)
        assert_equal(cache, loaded)
        assert (
            headinfer.load_context(llama, tmp_path / "a.ctx", verify="now").get_seq_length() == 300
        )


def test_reordered_and_copied_caches_are_saved_as_they_are(
    llama: Any, ids: Any, tmp_path: Path
) -> None:
    with headinfer.attach(llama) as run:
        cache = run.new_cache()
        headinfer.prefill(llama, ids(200, batch=2), cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        run.save(tmp_path / "a.ctx")
        loaded = headinfer.load_context(llama, tmp_path / "a.ctx")
        assert_equal(cache, loaded)
        assert torch.equal(loaded.token_ids, ids(200, batch=2)[[1, 0]])
        loaded.batch_repeat_interleave(2)
        assert torch.equal(loaded.token_ids, ids(200, batch=2)[[1, 1, 0, 0]])
        loaded.batch_select_indices(torch.tensor([1, 2]))
        assert torch.equal(loaded.token_ids, ids(200, batch=2)[[1, 0]])
        assert_equal(cache, loaded)
        twin = copy.deepcopy(loaded)
        loaded.reorder_cache(torch.tensor([1, 1]))
        assert_equal(twin, cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert_equal(loaded, cache)


def test_a_cache_filled_by_hand_needs_its_ids(llama: Any, ids: Any, tmp_path: Path) -> None:
    llama.set_attn_implementation("headinfer")
    cache = headinfer.HeadCache(llama.config)
    with pytest.raises(CacheStateError, match="nothing to save"):
        headinfer.save_context(llama, cache, tmp_path / "a.ctx")
    headinfer.prefill(llama, ids(150), cache)
    headinfer.save_context(llama, cache, tmp_path / "nameless.ctx")
    assert headinfer.load_context(llama, tmp_path / "nameless.ctx").token_ids is None
    with pytest.raises(headinfer.InputError, match="token_ids of shape"):
        headinfer.save_context(llama, cache, tmp_path / "a.ctx", token_ids=ids(149))
    headinfer.save_context(llama, cache, tmp_path / "a.ctx", token_ids=ids(150))
    loaded = headinfer.load_context(llama, tmp_path / "a.ctx")
    assert torch.equal(loaded.token_ids, ids(150))


def test_another_context_is_not_overwritten(llama: Any, ids: Any, tmp_path: Path) -> None:
    with headinfer.attach(llama) as run:
        headinfer.read_context(llama, ids(150), tmp_path / "a.ctx")
        headinfer.prefill(llama, ids(150), run.new_cache())
        with pytest.raises(SnapshotError, match="holds another context already"):
            run.save(tmp_path / "a.ctx")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        with pytest.raises(SnapshotError, match=r"not empty \(notes\.txt is in it\)"):
            run.save(tmp_path / "full")
        (tmp_path / "file").write_text("mine")
        with pytest.raises(SnapshotError, match="is a file"):
            run.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: model.lm_head.weight.data.mul_(1.001), "weights"),
        (lambda model: model.model.layers[1].mlp.down_proj.weight.data.add_(1e-3), "weights"),
        (lambda model: setattr(model.config, "rms_norm_eps", 1e-3), "config.rms_norm_eps"),
        (
            lambda model: model.config.rope_parameters.update(rope_theta=7.0),
            "config.rope_parameters.rope_theta",
        ),
        (lambda model: model.to(torch.bfloat16), "dtype"),
    ],
)
def test_another_model_is_refused_with_what_differs(
    build: Any, ids: Any, tmp_path: Path, change: Any, name: str
) -> None:
    model = build("llama")
    with headinfer.attach(model):
        headinfer.read_context(model, ids(150), tmp_path / "a.ctx")
    other = copy.deepcopy(model)
    change(other)
    with headinfer.attach(other) as run:
        with pytest.raises(SnapshotMismatch, match="belongs to another model") as caught:
            headinfer.load_context(other, tmp_path / "a.ctx")
        assert run.cache is None
    assert name in [item[0] for item in caught.value.differences]


def test_other_versions_are_refused_unless_accepted(
    llama: Any, ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with headinfer.attach(llama):
        headinfer.read_context(llama, ids(150), tmp_path / "a.ctx")
        monkeypatch.setattr(torch, "__version__", "9.9.0+x")
        said = r"versions.torch was .* and is 9\.9\..*--other-versions"
        with pytest.raises(SnapshotMismatch, match=said):
            headinfer.load_context(llama, tmp_path / "a.ctx")
        headinfer.load_context(llama, tmp_path / "a.ctx", other_versions=True)


def test_a_fingerprint_is_the_same_in_another_process_and_on_another_copy(build: Any) -> None:
    one, other = fingerprint_of(build("llama")), fingerprint_of(copy.deepcopy(build("llama")))
    assert one == other
    with headinfer.attach(model := build("llama")):
        assert fingerprint_of(model) == one
    assert differences({**one, "tokenizer": "x"}, one) == []
    assert differences({**one, "tokenizer": "x"}, {**one, "tokenizer": "y"}) != []


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    model = ZOO["t5"].build()
    with headinfer.attach(model), pytest.raises(headinfer.InputError, match="encoder-decoder"):
        headinfer.read_context(model, tokens_of(), tmp_path / "a.ctx")

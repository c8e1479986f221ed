# SPDX-License-Identifier: Apache-2.0
"""Models by name: folders, GGUF files, hub ids, and every way a name can be wrong."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from headinfer.errors import InputError
from headinfer.hf.load import load_model, load_shape
from headinfer.testing.folders import write_tiny_gguf, write_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (TypeError, ImportError):  # the second while it looks for a slow tokenizer instead
        pytest.skip("this transformers cannot read a GGUF file with a single merge")
    return path


def test_a_folder_loads_as_stored(folder: Path) -> None:
    model, tokenizer = load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer("abc")["input_ids"] == tokenizer("abcd")["input_ids"][:3]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_type_can_be_chosen(folder: Path, name: str) -> None:
    model, _ = load_model(str(folder), name, "cpu")
    assert model.dtype == getattr(torch, name)


def test_a_gguf_file_and_its_folder_are_the_same_model(gguf_file: Path) -> None:
    by_file, tokenizer = load_model(str(gguf_file), device="cpu")
    by_folder, _ = load_model(str(gguf_file.parent), device="cpu")
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(by_file(ids).logits, by_folder(ids).logits)


def test_loading_leaves_bars_and_logging_as_they_were(gguf_file: Path) -> None:
    from tqdm.auto import tqdm
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), tqdm.__init__)
    load_model(str(gguf_file), device="cpu")
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled(), tqdm.__init__)


def test_loading_prints_nothing(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(gguf_file), device="cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_shape_has_the_type_that_loading_takes(gguf_file: Path, device: str) -> None:
    """On a CPU float32, elsewhere bfloat16; a plan in another type is of another run."""
    config, weight_bytes, _ = load_shape(str(gguf_file), device=device)
    expected = torch.float32 if device == "cpu" else torch.bfloat16
    assert config.dtype == expected
    model, _ = load_model(str(gguf_file), device="cpu")
    assert weight_bytes == sum(w.numel() for w in model.parameters()) * expected.itemsize


def test_the_shape_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    config, weight_bytes, _ = load_shape(str(tmp_path))
    model, _ = load_model(str(folder), device="cpu")
    assert weight_bytes == sum(weight.numel() * 4 for weight in model.parameters())
    assert config.num_hidden_layers == 2
    half, half_bytes, _ = load_shape(str(tmp_path), "bfloat16")
    assert (half.dtype, half_bytes) == (torch.bfloat16, weight_bytes // 2)


def test_a_broken_folder_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_model(str(tmp_path), device="cpu")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(InputError, match=r"cannot be loaded: .*no file named"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"no header at all")
    with pytest.raises(InputError, match=r"cannot be loaded: .*header"):
        load_model(str(tmp_path), device="cpu")


def test_a_model_that_is_no_decoder_is_one_short_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match="not a decoder that generates text") as caught:
        load_model(str(tmp_path), device="cpu")
    assert len(str(caught.value)) < 400


def test_two_gguf_files_in_a_folder_are_a_question(gguf_file: Path, tmp_path: Path) -> None:
    shutil.copy(gguf_file, tmp_path / "a.gguf")
    shutil.copy(gguf_file, tmp_path / "b.gguf")
    with pytest.raises(InputError, match="2 GGUF files: name one of them"):
        load_model(str(tmp_path), device="cpu")


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF is not what follows")
    with pytest.raises(InputError, match=r"x\.gguf cannot be loaded"):
        load_model(str(tmp_path / "x.gguf"), device="cpu")


@pytest.mark.parametrize("percent", [0, 0.5, 1.5, 2, 3, 3.4, 5, 50, 96])
def test_a_gguf_file_cut_short_is_an_incomplete_download(
    gguf_file: Path, tmp_path: Path, percent: float
) -> None:
    data = gguf_file.read_bytes()
    size = int(len(data) * percent / 100)
    (tmp_path / "x.gguf").write_bytes(data[:size])
    with pytest.raises(InputError, match=rf"incomplete download\? x\.gguf: {size:,} bytes"):
        load_model(str(tmp_path / "x.gguf"), device="cpu")


def test_weights_cut_short_are_an_incomplete_download(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    size = len(data) // 2
    with pytest.raises(InputError, match=rf"incomplete download\? its weights: {size:,} bytes"):
        load_model(str(tmp_path), device="cpu")


def test_a_folder_without_a_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer \(tokenizer\.json"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{}", "no model_type"), ("[]", "no model_type"), ('{"model_type": "lla', "not JSON")],
)
def test_a_config_that_says_nothing_is_named(
    folder: Path, tmp_path: Path, text: str, reason: str
) -> None:
    model = tmp_path / "llama"  # a name that transformers would take for the kind of model
    shutil.copytree(folder, model)
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"config\.json in .*{reason}"):
        load_model(str(model), device="cpu")
    with pytest.raises(InputError, match=rf"config\.json in .*{reason}"):
        load_shape(str(model))


def test_code_that_comes_with_a_model_is_not_run_unasked(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "home-made", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemError('it was run')")
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "~/no/such", "a/b/c", "no.gguf"])
def test_a_path_is_not_asked_of_a_hub(name: str) -> None:
    with pytest.raises(InputError, match="there is no folder or file"):
        load_model(name, device="cpu")


def test_a_hub_id_without_a_hub_fails_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(InputError, match="the model hub cannot be reached"):
        load_model("no-one/nothing", device="cpu")
    assert time.perf_counter() - started < 15


def test_devices_and_types_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match="not a device"):
        load_model("/no/such", device="abacus")
    with pytest.raises(InputError, match=r"sees \d+ CUDA devices"):
        load_model("/no/such", device="cuda:99")


def test_an_unknown_type_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="use one of auto, float32"):
        load_model(str(folder), "int3", "cpu")

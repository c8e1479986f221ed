# SPDX-License-Identifier: Apache-2.0
"""A model and its tokenizer from what a user names: a folder, a GGUF file, a hub id, or "demo".

Every way a name can be wrong becomes one `InputError` with the remedy, and a hub that cannot be
reached is noticed in seconds. Nothing here knows what the model is for.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headinfer.errors import InputError
from headinfer.geometry import Weights
from headinfer.hf.demo_model import OnStep, demo_folder
from headinfer.hf.quiet import quiet_transformers

DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_TIMEOUT_S = 5.0
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "tekken")
"""How names of a tokenizer's files begin, whatever the model; or they end like these:"""
TOKENIZER_ENDINGS = (".model", ".tiktoken")
CONFIG_KINDS = ("model_type", "architectures", "auto_map")
CUT_SHORT = ("reshape", "mmap", "buffer", "magic", "incomplete", "codec can't decode")
"""What libraries say of a file that ends too early."""


@dataclass(frozen=True, slots=True)
class Source:
    """Arguments of `from_pretrained` for one model.

    Attributes:
        name: what the user wrote.
        path: folder or hub id.
        gguf_file: name of the GGUF file inside `path`.
        local: nothing has to be asked of a hub.
    """

    name: str
    path: str
    gguf_file: str | None = None
    local: bool = True

    def arguments(self, *, trust_remote_code: bool) -> dict[str, Any]:
        # False, not unset: unset asks on the terminal and waits for an answer.
        given: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if self.local:
            given["local_files_only"] = True
        if self.gguf_file is not None:
            given["gguf_file"] = self.gguf_file
        return given


def load_model(
    source: str,
    dtype: str | None = None,
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
    on_step: OnStep | None = None,
) -> tuple[Any, Any]:
    """The model, in evaluation mode on `device`, and its tokenizer.

    Args:
        source: local folder, GGUF file, hub id, or "demo" for the embedded SmolLM2-135M-Instruct.
        dtype: one of `DTYPES`; None is as stored, but float32 for the demo and for GGUF files on a
            CPU, where half precision gains nothing.
        device: a torch device; None is CUDA where there is one, else the CPU.
        trust_remote_code: run Python code that comes with the model.
        on_step: told how preparing the demo model gets on.

    Raises:
        InputError: there is no such model, device or dtype, or the model cannot be read.
    """
    place = _device(device)
    found = _find(source, on_step)
    _check_tokenizer(found)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = found.arguments(trust_remote_code=trust_remote_code)
    with quiet_transformers(keep_bars=not found.local), _explained(found):
        tokenizer = AutoTokenizer.from_pretrained(found.path, **arguments)
        model = AutoModelForCausalLM.from_pretrained(
            found.path, dtype=_dtype(dtype, found, place), **arguments
        )
        return _move(model.eval(), place), tokenizer


class ModelShape(NamedTuple):
    """A model without its weights.

    Attributes:
        config: transformers' config, with the element type the weights will have.
        weight_bytes: of all weights and buffers, as they will be stored.
        weights: more about them.
    """

    config: Any
    weight_bytes: int
    weights: Weights


def load_shape(
    source: str,
    dtype: str | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_step: OnStep | None = None,
) -> ModelShape:
    """The model's config, with the element type it would be loaded in on `device`, and the bytes of its
    weights.

    No weight is read: the model is built on torch's meta device, and weights that the config says
    are quantised are counted as they are stored.

    Raises:
        InputError: there is no such model, or its config lacks what its size depends on.
    """
    import torch

    found = _find(source, on_step)
    _check_sizes(found)
    from transformers import AutoConfig, AutoModelForCausalLM

    from headinfer.hf.weights import quantization_of, weights_to_come

    with quiet_transformers(keep_bars=not found.local), _explained(found):
        arguments = found.arguments(trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(found.path, **arguments)
        chosen = _dtype(dtype, found, torch.device(device))
        if chosen != "auto":
            config.dtype = chosen
        stored = quantization_of(config)
        plain = copy.deepcopy(config)
        plain.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                plain, dtype=config.dtype, trust_remote_code=trust_remote_code
            )
    return ModelShape(config, *weights_to_come(model, stored))


def _check_sizes(found: Source) -> None:
    """Raises InputError for a config.json without the sizes of its model: transformers would fill
    in those of another one."""
    path = Path(found.path) / "config.json"
    if found.gguf_file is not None or not path.is_file():
        return
    given = json.loads(path.read_text(encoding="utf-8"))
    if "auto_map" in given:  # code of its own has names of its own
        return
    parts = [given, *(part for part in given.values() if isinstance(part, dict))]
    known = {name: value for part in parts for name, value in part.items()}
    missing = [what for what, names in _SIZES.items() if not set(names) & set(known)]
    if missing:
        raise InputError(
            f"config.json of {found.name} does not say {' and '.join(missing)}, and transformers' "
            "defaults are the sizes of some other model; take the file that belongs to the weights"
        )
    for name in {name for names in _SIZES.values() for name in names} & set(known):
        value = known[name]
        if isinstance(value, int) and value < 1:
            raise InputError(
                f"config.json of {found.name} has {name}={value}; a model has at least 1. Take the "
                "file that belongs to the weights"
            )


_SIZES = {
    "how wide the model is (hidden_size)": (
        "hidden_size",
        "d_model",
        "n_embd",
        "dim",
        "model_dim",
        "hidden_dim",
    ),
    "how many layers it has (num_hidden_layers)": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "num_decoder_layers",
        "layer_types",
        "layers_block_type",
        "block_types",
    ),
    "how many tokens it knows (vocab_size)": ("vocab_size", "n_vocab", "vocabulary_size"),
}
"""What a size is called in configs, whatever the model."""


def _find(source: str, on_step: OnStep | None) -> Source:
    if source == "demo":
        return Source(source, str(demo_folder(on_step)))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(source, path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{source} is a file but not a GGUF file; name the folder it is in, or a .gguf file"
            )
        return Source(source, str(path.parent), gguf_file=path.name)
    if _looks_like_path(source):
        raise InputError(
            f"there is no folder or file {source}; name a folder with safetensors weights, a GGUF "
            "file, the id of a model on a hub, or demo"
        )
    return _on_hub(source)


def _folder(source: str, path: Path) -> Source:
    if (path / "config.json").is_file():
        _check_config(source, path / "config.json")
        return Source(source, str(path))
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return Source(source, str(path), gguf_file=files[0])
    detail = f"{len(files)} GGUF files: name one of them" if files else "no config.json in it"
    raise InputError(f"the folder {source} is not a model that can be loaded: {detail}")


def _check_config(source: str, path: Path) -> None:
    """Raises InputError for a config.json that does not say what it is the config of."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and Unicode errors both are
        raise InputError(
            f"{path.name} in {source} is not JSON ({error}); an incomplete download? "
            f"{path.stat().st_size:,} bytes"
        ) from error
    if not isinstance(config, dict) or not set(CONFIG_KINDS) & set(config):
        raise InputError(
            f"{path.name} in {source} has no model_type, so the kind of model is not known; "
            "take the file that belongs to the weights"
        )


def _check_tokenizer(found: Source) -> None:
    """Raises InputError for a folder without one: some tokenizers would start empty instead."""
    folder = Path(found.path)
    if found.gguf_file is not None or not folder.is_dir():
        return
    names = [file.name for file in folder.iterdir()]
    if not any(
        name.startswith(TOKENIZER_FILES) or name.endswith((*TOKENIZER_ENDINGS, ".py"))
        for name in names
    ):
        raise InputError(
            f"the folder {found.name} has no tokenizer (tokenizer.json, tokenizer_config.json, "
            "tokenizer.model ...). Copy its files from where the model came from, or write them "
            "there with tokenizer.save_pretrained"
        )


def _looks_like_path(source: str) -> bool:
    is_id = source.count("/") <= 1 and source[:1] not in {"/", ".", "~", "\\", ""}
    return not is_id or source.lower().endswith(".gguf")


def _on_hub(source: str) -> Source:
    """A hub id; from the local hub cache alone if the hub does not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Source(source, source)
    return Source(source, source, local=not _hub_answers())


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # noqa: BLE001  whatever the HTTP library raises: the hub is out of reach
        return False
    return True


def _device(device: str | None) -> Any:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={device!r} is not a device; use cpu, cuda or cuda:N") from error
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise InputError(
                f"device={device!r} was asked for, but torch {torch.__version__} sees {count} CUDA "
                "devices; use --device cpu, or install a torch with CUDA and check the driver"
            )
    return place


def _dtype(dtype: str | None, found: Source, place: Any) -> Any:
    import torch

    if dtype is None or dtype == "auto":
        on_cpu = place.type == "cpu"
        if found.gguf_file is not None:
            return torch.float32 if on_cpu else torch.bfloat16
        return torch.float32 if found.name == "demo" and on_cpu and dtype is None else "auto"
    return element_type(dtype)


def element_type(dtype: str) -> Any:
    """torch's type of one of `DTYPES` other than "auto".

    Raises:
        InputError: it is none of them.
    """
    import torch

    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _move(model: Any, place: Any) -> Any:
    import torch

    try:
        return model.to(place)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(place)
        weights = model.get_memory_footprint()
        raise InputError(
            f"the weights do not fit on {place}: {weights} bytes are needed, {free} of {total} "
            "are free. Use --dtype bfloat16, --device cpu, or a smaller model"
        ) from error


@contextlib.contextmanager
def _explained(found: Source) -> Iterator[None]:
    """Turn what transformers raises for an unusable model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        ImportError,
        LookupError,
        OverflowError,
        EOFError,
        struct.error,
        SafetensorError,
    ) as error:
        raise InputError(_reason(found, error)) from error


def _reason(found: Source, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"it has no {text}"
    if text.startswith("Unrecognized configuration class"):  # and then every known one
        text = "it is not a decoder that generates text (transformers' AutoModelForCausalLM)"
    if "trust_remote_code" in text:
        return (
            f"{found.name} brings its own Python code, which is not run unasked; read it, then use "
            "--trust-remote-code (trust_remote_code=True)"
        )
    if Path(found.path).is_dir():
        return f"the model {found.name} cannot be loaded: {text}{_cut_short(found, error)}"
    if found.local:
        offline = os.environ.get("HF_HUB_OFFLINE")
        why = "HF_HUB_OFFLINE is set" if offline else "the model hub cannot be reached"
        return (
            f"there is no folder {found.name}, the model is not in the local hub cache, and "
            f"{why}. Name a local folder or a GGUF file, or use demo"
        )
    return f"the model {found.name} cannot be loaded from the hub: {text}"


def _cut_short(found: Source, error: Exception) -> str:
    """The guess that a file is not complete, where the error looks like it."""
    said = any(words in str(error).lower() for words in CUT_SHORT)
    if not said and not isinstance(error, (struct.error, IndexError, OverflowError, EOFError)):
        return ""
    name = found.gguf_file or "its weights"
    files = [Path(found.path, found.gguf_file)] if found.gguf_file else _weights(found)
    size = sum(file.stat().st_size for file in files)
    return f". An incomplete download? {name}: {size:,} bytes"


def _weights(found: Source) -> list[Path]:
    return [file for file in Path(found.path).iterdir() if file.suffix in (".safetensors", ".bin")]


__all__ = ["DTYPES", "ModelShape", "OnStep", "load_model", "load_shape"]

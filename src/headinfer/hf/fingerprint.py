# SPDX-License-Identifier: Apache-2.0
"""Which model a context belongs to: what has to be equal for its keys and values to mean the same.

Weights are told apart by a hash over a sample of every parameter: cheap, the same on every device,
and different for another checkpoint, a merged adapter or another quantization. A change to single
elements outside the sample is not noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from headinfer.errors import SnapshotMismatch

SAMPLES = 256
"""Elements of each parameter that are hashed, evenly spread, first and last among them."""

VOLATILE = (
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "architectures",
)
"""Entries of a config that do not change keys and values, or are compared under their own name."""

VERSIONS = "versions"


def fingerprint_of(model: PreTrainedModel, tokenizer: Any = None) -> dict[str, Any]:
    """Plain values, equal for equal models; `tokenizer` is None where none was given."""
    return {
        "model": type(model).__name__,
        "weights": _weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _config(model.config),
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
        VERSIONS: {
            "torch": _minor(torch.__version__),
            "transformers": _minor(transformers.__version__),
        },
    }


def check_fingerprint(
    folder: Path, saved: Mapping[str, Any], here: Mapping[str, Any], *, other_versions: bool
) -> None:
    """Nothing if a context with fingerprint `saved` belongs to the model with fingerprint `here`.

    Raises:
        SnapshotMismatch: with what differs.
    """
    found = differences(saved, here)
    if other_versions:
        found = [item for item in found if not item[0].startswith(f"{VERSIONS}.")]
    if not found:
        return
    lines = [f"{name} was {_short(was)} and is {_short(now)}" for name, was, now in found]
    said = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
    only_versions = all(name.startswith(f"{VERSIONS}.") for name, _, _ in found)
    remedy = (
        "Its keys and values stay usable if that changed nothing about the model: "
        "--other-versions (other_versions=True) goes on; or read the text again"
        if only_versions
        else "Load the model it was made with, or save to another folder"
    )
    raise SnapshotMismatch(
        f"the context {folder} belongs to another model: {said}. {remedy}",
        differences=found,
    )


def differences(
    saved: Mapping[str, Any], here: Mapping[str, Any]
) -> list[tuple[str, object, object]]:
    """Name, saved value, value here; a tokenizer that one side lacks is not compared."""
    was, now = _flat(saved), _flat(here)
    for flat, other in ((was, now), (now, was)):
        if flat.get("tokenizer", "") is None:
            for name in [name for name in other if name.split(".")[0] == "tokenizer"]:
                del other[name]
            flat.pop("tokenizer", None)
    names = list(dict.fromkeys([*was, *now]))
    missing = "nothing"
    pairs = [(name, was.get(name, missing), now.get(name, missing)) for name in names]
    return [(name, old, new) for name, old, new in pairs if old != new]


def _weights(model: PreTrainedModel) -> str:
    """SHA-256 over name, shape, type and a sample of every parameter and lasting buffer."""
    found = hashlib.sha256()
    lasting = set(model.state_dict(keep_vars=True))
    named = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in lasting
    }
    for name in sorted(named):
        tensor = named[name]
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(_sample(tensor))
    return found.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """Bytes of up to `SAMPLES` elements; of weights that are elsewhere (meta), none."""
    if tensor.device.type == "meta" or not tensor.numel():
        return b""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    places = [(flat.numel() - 1) * i // max(count - 1, 1) for i in range(count)]
    chosen = flat[torch.tensor(places, device=flat.device)].cpu().contiguous()
    data: bytes = chosen.view(torch.uint8).numpy().tobytes()
    return data


def _config(config: Any) -> dict[str, Any]:
    text = json.dumps(_without(config.to_dict(), VOLATILE), sort_keys=True, default=str)
    plain: dict[str, Any] = json.loads(text)
    return plain


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {str(k): _without(v, names) for k, v in value.items() if k not in names}
    return [_without(item, names) for item in value] if isinstance(value, (list, tuple)) else value


def _tokenizer(tokenizer: Any) -> str:
    """SHA-256 over what turns text into ids, the chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Set by whoever called it last; neither is used here.
        rules.pop("truncation", None)
        rules.pop("padding", None)
        text = json.dumps(rules, sort_keys=True)
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = str(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256("\n".join((text, special, template)).encode()).hexdigest()


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _flat(item, f"{prefix}.{name}" if prefix else name)
    return found


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text[:80]

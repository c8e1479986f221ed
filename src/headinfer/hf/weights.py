# SPDX-License-Identifier: Apache-2.0
"""Counts a model's weights: of a model on torch's meta device as they will be stored, and of a
loaded one as they lie, accelerate's offloading included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from headinfer.geometry import Weights
from headinfer.quantised import StoredBits, stored_bits

EXPERTS = ".experts."
"""In the name of every parameter that belongs to one expert of a mixture, or to all in one tensor."""


def quantization_of(config: PreTrainedConfig) -> StoredBits | None:
    """How the config says that weights are stored; None if they are in the model's own type.

    Raises:
        InputError: by a method that is not known.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return stored_bits(found if isinstance(found, Mapping) else found.to_dict())


def compute_device(model: nn.Module) -> torch.device:
    """Where a model computes: where its weights are, or where accelerate brings them."""
    device: torch.device | None = getattr(model, "device", None)
    if device is not None and device.type != "meta":
        return device
    for part in model.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    return device or torch.device("cpu")


def on_one_device(model: nn.Module) -> bool:
    """Whether all weights are where the model computes, so that all its layers compute there."""
    device = compute_device(model)
    return all(weight.device == device for weight in model.parameters())


def weights_to_come(model: PreTrainedModel, stored: StoredBits | None) -> tuple[int, Weights]:
    """Bytes of a model on the meta device once its weights are there, and more about them."""
    linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}
    own = _embeddings(model)
    head = model.get_output_embeddings()
    head_id = id(head.weight) if head is not None else 0
    active = active_share(model.config)
    total = token_params = token_bytes = 0.0
    for name, weight in model.named_parameters():
        expert = EXPERTS in name
        quantised = (
            stored is not None
            and id(weight) not in own
            and (id(weight) in linear or (expert and stored.experts and weight.dim() == 3))
            and not stored.skips(name)
        )
        size = float(weight.numel() * weight.element_size())
        if quantised and stored is not None:
            size = weight.numel() * stored.bits / 8 + weight.shape[-1] * stored.per_input_bytes
        total += size
        share = active if expert else 1.0
        if id(weight) == head_id:
            token_bytes += size
        elif id(weight) not in own:
            token_bytes += share * size
            token_params += share * weight.numel() if weight.dim() > 1 else 0
    return math.ceil(total), Weights(int(token_params), int(token_bytes))


def weights_there(model: PreTrainedModel) -> Weights:
    """More about the weights of a loaded model; what is on its device is counted elsewhere."""
    own = _embeddings(model)
    head = model.get_output_embeddings()
    head_id = id(head.weight) if head is not None and hasattr(head, "weight") else 0
    active = active_share(model.config)
    packed, token_params, token_bytes = False, 0.0, 0.0
    for name, weight in model.named_parameters():
        share = active if EXPERTS in name else 1.0
        if id(weight) == head_id or id(weight) not in own:
            token_bytes += share * weight.numel() * weight.element_size()
        if id(weight) not in own and weight.dim() > 1:
            packed = packed or not weight.is_floating_point() or weight.element_size() < 2
            token_params += share * weight.numel()
    found = Weights(0 if packed else int(token_params), int(token_bytes))
    return _with_offloaded(found, model)


def _with_offloaded(found: Weights, model: PreTrainedModel) -> Weights:
    host = disk = largest = 0
    for name, size in _offloaded(model):
        largest = max(largest, size)
        if _place(model, name) == "disk":
            disk += size
        else:
            host += size
    moved = host + disk
    # What is brought over the link is not read from the device's memory at its rate on top.
    kept = max(found.token_bytes - moved, 0)
    return replace(
        found, token_bytes=kept, host_bytes=host, disk_bytes=disk, largest_moved_bytes=largest
    )


def _offloaded(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Modules whose weights accelerate brings before and drops after every call, and their bytes."""
    for name, part in model.named_modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if one is None or not getattr(one, "offload", False):
                continue
            whole = bool(getattr(one, "place_submodules", False))
            tensors: list[Tensor] = list(part.parameters(recurse=whole))
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if size:
                yield name, size


def _place(model: PreTrainedModel, name: str) -> str:
    """Where accelerate's device map puts a module: the entry with the longest name around it."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    around = [key for key in places if not key or name == key or name.startswith(f"{key}.")]
    return str(places[max(around, key=len)]) if around else "cpu"


def active_share(config: PreTrainedConfig) -> float:
    """Of a mixture's experts, those that one token passes."""
    text = config.get_text_config(decoder=True)
    active = getattr(text, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    counts = (getattr(text, name, None) for name in names)
    count = next((found for found in counts if isinstance(found, int) and found > 0), None)
    if not isinstance(active, int) or count is None:
        return 1.0
    return min(active / count, 1.0)


def _embeddings(model: PreTrainedModel) -> set[int]:
    """Tables of which a token reads one row, and the output projection, which is counted by itself."""
    found = set()
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(part, "weight", None)
        if isinstance(weight, torch.Tensor):
            found.add(id(weight))
    return found

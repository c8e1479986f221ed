# SPDX-License-Identifier: Apache-2.0
"""What layers of transformers hold besides head-wise keys and values: windows, recurrent states.

Written down attribute by attribute, as tensors and plain values, and put back into a layer that
transformers made from the same config; so no kind of layer is known by name here. What is neither
a tensor nor a plain value is refused rather than forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headinfer.errors import SnapshotError
from headinfer.hf.cache import HeadLayer

OURS = ("backing", "index", "length")
"""Attributes of head-wise layers that are restored with their blocks."""

PLAIN = (bool, int, float, str, type(None))
DEVICE = "device"


def state_of(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, cloned where they are, and plain values of a stock layer or the stock half of one.

    Raises:
        SnapshotError: it holds something of another kind.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in _leaves(layer):
        if isinstance(value, Tensor):
            tensors[name] = value.detach().clone()
        elif isinstance(value, torch.device):
            values[name] = DEVICE  # where the model is when it is loaded
        elif isinstance(value, torch.dtype):
            values[name] = str(value)
        elif isinstance(value, PLAIN):
            values[name] = value
        else:
            raise SnapshotError(
                f"{type(layer).__name__} keeps {name} as {type(value).__name__}, which a saved "
                "context has no place for; this model's contexts cannot be saved"
            )
    return tensors, values


def put_back(
    layer: Any, tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device
) -> None:
    """`layer`, as new, holds what `state_of` found."""
    for name, tensor in tensors.items():
        _set(layer, name, tensor.to(device).clone())
    for name, value in values.items():
        if value == DEVICE:
            value = device
        elif isinstance(value, str) and value.startswith("torch."):
            value = getattr(torch, value.removeprefix("torch."))
        _set(layer, name, value)


def _leaves(layer: Any) -> Iterator[tuple[str, Any]]:
    skipped = OURS if isinstance(layer, HeadLayer) else ()
    for name, value in vars(layer).items():
        if name in skipped:
            continue
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}.{key}", item) for key, item in enumerate(value))
        else:
            yield name, value


def _set(layer: Any, path: str, value: Any) -> None:
    name, _, key = path.partition(".")
    if not key:
        setattr(layer, name, value)
        return
    held = getattr(layer, name)
    if isinstance(held, dict):
        matching = [known for known in held if str(known) == key]
        held[matching[0] if matching else key] = value
    else:
        changed = list(held)
        changed[int(key)] = value
        setattr(layer, name, type(held)(changed))

# SPDX-License-Identifier: Apache-2.0
"""What a model calls its cache: `cache` since transformers 5.24, `past_key_values` before and in
models that bring their own code.

The name is read off the forward pass of the model in hand, so that neither a version number nor a
deprecated argument is needed.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers import PreTrainedModel

from headinfer.errors import UnsupportedModel

NAMES = ("past_key_values", "cache")
"""In the order they are looked for: a forward pass that still has the old name means that one."""


def cache_name(model: PreTrainedModel) -> str:
    """The argument that `model` takes its cache by.

    Raises:
        UnsupportedModel: it takes none.
    """
    for forward in (model.forward, model.base_model.forward):
        parameters = signature(forward).parameters
        for name in NAMES:
            if name in parameters:
                return name
    raise UnsupportedModel(
        f"{type(model).__name__} takes no cache (its forward has no {' or '.join(NAMES)}), so there "
        "are no keys and values to keep elsewhere; run it without headinfer"
    )


def cache_argument(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """`cache` under its name, for a forward pass or `generate()` of `model`."""
    return {cache_name(model): cache}


def names_for(name: str) -> tuple[str, ...]:
    """What a model that calls its cache `name` may be given it by: the old name is understood by
    all, but the new one means something else to those that have the old one."""
    return NAMES if name == "cache" else (name,)


def cache_given(arguments: dict[str, Any], name: str = "cache") -> Any:
    """The cache among the arguments of a forward pass of a model that calls it `name`."""
    found = (arguments.get(known) for known in names_for(name))
    return next((cache for cache in found if cache is not None), None)


def cache_returned(output: Any) -> Any:
    """The cache in a model's output."""
    return cache_given(dict(output.items()))

# SPDX-License-Identifier: Apache-2.0
"""Bits a quantised weight takes where it is stored, read off a model's quantization_config.

Scales and zero points are counted in. Knows dictionaries as transformers writes them and no
tensors; which weights of a model are meant is the business of `headinfer.hf.weights`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from typing import Any

from headinfer.errors import InputError

BNB_BLOCK = 64
"""Weights that share a scale in the 4-bit formats of bitsandbytes."""
BNB_SCALES_TOGETHER = 256
"""... and scales that share one themselves with double quantisation."""
MX_BLOCK = 32
"""Weights that share an 8-bit exponent in the OCP microscaling formats."""


@dataclass(frozen=True, slots=True)
class StoredBits:
    """How the linear layers of a model are stored.

    Attributes:
        method: as the config names it.
        bits: per weight, scales and zero points included.
        skipped: names of modules that keep the model's type, or parts of them, with * for anything,
            or regular expressions after "re:".
        per_input_bytes: bytes per input feature of a layer on top (GPTQ's group index).
        experts: weights of experts that lie in one tensor are stored so, too.
    """

    method: str
    bits: float
    skipped: tuple[str, ...] = ()
    per_input_bytes: int = 0
    experts: bool = True

    def skips(self, name: str) -> bool:
        """The module of parameter `name` keeps the model's type."""
        return any(
            bool(re.match(part[3:], name)) if part.startswith("re:") else fnmatch(name, f"*{part}*")
            for part in self.skipped
        )


def stored_bits(config: Mapping[str, Any]) -> StoredBits:
    """What a config's `quantization_config` says.

    Raises:
        InputError: a method that is not known here, or one without the numbers it needs.
    """
    method = str(config.get("quant_method") or _guessed(config)).lower().replace("_", "-")
    read = METHODS.get(method)
    if read is None:
        raise InputError(
            f"the weights are stored by the method {method!r}, whose bytes are not known here; known: "
            f"{', '.join(METHODS)}. Plan with the config of the model before it was quantised, or "
            "load the model and attach: loaded weights are counted as they are"
        )
    try:
        return read(method, config)
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"the quantization_config of method {method!r} is not complete ({error!r}), so the bytes "
            "of the weights are not known; take the config.json that belongs to the weights"
        ) from error


def _guessed(config: Mapping[str, Any]) -> str:
    """bitsandbytes' first configs did not name themselves."""
    return "bitsandbytes" if "load_in_4bit" in config or "load_in_8bit" in config else "unknown"


def _bitsandbytes(method: str, config: Mapping[str, Any]) -> StoredBits:
    skipped = _names(config.get("llm_int8_skip_modules"))
    if config.get("load_in_4bit"):
        scale = 32 / BNB_BLOCK
        if config.get("bnb_4bit_use_double_quant"):
            scale = 8 / BNB_BLOCK + 32 / (BNB_BLOCK * BNB_SCALES_TOGETHER)
        return StoredBits(method, 4 + scale, skipped, experts=False)
    if config.get("load_in_8bit"):
        return StoredBits(method, 8.0, skipped, experts=False)
    raise ValueError("neither load_in_4bit nor load_in_8bit")


def _groups(method: str, config: Mapping[str, Any]) -> StoredBits:
    """GPTQ and AWQ: a 16-bit scale and a packed zero point per group."""
    bits, group = int(config["bits"]), int(config.get("group_size", 128))
    if bits < 1:
        raise ValueError(f"bits={bits}")
    shared = 0.0 if group < 1 else (16 + bits) / group
    skipped = _names(config.get("modules_to_not_convert"))
    return StoredBits(method, bits + shared, skipped, 4 if method == "gptq" else 0)


def _fp8(method: str, config: Mapping[str, Any]) -> StoredBits:
    block = config.get("weight_block_size")
    shared = 32 / (int(block[0]) * int(block[1])) if block else 0.0
    return StoredBits(method, 8 + shared, _names(config.get("modules_to_not_convert")))


def _mxfp4(method: str, config: Mapping[str, Any]) -> StoredBits:
    return StoredBits(method, 4 + 8 / MX_BLOCK, _names(config.get("modules_to_not_convert")))


def _compressed(method: str, config: Mapping[str, Any]) -> StoredBits:
    group: Mapping[str, Any] = next(iter(config["config_groups"].values()), {})
    weights = group["weights"]
    bits, size = float(weights["num_bits"]), int(weights.get("group_size") or 0)
    shared = 16 / size if size > 0 else 0.0
    return StoredBits(method, bits + shared, _names(config.get("ignore")))


def _quanto(method: str, config: Mapping[str, Any]) -> StoredBits:
    digits = "".join(c for c in str(config["weights"]) if c.isdigit())
    return StoredBits(method, float(digits), _names(config.get("modules_to_not_convert")))


def _hqq(method: str, config: Mapping[str, Any]) -> StoredBits:
    params = config["quant_config"]["weight_quant_params"]
    bits, group = float(params["nbits"]), int(params.get("group_size") or 0)
    return StoredBits(
        method, bits + (32 / group if group else 0.0), _names(config.get("skip_modules"))
    )


METHODS: dict[str, Callable[[str, Mapping[str, Any]], StoredBits]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _groups,
    "awq": _groups,
    "fp8": _fp8,
    "fbgemm-fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "quanto": _quanto,
    "hqq": _hqq,
    "eetq": lambda method, config: StoredBits(
        method, 8.0, _names(config.get("modules_to_not_convert"))
    ),
}


def _names(found: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in found or ())

# SPDX-License-Identifier: Apache-2.0
"""Reads a model's geometry off its transformers config, and free memory off the machine.

The kinds of layers come from the cache transformers itself would build, so no model is known by
name here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from headinfer.attention.api import AUTO, why_not
from headinfer.attention.types import AttentionSpec
from headinfer.budget import MemoryBudget, format_bytes
from headinfer.errors import UnsupportedModel
from headinfer.geometry import Geometry, LayerGeometry, LayerKind, Weights
from headinfer.hf.remembered import known_rates
from headinfer.hf.weights import active_share
from headinfer.options import Options
from headinfer.surroundings import HostMemory, host_memory
from headinfer.tiers.disk import free_bytes

GPU_SHARE = 0.95
"""Of the GPU memory that is free now, what a run takes unless told otherwise."""
DISK_SHARE = 0.98
"""Of what is free in a folder: file systems keep accounts of their own."""


def geometry_of(
    config: PreTrainedConfig, *, weight_bytes: int = 0, weights: Weights | None = None
) -> Geometry:
    """The geometry of a model with this config.

    Raises:
        UnsupportedModel: the config lacks a size that is needed.
    """
    text = config.get_text_config(decoder=True)
    stock = DynamicCache(config=config).layers
    configs = _layer_configs(text, len(stock))
    layers = tuple(_layer(layer, own) for layer, own in zip(stock, configs, strict=True))
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 2
    return Geometry(
        layers=layers,
        itemsize=itemsize,
        hidden_size=_hidden_size(text),
        intermediate_size=max(map(_intermediate_size, configs), default=0),
        vocab_size=int(getattr(text, "vocab_size", 0) or 0),
        weight_bytes=weight_bytes,
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 0),
        name=str(getattr(config, "model_type", "model")),
        weights=weights or Weights(),
        dtype=str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else "",
    )


def weight_bytes_of(model: PreTrainedModel, device: torch.device) -> int:
    """Bytes of parameters and buffers on `device`, shared ones counted once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device == device:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def layers_seen(count: int, key: Tensor, value: Tensor) -> Geometry:
    """The geometry of a cache made without a config, from its first update."""
    layer = LayerGeometry(
        LayerKind.FULL, key.shape[1], key.shape[-1], value.shape[-1], key.shape[1]
    )
    kind = str(key.dtype).removeprefix("torch.")
    return Geometry(layers=(layer,) * count, itemsize=key.element_size(), dtype=kind)


def resolve_budget(options: Options, device: torch.device) -> Options:
    """`options` with all budgets filled in from what is free now, near-data attention left to the
    plan only where it pays (a GPU, and a native kernel to do it), and the machine's rates.

    Raises:
        InputError: `options.disk` is not a folder.
    """
    budget = options.budget
    host, notes = budget.host_bytes, list(options.budget_reasons)
    if host is None:
        found, locks = memory_here(), device.type == "cuda"
        host = found.default_budget(page_locked=locks)
        notes.append(found.reason(page_locked=locks))
    gpu = budget.gpu_bytes
    if gpu is None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        mine = torch.cuda.memory_reserved(device)
        gpu = int((free + mine) * GPU_SHARE)
        notes.append(
            f"GPU memory: at most {format_bytes(gpu)}, {GPU_SHARE:.0%} of what is free now or held "
            "by this process"
        )
    near = options.near_data
    if near is None and device.type != "cpu" and (options.attention != AUTO or _no_host_kernel()):
        near = 0.0
    disk = budget.disk_bytes
    if options.disk is not None:
        free = int(free_bytes(options.disk) * DISK_SHARE)
        if disk is None or disk > free:
            notes.append(
                f"disk: at most {format_bytes(free)}, {DISK_SHARE:.0%} of what is free in "
                f"{options.disk}"
            )
        disk = free if disk is None else min(disk, free)
    budget = MemoryBudget(gpu_bytes=gpu, host_bytes=host, disk_bytes=disk)
    # What decides the chunk was measured in the type that models on a GPU have; on a CPU the type
    # decides nothing of the plan.
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    measured = (known_rates(device, dtype, options.disk) for dtype in dtypes)
    rates = next((found for found in measured if found is not None), None)
    return replace(options, budget=budget, near_data=near, rates=rates, budget_reasons=tuple(notes))


def memory_here() -> HostMemory:
    """What this process may take, asked of the system or, off Linux, of psutil."""
    found = host_memory()
    if found is None:
        memory = psutil.virtual_memory()
        found = HostMemory(memory.total, memory.available)
    return found


def _no_host_kernel() -> bool:
    """Whether decode on the CPU would run on torch's kernels, slower than bringing the keys."""
    decode = AttentionSpec("cpu", torch.bfloat16, 128, 128, 4, 1, False, False, False)
    return bool(why_not(decode).get("native", ["not there"]))


def _layer_configs(text: PreTrainedConfig, count: int) -> list[PreTrainedConfig]:
    """A config per layer: some models (Gemma 4) have layers of different shapes."""
    configs = list(getattr(text, "per_layer_config", None) or [])
    return configs if len(configs) == count else [text] * count


def _layer(layer: Any, text: PreTrainedConfig) -> LayerGeometry:
    if not isinstance(layer, CacheLayerMixin):
        kind = LayerKind.NONE if type(layer).__name__ == "DummyLayer" else LayerKind.STATE
        state = _state_bytes(text) if kind is LayerKind.STATE else 0
        return LayerGeometry(kind, state_bytes=state)
    heads, query_heads, key_dim, value_dim = _heads(text)
    if isinstance(layer, DynamicLayer) and getattr(layer, "is_sliding", False):
        window = int(getattr(layer, "sliding_window", 0) or 0)
        return LayerGeometry(LayerKind.SLIDING, heads, key_dim, value_dim, query_heads, window)
    attended = _expanded_dims(text) if getattr(text, "kv_lora_rank", None) is not None else (0, 0)
    return LayerGeometry(
        LayerKind.FULL, heads, key_dim, value_dim, query_heads, 0, attended[0], attended[1]
    )


def _state_bytes(text: PreTrainedConfig) -> int:
    """What a linear-attention or state-space layer keeps of one sequence, in float32 as most kernels
    want it: its states and the last inputs of its convolution. 0 where the config has other names."""

    def size(*names: str) -> int:
        found = (getattr(text, name, None) for name in names)
        return next((each for each in found if isinstance(each, int)), 0)

    keys, values = size("linear_num_key_heads"), size("linear_num_value_heads")
    key_dim, value_dim = size("linear_key_head_dim"), size("linear_value_head_dim")
    state = values * key_dim * value_dim
    width = 2 * keys * key_dim + values * value_dim
    if not state:  # Mamba and its kin
        width = size("mamba_intermediate_size", "mamba_d_ssm", "mamba_d_inner")
        width = width or size("mamba_expand", "expand") * _hidden_size(text)
        state = width * size("mamba_d_state", "ssm_state_size", "state_size")
    kernel = size("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "conv_kernel_size")
    return 4 * (state + width * kernel)


def _expanded_dims(text: PreTrainedConfig) -> tuple[int, int]:
    """Elements of a key and of a value once latents are expanded."""
    rotary = int(getattr(text, "qk_rope_head_dim", 0) or 0)
    plain = int(getattr(text, "qk_nope_head_dim", 0) or 0)
    return rotary + plain, int(getattr(text, "v_head_dim", 0) or 0) or plain


def _heads(text: PreTrainedConfig) -> tuple[int, int, int, int]:
    query_heads = _first(text, "num_attention_heads", "n_head", "decoder_attention_heads")
    heads = getattr(text, "num_key_value_heads", None)
    if heads is None:
        heads = 1 if getattr(text, "multi_query", False) else query_heads
    rank = getattr(text, "kv_lora_rank", None)
    if rank is not None:
        return 1, query_heads, int(rank), int(getattr(text, "qk_rope_head_dim", 0) or 0)
    dim = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    if dim is None:
        dim = _hidden_size(text) // max(query_heads, 1)
    value_dim = getattr(text, "v_head_dim", None) or dim
    return int(heads), query_heads, int(dim), int(value_dim)


def _hidden_size(text: PreTrainedConfig) -> int:
    return _first(text, "hidden_size", "d_model", "n_embd", "dim")


def _intermediate_size(text: PreTrainedConfig) -> int:
    """The MLP's width per token; a mixture counts the experts one token passes."""
    dense = 0
    for name in ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim"):
        size = getattr(text, name, None)
        if isinstance(size, (list, tuple)):
            size = max(size)
        if size:
            dense = int(size)
            break
    expert = getattr(text, "moe_intermediate_size", None)
    active = getattr(text, "num_experts_per_tok", None)
    if isinstance(active, int) and active > 0:
        if isinstance(expert, int):
            return max(dense, expert * active)
        if active_share(text) < 1:  # experts as wide as the config's only size
            return dense * active
    return dense or 4 * _hidden_size(text)


def _first(text: PreTrainedConfig, *names: str) -> int:
    for name in names:
        size = getattr(text, name, None)
        if isinstance(size, (list, tuple)):
            size = max(size)
        if size:
            return int(size)
    raise UnsupportedModel(
        f"the config of {getattr(text, 'model_type', 'this model')} has none of "
        f"{', '.join(names)}; headinfer needs it to size the cache"
    )

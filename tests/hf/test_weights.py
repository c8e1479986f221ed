# SPDX-License-Identifier: Apache-2.0
"""Weights counted before they are there, and where accelerate has put them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import headinfer
from headinfer.budget import GIB, MemoryBudget
from headinfer.cost import chunk_time, decode_time
from headinfer.geometry import LayerKind
from headinfer.hf.geometry import geometry_of, weight_bytes_of
from headinfer.hf.load import load_shape
from headinfer.hf.weights import (
    active_share,
    compute_device,
    on_one_device,
    weights_there,
    weights_to_come,
)
from headinfer.options import Options
from headinfer.plan import make_plan
from headinfer.quantised import stored_bits
from headinfer.rates import Rates

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")
RATES = Rates("m", "bfloat16", 5e14, {128: 6e14}, 3e12, 3e12, 1e-4, 1e-3, h2d_bytes_s=50e9)


def shape_of(tmp_path: Path, name: str, **changes: Any) -> Any:
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_shape(str(tmp_path))


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_weights_to_come_are_those_that_come() -> None:
    model = tiny()
    size, weights = weights_to_come(model, None)
    assert size == sum(part.numel() * 4 for part in model.parameters())
    blocks = sum(part.numel() for part in model.model.layers.parameters() if part.dim() > 1)
    assert weights.token_params == blocks
    assert weights.token_bytes == size - model.model.embed_tokens.weight.numel() * 4
    assert weights_there(model) == weights


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        # what their files take: 16.06, 13.48, 15.23, 18.48, 13.76, 163 and 671 GB
        ("llama-3-8b", 14.96),
        ("llama-2-7b", 12.55),
        ("qwen2.5-7b", 14.19),
        ("gemma-2-9b", 17.21),
        ("gpt-oss-20b", 12.82),
        ("qwen3-next-80b", 148.4),
        ("deepseek-v3", 626.9),
    ],
)
def test_known_models_take_what_they_take(tmp_path: Path, name: str, gib: float) -> None:
    assert shape_of(tmp_path, name).weight_bytes / GIB == pytest.approx(gib, rel=2e-3)


def test_a_mixture_reads_the_experts_of_a_token(tmp_path: Path) -> None:
    """gpt-oss-20b has 3.6 billion active parameters, DeepSeek-V3 37, Qwen3-Next 3."""
    for name, billions in (("gpt-oss-20b", 3.6), ("deepseek-v3", 37), ("qwen3-next-80b", 3)):
        found = shape_of(tmp_path, name)
        # their makers count the output projection in
        head = found.config.vocab_size * found.config.hidden_size
        assert (found.weights.token_params + head) / 1e9 == pytest.approx(billions, rel=0.25)
        assert found.weights.token_bytes < 0.2 * found.weight_bytes + 2 * head
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=50,
    )
    assert active_share(config) == 0.25
    assert geometry_of(config).intermediate_size == 96
    model = MixtralForCausalLM(config)
    experts = sum(part.numel() for name, part in model.named_parameters() if ".experts." in name)
    found = weights_there(model)
    everything = sum(part.numel() for part in model.model.layers.parameters() if part.dim() > 1)
    assert found.token_params == everything - 0.75 * experts


@pytest.mark.parametrize(
    ("quantisation", "gb"),
    [
        # embeddings and output projection stay in 16 bits: 2 x 128,256 x 4,096 x 2 bytes = 2.10 GB;
        # 6.98e9 weights of linear layers in 4.5, 8 and 4.156 bits
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 6.03),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 9.08),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 5.73),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 5.73),
    ],
)
def test_quantised_weights_take_their_stored_bits(
    tmp_path: Path, quantisation: dict[str, Any], gb: float
) -> None:
    found = shape_of(tmp_path, "llama-3-8b", quantization_config=quantisation)
    assert found.weight_bytes / 1e9 == pytest.approx(gb, rel=5e-3)
    plain = shape_of(tmp_path, "llama-3-8b")
    assert found.weights.token_params == plain.weights.token_params
    assert found.weights.token_bytes < plain.weights.token_bytes


def test_fused_experts_stay_as_they_are_where_the_method_takes_linear_layers_only() -> None:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=50,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    plain, _ = weights_to_come(model, None)
    linear, _ = weights_to_come(model, stored_bits({"load_in_4bit": True}))
    all_of_it, _ = weights_to_come(model, stored_bits({"quant_method": "mxfp4"}))
    experts = 4 * 4 * 3 * 32 * 48
    assert plain - linear < plain - experts
    assert all_of_it < linear - 0.8 * experts


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_what_accelerate_keeps_elsewhere_is_counted_there(tmp_path: Path, place: str) -> None:
    model = tiny()
    size, whole = weights_to_come(model, None)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=CPU)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=CPU)
        model.hf_device_map = {"": "disk"}
    found = weights_there(model)
    assert (found.disk_bytes if place == "disk" else found.host_bytes) == size
    assert found.host_bytes + found.disk_bytes == size
    # one module is there at a time; the largest are the two tables
    assert found.largest_moved_bytes == 100 * 64 * 4
    assert found.token_bytes == 0
    assert model.device.type == "meta"
    assert compute_device(model) == CPU
    with headinfer.attach(model, expected_tokens=20) as run:
        assert run.plan is not None
        assert run.plan.device == "cpu"
        ids = torch.arange(1, 9)[None]
        told = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert run.cache is not None
        assert run.cache.plan.geometry.weights == found
    assert torch.equal(
        told, tiny().generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    )
    assert found.token_params == whole.token_params
    assert weight_bytes_of(model, CPU) < size


def test_a_device_map_with_some_layers_elsewhere() -> None:
    model = tiny()
    layer = model.model.layers[1]
    accelerate.cpu_offload(layer, execution_device=CPU)
    model.hf_device_map = {"": 0, "model.layers.1": "cpu"}
    moved = sum(part.numel() * 4 for part in layer.parameters())
    found = weights_there(model)
    assert (found.host_bytes, found.disk_bytes) == (moved, 0)
    assert found.largest_moved_bytes == 64 * 96 * 4
    assert found.token_bytes == weights_to_come(tiny(), None)[1].token_bytes - moved
    out = model(torch.zeros((1, 3), dtype=torch.long))
    assert out.logits.shape == (1, 3, 100)


def test_bringing_weights_takes_its_time_in_every_pass() -> None:
    from headinfer.geometry import Geometry, LayerGeometry, Weights

    layer = LayerGeometry(LayerKind.FULL, 8, 128, 128, 32)
    here = Geometry((layer,) * 32, 2, 4096, 14336, 128256, 15 * GIB)
    there = replace(
        here,
        weight_bytes=5 * GIB,
        weights=Weights(7 * 10**9, 5 * GIB, 10 * GIB, 0, GIB // 8),
    )
    options = Options(budget=MemoryBudget(16 * GIB, 64 * GIB), expected_tokens=8192)
    plan = make_plan(there, options, device="cuda")
    assert plan.gpu_parts["weights on their way"] == GIB // 8
    moved = 10 * GIB / RATES.pageable_bytes_s
    step = decode_time(plan, RATES, length=8192)
    assert step.parts["bringing weights"] == pytest.approx(moved)
    assert step.seconds > moved
    assert step.limit == "bringing weights"
    chunk = chunk_time(plan, RATES, past=0, new=128)
    assert chunk.seconds > moved
    assert chunk.limit == "bringing weights"
    bare = replace(plan, geometry=here)
    assert decode_time(bare, RATES, length=8192).seconds < moved / 10


def test_latents_are_expanded_at_every_step(tmp_path: Path) -> None:
    found = shape_of(tmp_path, "deepseek-v3")
    layer = geometry_of(found.config).layers[0]
    assert (layer.num_kv_heads, layer.key_dim, layer.value_dim) == (1, 512, 64)
    assert layer.attended_dims == (192, 128)
    # kv_b_proj: 512 x 128 x (128 + 128), two FLOPs each
    assert layer.expansion_flops == 2 * 512 * 128 * 256
    plain = geometry_of(LlamaConfig()).layers[0]
    assert plain.expansion_flops == 0
    assert plain.attended_dims == (plain.key_dim, plain.value_dim)


def test_states_are_counted(tmp_path: Path) -> None:
    found = geometry_of(shape_of(tmp_path, "qwen3-next-80b").config)
    states = [layer for layer in found.layers if layer.kind is LayerKind.STATE]
    assert len(states) == 36
    # 32 heads of 128 x 128, and 4 inputs of 2 x 16 x 128 + 32 x 128 channels, in float32
    assert states[0].state_bytes == 4 * (32 * 128 * 128 + 4 * 8192)
    options = Options(budget=MemoryBudget(None, None), expected_tokens=8192)
    plan = make_plan(found, options, device="cuda")
    assert plan.gpu_parts["states"] == 2 * 36 * states[0].state_bytes


def test_a_model_of_which_a_part_is_elsewhere_is_not_on_one_device() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    assert on_one_device(model)
    model[1].to("meta")
    assert not on_one_device(model)

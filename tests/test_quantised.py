# SPDX-License-Identifier: Apache-2.0
"""Bits per stored weight, checked by hand for configs as their libraries write them."""

from __future__ import annotations

import pytest

from headinfer.errors import InputError
from headinfer.quantised import METHODS, stored_bits


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        # a float32 scale for 64 weights; with double quantisation an 8-bit one, 256 of them sharing
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 4 + 0.5),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4 + 8 / 64 + 32 / 64 / 256),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 16384),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
            },
            4 + 16 / 128,
        ),
        ({"quant_method": "quanto", "weights": "int8"}, 8),
        (
            {
                "quant_method": "hqq",
                "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}},
            },
            4.5,
        ),
        ({"quant_method": "eetq"}, 8),
    ],
)
def test_scales_and_zero_points_are_counted(config: dict, bits: float) -> None:
    assert stored_bits(config).bits == pytest.approx(bits)


def test_what_is_skipped_is_matched_as_the_libraries_do() -> None:
    stored = stored_bits(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    )
    assert stored.skips("model.layers.11.self_attn.q_proj.weight")
    assert stored.skips("lm_head.weight")
    assert not stored.skips("model.layers.11.mlp.experts.gate_up_proj")
    rule = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
        "ignore": ["re:.*gate$", "lm_head"],
    }
    assert stored_bits(rule).skips("model.layers.3.mlp.gate")
    assert not stored_bits(rule).skips("model.layers.3.mlp.gate_proj.weight")


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="'origami', whose bytes are not known") as caught:
        stored_bits({"quant_method": "origami"})
    assert all(method in str(caught.value) for method in METHODS)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": 0},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {}}},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "quanto", "weights": "none"},
        {"quant_method": "hqq"},
    ],
)
def test_a_config_without_its_numbers_is_refused(config: dict) -> None:
    with pytest.raises(InputError, match="is not complete"):
        stored_bits(config)

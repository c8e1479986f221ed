# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders and multimodal models.

Encoder-decoders keep the self-attention of their decoder head by head; cross attention stays stock.
Multimodal models are run on text alone, through their top-level class and nested configuration.
"""

from __future__ import annotations

from typing import Any

from headinfer.testing.zoo.record import TINY, VOCAB_SIZE, Column, Flaw, Kind, TokenTypes, entry
from headinfer.testing.zoo.windowed import FULL, SLIDING

_BART: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 512,
    "init_std": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 3,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_SEQ2SEQ = Kind.ENCODER_DECODER

ENCODER_DECODERS = (
    entry("bart", "BartForConditionalGeneration", 2, kind=_SEQ2SEQ, tiny=_BART),
    entry(
        "blenderbot-small", "BlenderbotSmallForConditionalGeneration", 2, kind=_SEQ2SEQ, tiny=_BART
    ),
    entry("m2m_100", "M2M100ForConditionalGeneration", 2, kind=_SEQ2SEQ, tiny=_BART),
    entry("marian", "MarianMTModel", 2, kind=_SEQ2SEQ, tiny=_BART),
    entry("mbart", "MBartForConditionalGeneration", 2, kind=_SEQ2SEQ, tiny=_BART),
    entry("pegasus", "PegasusForConditionalGeneration", 2, kind=_SEQ2SEQ, tiny=_BART),
    entry("t5", "T5ForConditionalGeneration", 2, kind=_SEQ2SEQ, since="5.23", tiny=_T5),
    entry("umt5", "UMT5ForConditionalGeneration", 2, kind=_SEQ2SEQ, since="5.23", tiny=_T5),
    entry(
        "whisper",
        "WhisperForConditionalGeneration",
        2,
        kind=Kind.SPEECH,
        skips={Column.GREEDY_CHUNKED: Flaw("its generate() fails with any prefill_chunk_size")},
        tiny={
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 512,
            "begin_suppress_tokens": None,
        },
    ),
)

_TEXT: dict[str, Any] = {k: v for k, v in TINY.items() if k != "vocab_size"} | {"vocab_size": 128}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
    "fullatt_block_indexes": [0],
}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_ANY = Kind.MULTIMODAL
_POSITIONS = Flaw("chunks lose their multimodal position ids in generate()", fixed_in="5.23")

MULTIMODAL = (
    entry(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        1,
        4,
        kind=_ANY,
        tiny={"tie_word_embeddings": False},
        text_config={
            **_TEXT,
            "model_type": "cohere2",
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "sliding_window": 8,
        },
        vision_config={**_VISION, "model_type": "siglip_vision_model"},
        image_token_index=120,
    ),
    entry(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        1,
        4,
        kind=_ANY,
        unchunkable=Flaw(
            "an image block is attended in both directions, a chunk border may cut it"
        ),
        token_types=TokenTypes.IMAGE_BLOCK,
        tiny={"tie_word_embeddings": False},
        text_config={
            **_TEXT,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
        },
        vision_config=_VISION,
        mm_tokens_per_image=4,
        boi_token_index=121,
        eoi_token_index=122,
        image_token_index=120,
    ),
    entry(
        "internvl",
        "InternVLForConditionalGeneration",
        2,
        kind=_ANY,
        tiny={"tie_word_embeddings": False},
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config={**_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=120,
    ),
    entry(
        "llava",
        "LlavaForConditionalGeneration",
        2,
        kind=_ANY,
        tiny={"tie_word_embeddings": False},
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=120,
    ),
    entry(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        2,
        kind=_ANY,
        tiny={"tie_word_embeddings": False},
        text_config={**_TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={**_VISION, "model_type": "pixtral", "head_dim": 8},
        image_token_index=120,
    ),
    entry(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        2,
        kind=_ANY,
        tiny={"tie_word_embeddings": False},
        unchunkable=Flaw(
            "the prefix is attended in both directions, a chunk sees only its own part"
        ),
        token_types=TokenTypes.PREFIX,
        text_config={**_TEXT, "model_type": "gemma", "head_dim": 16},
        vision_config={**_VISION, "projection_dim": 32, "model_type": "siglip_vision_model"},
        projection_dim=32,
        hidden_size=32,
        image_token_index=120,
    ),
    entry(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        2,
        kind=_ANY,
        skips={Column.GREEDY_CHUNKED: _POSITIONS},
        tiny={"tie_word_embeddings": False},
        text_config={**_TEXT, "rope_parameters": _MROPE},
        vision_config={**_QWEN_VISION, "hidden_size": 32},
        **_QWEN_TOKENS,
    ),
    entry(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        2,
        kind=_ANY,
        skips={Column.GREEDY_CHUNKED: _POSITIONS},
        tiny={"tie_word_embeddings": False},
        text_config={**_TEXT, "rope_parameters": _MROPE},
        vision_config=_QWEN_VISION,
        **_QWEN_TOKENS,
    ),
    entry(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        2,
        kind=_ANY,
        skips={Column.GREEDY_CHUNKED: _POSITIONS},
        tiny={"tie_word_embeddings": False},
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": _MROPE},
        vision_config={
            **_QWEN_VISION,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_QWEN_TOKENS,
    ),
    entry(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        2,
        kind=_ANY,
        tiny={"tie_word_embeddings": False},
        text_config={**_TEXT, "model_type": "llama"},
        vision_config=_VISION,
        image_token_id=120,
        scale_factor=2,
    ),
)

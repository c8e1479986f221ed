# SPDX-License-Identifier: Apache-2.0
"""Tiny models on disk, with tokenizers: what a user's folder and GGUF file look like, in 100 KB.

The tokenizer has one token per byte, so any text can be a prompt and lengths are easy to count.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MERGED = ("\u0100", "\u0100")
"""Two zero bytes: a GGUF file must list at least one merge."""
POSITIONS = 2048


def alphabet() -> list[str]:
    """The tokens: one per byte, one that no text uses, the end of text."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), MERGED[0] + MERGED[1], END]


def write_tiny_llama(folder: Path, *, chat: bool = True, ends: bool = True) -> Path:
    """A random Llama of two layers, two KV heads and 2,048 positions; the same on every call.

    Without `ends` no token ends its text: it generates for as long as it may.
    """
    config = LlamaConfig(
        vocab_size=len(alphabet()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=len(alphabet()) - 1 if ends else None,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    _tokenizer(chat=chat, ends=ends).save_pretrained(folder)
    return folder


def write_tiny_gguf(path: Path) -> Path:
    """The same shape as `write_tiny_llama` in one GGUF file, float32, without a chat template."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(alphabet()))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(alphabet())
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_token_types([1] * (len(alphabet()) - 1) + [3])
    writer.add_bos_token_id(len(alphabet()) - 1)
    writer.add_eos_token_id(len(alphabet()) - 1)
    for name, shape in _gguf_shapes().items():
        scale = 1.0 if name.endswith("norm.weight") else 0.3
        generator = torch.Generator().manual_seed(len(name))
        writer.add_tensor(name, (scale * torch.randn(shape, generator=generator)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(alphabet()), 32),
        "output_norm.weight": (32,),
        "output.weight": (len(alphabet()), 32),
    }
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (32,),
            f"blk.{layer}.ffn_norm.weight": (32,),
            f"blk.{layer}.attn_q.weight": (32, 32),
            f"blk.{layer}.attn_k.weight": (16, 32),
            f"blk.{layer}.attn_v.weight": (16, 32),
            f"blk.{layer}.attn_output.weight": (32, 32),
            f"blk.{layer}.ffn_gate.weight": (48, 32),
            f"blk.{layer}.ffn_up.weight": (48, 32),
            f"blk.{layer}.ffn_down.weight": (32, 48),
        }
    return shapes


def _tokenizer(*, chat: bool, ends: bool) -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate(alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[MERGED]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END if ends else None)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast

"""A llama model of 100,000 random weights: every code path of llama.cpp in milliseconds."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

VOCAB = 259
"""``<unk> <s> </s>`` and the 256 bytes."""
CONTEXT = 4096
_LAYERS, _WIDTH, _HEADS, _KV_HEADS, _HIDDEN = 2, 64, 4, 2, 128


def write_tiny_model(path: Path, seed: int = 7) -> Path:
    """Write the model as an F32 GGUF file with a byte vocabulary."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])
    writer.add_token_scores([0.0] * VOCAB)
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*types, *[gguf.TokenType.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            # Wide enough that attention and the logits are far from uniform.
            scale = 2.0 / np.sqrt(shape[-1])
            writer.add_tensor(name, rng.normal(0, scale, shape).astype(np.float32))

    add("token_embd.weight", VOCAB, _WIDTH)
    add("output_norm.weight", _WIDTH)
    add("output.weight", VOCAB, _WIDTH)
    kv_width = _WIDTH // _HEADS * _KV_HEADS
    for layer in range(_LAYERS):
        add(f"blk.{layer}.attn_norm.weight", _WIDTH)
        add(f"blk.{layer}.attn_q.weight", _WIDTH, _WIDTH)
        add(f"blk.{layer}.attn_k.weight", kv_width, _WIDTH)
        add(f"blk.{layer}.attn_v.weight", kv_width, _WIDTH)
        add(f"blk.{layer}.attn_output.weight", _WIDTH, _WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", _WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", _HIDDEN, _WIDTH)
        add(f"blk.{layer}.ffn_up.weight", _HIDDEN, _WIDTH)
        add(f"blk.{layer}.ffn_down.weight", _WIDTH, _HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

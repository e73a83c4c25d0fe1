"""Tiny models as GGUF files, converted as llama.cpp's own converter does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}


def write_gguf(model: Any, path: Path, divisors: dict[str, tuple[float, ...]]) -> Path:
    """Write a model of transformers as an F32 GGUF file without a vocabulary.

    Args:
        model: One of `tests.support.hf_models`.
        path: The file.
        divisors: Rotary divisors by the names of their tensors.
    """
    config = model.config
    arch = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "gemma" in arch:
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_rope(writer, config)
    for name, values in divisors.items():
        writer.add_tensor(name, np.array(values, np.float32))
    _add_weights(writer, model, arch)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings")
    if kind in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "longrope":
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original))))
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)


def _add_weights(writer: gguf.GGUFWriter, model: Any, arch: str) -> None:
    config = model.config
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.to(torch.float32)
        if "gemma" in arch and name.endswith("norm.weight"):
            values = values + 1
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            queries = "q_proj" in name
            heads = config.num_attention_heads if queries else config.num_key_value_heads
            values = (
                values.reshape(heads, 2, -1, *values.shape[1:])
                .transpose(1, 2)
                .reshape(values.shape)
            )
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(values.numpy()))

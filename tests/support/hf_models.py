"""Tiny random models of each family, made and written by transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

_SMALL: Mapping[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.9 * i for i in range(8)],
}


def _gemma3(**changes: Any) -> transformers.PreTrainedConfig:
    changes = {
        **_SMALL,
        "num_hidden_layers": 7,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "tie_word_embeddings": True,
        **changes,
    }
    return transformers.Gemma3TextConfig(**changes)


MODELS: Mapping[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL),
    "llama3": lambda: transformers.LlamaConfig(
        **{**_SMALL, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 32}
    ),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=24),
    "mistral-global": lambda: transformers.MistralConfig(**_SMALL, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**_SMALL),
    "qwen2-windows": lambda: transformers.Qwen2Config(
        **_SMALL, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen2-yarn": lambda: transformers.Qwen2Config(**_SMALL, rope_parameters=_YARN_ROPE),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**_SMALL, "tie_word_embeddings": True},
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=20,
        # So low that the caps bend every score.
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _gemma3,
    "gemma3-scaled": lambda: _gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    ),
    "phi3": lambda: transformers.Phi3Config(**_SMALL, sliding_window=24),
    "phi3-partial": lambda: transformers.Phi3Config(
        **{**_SMALL, "hidden_size": 128, "tie_word_embeddings": True},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **_SMALL, original_max_position_embeddings=64, rope_parameters=dict(_LONGROPE)
    ),
}
"""By a name for the test."""


def write_model(
    name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **saving: Any
) -> Any:
    """A random model in ``folder``, and as transformers computes it in float32."""
    torch.manual_seed(seed)
    config = MODELS[name]()
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:  # all ones, or zeros, until trained
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        if config.tie_word_embeddings:
            model.tie_weights()
    model.eval().to(dtype).save_pretrained(folder, **saving)
    if dtype == torch.float32:
        return model
    # Casting has rounded its rotary frequencies too, which the file does not keep.
    return type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

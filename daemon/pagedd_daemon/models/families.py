"""The families of models the torch backend computes, as Hugging Face's ``config.json`` has them.

A family is data where it can be: defaults that its ``config.json`` may leave out (those of
transformers), traits of the architecture, and how its tensors are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagedd_daemon.models import tensor_names
from pagedd_daemon.models.config import (
    Activation,
    LayerAttention,
    ModelConfig,
    Rope,
    uniform_attention,
)
from pagedd_daemon.models.errors import UnsupportedModelError
from pagedd_daemon.models.fields import MOST_LAYERS, Fields
from pagedd_daemon.models.rope_scaling import rope_of
from pagedd_daemon.models.tensor_names import Naming

_SLIDING, _FULL = "sliding_attention", "full_attention"

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def _no_window(fields: Fields, layers: int) -> list[int]:
    return [0] * layers


def _same_window(fields: Fields, layers: int) -> list[int]:
    window = fields.integer("sliding_window") if "sliding_window" in fields else 0
    return [window] * layers


def _late_windows(fields: Fields, layers: int) -> list[int]:
    """Qwen's: where windows are used at all, from a certain layer on."""
    if not fields.flag("use_sliding_window") or "sliding_window" not in fields:
        return [0] * layers
    first = fields.integer("max_window_layers", 28, least=0)
    return _listed(fields, layers, lambda layer: layer >= first)


def _alternating(fields: Fields, layers: int) -> list[int]:
    return _listed(fields, layers, lambda layer: layer % 2 == 0)


def _one_in_six(fields: Fields, layers: int) -> list[int]:
    pattern = fields.integer("sliding_window_pattern", 6)
    return _listed(fields, layers, lambda layer: (layer + 1) % pattern != 0)


def _listed(fields: Fields, layers: int, slides: Callable[[int], bool]) -> list[int]:
    """By ``layer_types``, or by a rule where that is not given."""
    window = fields.integer("sliding_window")
    types = fields.texts("layer_types")
    if types is None:
        types = tuple(_SLIDING if slides(layer) else _FULL for layer in range(layers))
    if len(types) != layers or not {_SLIDING, _FULL}.issuperset(types):
        fields.refuse(f"has no {layers} layer_types of {_SLIDING} and {_FULL}", "layer_types")
    return [window if kind == _SLIDING else 0 for kind in types]


@dataclass(frozen=True, slots=True)
class Family:
    """What models of one architecture have in common."""

    naming: Naming = tensor_names.HUGGING_FACE
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What ``config.json`` means by saying nothing."""
    windows: Callable[[Fields, int], list[int]] = _no_window
    """The window of each layer; 0 for none."""
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    """Norms around both halves of a layer, a scaled embedding, a scale of its own for scores."""
    local_rope: bool = False
    """Layers with a window have a rope of their own."""


_LLAMA = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
_QWEN = {**_LLAMA, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA2 = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 10_000.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = {
    **_GEMMA2,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_PHI3 = {**_LLAMA, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}

_GEMMA3_FAMILY = Family(
    tensor_names.HUGGING_FACE_GEMMA,
    _GEMMA3,
    _one_in_six,
    qk_norm=True,
    gemma=True,
    local_rope=True,
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(defaults=_LLAMA),  # Llama 2 and 3, SmolLM2, Yi
    "MistralForCausalLM": Family(
        defaults={**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
        windows=_same_window,
    ),
    "Qwen2ForCausalLM": Family(defaults=_QWEN, windows=_late_windows, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        defaults={**_QWEN, "head_dim": 128}, windows=_late_windows, qk_norm=True
    ),
    "Gemma2ForCausalLM": Family(tensor_names.HUGGING_FACE_GEMMA, _GEMMA2, _alternating, gemma=True),
    "Gemma3ForCausalLM": _GEMMA3_FAMILY,
    "Gemma3ForConditionalGeneration": _GEMMA3_FAMILY,  # its text half
    "Phi3ForCausalLM": Family(tensor_names.HUGGING_FACE_PHI3, _PHI3, _same_window),
}
"""By the first of ``architectures`` in ``config.json``."""


def family_of(architecture: str) -> Family:
    """The family of an architecture.

    Raises:
        UnsupportedModelError: There is none here.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModelError(
            f"the torch backend cannot compute {architecture}; llama.cpp may, from a GGUF file of "
            "the model: --backend llama.cpp",
            {"architecture": architecture, "supported": sorted(FAMILIES)},
        )
    return family


def config_of(fields: Fields, eog_tokens: frozenset[int] = frozenset()) -> ModelConfig:
    """The configuration in a ``config.json``.

    Args:
        fields: Its map.
        eog_tokens: Ids that other files of the folder name.

    Raises:
        UnsupportedModelError: The architecture is not one of `FAMILIES`, or has a trait that is not
            supported, which is named.
        ModelFileError: A figure is missing or impossible.
    """
    architecture = (fields.texts("architectures") or ("",))[0]
    if not architecture:
        fields.refuse("names no architecture", "architectures")
    family = family_of(architecture)
    eog = eog_tokens | fields.ids("eos_token_id")
    if "text_config" in fields:
        fields = fields.map("text_config")
        eog |= fields.ids("eos_token_id")
    fields = fields.with_defaults(family.defaults)
    _refuse_traits(fields, architecture)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if "head_dim" not in fields and width % heads:
        fields.refuse(f"has a hidden_size of {width}, no multiple of its {heads} heads")
    head_dim = fields.integer("head_dim", width // heads)
    if heads % kv_heads or head_dim % 2:
        fields.refuse(
            f"has {heads} heads of {head_dim} elements over {kv_heads} for keys and values "
            "(num_attention_heads, head_dim, num_key_value_heads)"
        )
    scale = fields.positive("query_pre_attn_scalar") if family.gemma else float(head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        width=width,
        hidden_width=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_tokens=fields.integer("max_position_embeddings"),
        norm_eps=fields.positive("rms_norm_eps"),
        attention=_attention(fields, family, head_dim),
        attention_scale=scale**-0.5,
        activation=_activation(fields, architecture),
        tied_head=fields.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        post_norms=family.gemma,
        embed_scale=width**0.5 if family.gemma else 1.0,
        attention_soft_cap=_soft_cap(fields, family, "attn_logit_softcapping"),
        logit_soft_cap=_soft_cap(fields, family, "final_logit_softcapping"),
        eog_tokens=eog,
    )


def _attention(fields: Fields, family: Family, head_dim: int) -> tuple[LayerAttention, ...]:
    windows = family.windows(fields, fields.integer("num_hidden_layers", most=MOST_LAYERS))
    if not family.local_rope:
        return uniform_attention(_rope(fields, head_dim), windows)
    ropes = {True: _rope(fields, head_dim, _SLIDING), False: _rope(fields, head_dim, _FULL)}
    return tuple(LayerAttention(ropes[window > 0], window) for window in windows)


def _rope(fields: Fields, head_dim: int, kind: str = "") -> Rope:
    """The rope of all layers, or of those of one kind; by transformers 5's layout or the older."""
    parameters = fields.map("rope_parameters")
    theta = fields.positive("rope_theta", 10_000.0)
    if kind and kind in parameters:
        parameters = parameters.map(kind)
    elif kind == _SLIDING:
        parameters = Fields(fields.path, {}, fields.prefix)
        theta = fields.positive("rope_local_base_freq")
    elif "rope_scaling" in fields:
        parameters = fields.map("rope_scaling")
    part = parameters.positive(
        "partial_rotary_factor", fields.positive("partial_rotary_factor", 1.0)
    )
    dims = int(head_dim * part)
    if part > 1 or dims % 2:
        fields.refuse(f"rotates {dims} of {head_dim} elements of a head", "partial_rotary_factor")
    original = None
    if "original_max_position_embeddings" in fields:
        original = fields.integer("original_max_position_embeddings")
    base = parameters.positive("rope_theta", theta)
    return rope_of(parameters, base, dims, fields.integer("max_position_embeddings"), original)


def _activation(fields: Fields, architecture: str) -> Activation:
    name = fields.text("hidden_activation", fields.text("hidden_act", "silu"))
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"the torch backend does not know the activation {name!r} of this {architecture}",
            {"activation": name, "path": str(fields.path)},
        )
    return ACTIVATIONS[name]


def _soft_cap(fields: Fields, family: Family, name: str) -> float:
    return (fields.optional_positive(name) or 0.0) if family.gemma else 0.0


def _refuse_traits(fields: Fields, architecture: str) -> None:
    """What would be computed wrongly, were it overlooked."""
    for trait in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if fields.flag(trait):
            raise UnsupportedModelError(
                f"the torch backend cannot compute {architecture} with {trait}; llama.cpp may, "
                "from a GGUF file of the model: --backend llama.cpp",
                {"architecture": architecture, "trait": trait, "path": str(fields.path)},
            )
    if "quantization_config" in fields:
        method = fields.map("quantization_config").text("quant_method", "unknown")
        raise UnsupportedModelError(
            f"the weights are quantised by {method}, which the torch backend cannot read; GGUF "
            "files and plain safetensors it can",
            {"quantization": method, "path": str(fields.path)},
        )

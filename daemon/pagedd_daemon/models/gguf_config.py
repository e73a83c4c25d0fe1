"""Configurations out of GGUF metadata, and the traps of that format.

* llama.cpp rotates neighbouring elements in ``llama`` models, so their rows of queries and keys are
  stored in another order (`tensor_names.Naming.interleaved`).
* Gemma's norms are stored as they are multiplied, 1 added already.
* What Llama 3 and LongRoPE divide frequencies by is kept as tensors.
* Some figures are nowhere in the file, and llama.cpp knows them by the architecture.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedd_daemon.models import tensor_names
from pagedd_daemon.models.config import LayerAttention, ModelConfig, Rope
from pagedd_daemon.models.errors import ModelFileError, UnsupportedModelError
from pagedd_daemon.models.fields import MOST_LAYERS, Fields
from pagedd_daemon.models.files import open_regular
from pagedd_daemon.models.gguf_header import GgufFile, Skipped, read_gguf
from pagedd_daemon.models.rope_scaling import longrope_magnitude, rope_of
from pagedd_daemon.models.stored import StoredModel
from pagedd_daemon.models.tensor_names import Naming

_EOG = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True, slots=True)
class _Family:
    naming: Naming = tensor_names.GGUF
    qk_norm: bool = False
    gemma: bool = False
    window_pattern: int = 1
    """Every so many layers one has no window, if the model has a window; 1 for all having it."""
    large_layers: int = 0
    """Gemma's largest model, known by its layers, scales scores by its width."""
    local_base: float = 0.0
    """Base of the rope of layers with a window, where it is one of its own."""


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(tensor_names.GGUF_LLAMA),
    "qwen2": _Family(),
    "qwen3": _Family(qk_norm=True),
    "gemma2": _Family(gemma=True, window_pattern=2, large_layers=46),
    "gemma3": _Family(
        qk_norm=True, gemma=True, window_pattern=6, large_layers=62, local_base=10_000.0
    ),
    "phi3": _Family(tensor_names.GGUF_PHI3),
}


def read_gguf_model(path: Path) -> StoredModel:
    """A GGUF file with its header checked.

    Raises:
        UnsupportedModelError: The torch backend does not compute such models.
        ModelFileError: The file is no model, or damaged, or says something impossible.
    """
    file = read_gguf(path)
    family = _family_of(path, file)
    config = _Reading(file, family).config()
    tokens = file.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Skipped) and tokens.count != config.vocab_size:
        raise ModelFileError(
            path,
            f"has a vocabulary of {tokens.count} tokens and an embedding of {config.vocab_size} "
            "('token_embd.weight')",
            {"tensor": "token_embd.weight", "tokens": tokens.count, "rows": config.vocab_size},
        )
    return StoredModel(path, config, family.naming, file.tensors, file.header.digest)


def _family_of(path: Path, file: GgufFile) -> _Family:
    architecture = file.header.architecture
    experts = file.values.get(f"{architecture}.expert_count", 0)
    family = _FAMILIES.get(architecture)
    if family is None or experts:
        what = f"{architecture} with {experts} experts" if family else architecture
        raise UnsupportedModelError(
            f"the torch backend cannot compute {what}; llama.cpp may: --backend llama.cpp",
            {"path": str(path), "architecture": architecture, "supported": sorted(_FAMILIES)},
        )
    return family


class _Reading:
    """One file's metadata."""

    def __init__(self, file: GgufFile, family: _Family) -> None:
        self._file = file
        self._family = family
        path, architecture = file.header.path, file.header.architecture
        prefix = f"{architecture}."
        self._own = Fields(path, _below(file.values, prefix), prefix)
        self._tokens = Fields(path, _below(file.values, "tokenizer.ggml."), "tokenizer.ggml.")

    def config(self) -> ModelConfig:
        own, family, tensors = self._own, self._family, self._file.tensors
        width, heads = own.integer("embedding_length"), own.integer("attention.head_count")
        kv_heads = own.integer("attention.head_count_kv", heads)
        if "attention.key_length" not in own and width % heads:
            own.refuse(f"has an embedding_length of {width}, no multiple of its {heads} heads")
        head_dim = own.integer("attention.key_length", width // heads)
        if own.integer("attention.value_length", head_dim) != head_dim:
            own.refuse("has heads of another length for values than for keys")
        if heads % kv_heads or head_dim % 2:
            own.refuse(f"has {heads} heads of {head_dim} over {kv_heads} for keys and values")
        layers = own.integer("block_count", most=MOST_LAYERS)
        wide = family.large_layers == layers
        return ModelConfig(
            architecture=self._file.header.architecture,
            vocab_size=self._rows("token_embd.weight"),
            width=width,
            hidden_width=own.integer("feed_forward_length"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context_tokens=own.integer("context_length"),
            norm_eps=own.positive("attention.layer_norm_rms_epsilon"),
            attention=self._attention(layers, head_dim),
            attention_scale=(width // heads if wide else head_dim) ** -0.5,
            activation="gelu_tanh" if family.gemma else "silu",
            tied_head="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            qk_norm=family.qk_norm,
            post_norms=family.gemma,
            embed_scale=width**0.5 if family.gemma else 1.0,
            attention_soft_cap=own.optional_positive("attn_logit_softcapping") or 0.0,
            logit_soft_cap=own.optional_positive("final_logit_softcapping") or 0.0,
            eog_tokens=frozenset().union(*map(self._tokens.ids, _EOG)),
        )

    def _attention(self, layers: int, head_dim: int) -> tuple[LayerAttention, ...]:
        own, family = self._own, self._family
        window = own.integer("attention.sliding_window", 0, least=0)
        every = own.integer("attention.sliding_window_pattern", family.window_pattern)
        windows = [window if every == 1 or (layer + 1) % every else 0 for layer in range(layers)]
        rope = self._rope(head_dim)
        local = rope
        if family.local_base:
            local = Rope(own.positive("rope.freq_base_swa", family.local_base), rope.dims)
        return tuple(LayerAttention(local if size else rope, size) for size in windows)

    def _rope(self, head_dim: int) -> Rope:
        own = self._own
        dims = own.integer("rope.dimension_count", head_dim)
        if dims > head_dim or dims % 2:
            own.refuse(f"rotates {dims} of {head_dim} elements of a head", "rope.dimension_count")
        base = own.positive("rope.freq_base", 10_000.0)
        context = own.integer("context_length")
        original = own.integer("rope.scaling.original_context_length", context, least=2)
        plain, short, long = (
            self._divisors(f"rope_{name}.weight", dims // 2)
            for name in ("freqs", "factors_short", "factors_long")
        )
        if short or long:
            magnitude = own.positive(
                "rope.scaling.attn_factor", longrope_magnitude(context / original, original)
            )
            return Rope(base, dims, short or long, long or short, original, magnitude)
        if plain:
            return Rope(base, dims, plain)
        return rope_of(self._scaling(), base, dims, context, original)

    def _scaling(self) -> Fields:
        """The scaling as Hugging Face's ``rope_parameters`` would have it."""
        given = _below(self._own.values, "rope.scaling.")
        kind = given.get("type", "linear" if "factor" in given else "none")
        renamed = {
            "rope_type": "default" if kind == "none" else kind,
            "factor": given.get("factor"),
            "beta_fast": given.get("yarn_beta_fast"),
            "beta_slow": given.get("yarn_beta_slow"),
        }
        return Fields(self._own.path, renamed, self._own.prefix + "rope.scaling.")

    def _divisors(self, name: str, count: int) -> tuple[float, ...]:
        """The numbers of a small float32 tensor; empty if there is none."""
        tensor = self._file.tensors.get(name)
        if tensor is None:
            return ()
        path = self._own.path
        if tensor.shape != (count,) or tensor.kind != "F32":
            raise ModelFileError(
                path,
                f"has tensor {name!r} of {tensor.kind} {list(tensor.shape)} and not of F32 "
                f"[{count}]",
                {"tensor": name},
            )
        fd = open_regular(path)
        try:
            raw = os.pread(fd, tensor.size, tensor.offset)
        finally:
            os.close(fd)
        values = struct.unpack(f"<{count}f", raw) if len(raw) == tensor.size else ()
        if len(values) != count or not all(0 < value < math.inf for value in values):
            raise ModelFileError(
                path, f"has tensor {name!r} of impossible values", {"tensor": name}
            )
        return values

    def _rows(self, name: str) -> int:
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise ModelFileError(self._own.path, f"has no tensor {name!r}", {"tensor": name})
        return tensor.shape[0]


def _below(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

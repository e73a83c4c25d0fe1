"""What a model will take, from its headers alone: weights, KV, and how much fits where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagedd_daemon.models.errors import ModelError, ModelFileError
from pagedd_daemon.models.gguf_header import GgufHeader
from pagedd_daemon.models.model import read_model, read_model_header

_KV_BYTES = 2
"""Of one element of KV: f16 in llama.cpp, bf16 on the GPU."""
_GPU_WEIGHT_BYTES = 2
"""The paged engine computes in bf16; quantised weights are decoded while they are loaded."""
GPU_RESERVE_BYTES = 1 << 30
"""Workspaces, activations and captured steps of the paged engine."""


@dataclass(frozen=True, slots=True)
class Takes:
    """What a model takes on one kind of device, in bytes."""

    weights: int
    kv_per_1000_tokens: int
    reserve: int
    """For everything else."""

    def tokens_that_fit(self, free_bytes: int) -> int:
        """Tokens of KV beside the weights; negative where not even those fit."""
        left = free_bytes - self.weights - self.reserve
        return left * 1000 // max(1, self.kv_per_1000_tokens)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes."""

    path: Path
    context_tokens: int | None
    """What it was made for."""
    cpu: Takes | None
    """With llama.cpp; None where llama.cpp cannot run it (a folder)."""
    gpu: Takes | None
    """With the paged engine; None where that does not compute it."""
    gpu_reason: str = ""
    """Why not."""


def footprint(path: Path) -> Footprint:
    """Read the headers of a GGUF file or a model folder.

    Raises:
        ModelError: It is no model, or damaged.
    """
    header = read_model_header(path)
    cpu: Takes | None = None
    if isinstance(header, GgufHeader):
        cpu = Takes(header.size_bytes - header.header_bytes, 1000 * _gguf_token_bytes(header), 0)
    try:
        config = read_model(path).config
    except ModelError as error:
        reason = error.reason if isinstance(error, ModelFileError) else error.message
        return Footprint(path, header.context_length, cpu, None, reason)
    gpu = Takes(
        config.weight_bytes(_GPU_WEIGHT_BYTES),
        1000 * config.kv_bytes_per_token(_KV_BYTES),
        GPU_RESERVE_BYTES,
    )
    return Footprint(path, config.context_tokens, cpu, gpu)


def _gguf_token_bytes(header: GgufHeader) -> int:
    """Bytes of keys and values of one token in llama.cpp."""
    heads = header.kv_heads or header.heads or 0
    width = (header.key_length or 0) + (header.value_length or 0)
    return (header.block_count or 0) * heads * width * _KV_BYTES

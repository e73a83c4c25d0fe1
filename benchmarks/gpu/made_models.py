"""Model files of any size out of random numbers, written at the speed of the disk.

A few megabytes are drawn once and repeated: what is measured with them depends on sizes alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pagedd_daemon.models.config import LayerAttention, ModelConfig, Rope
from pagedd_daemon.models.ggml_types import TENSOR_TYPES
from pagedd_daemon.models.tensor_names import GGUF_LLAMA, HUGGING_FACE, Naming, Piece, parameters

Bytes = npt.NDArray[np.uint8]

_PATTERN_BYTES = 64 << 20
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_ALIGNMENT = 32
_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def llama_8b(context_tokens: int = 131_072, layers: int = 32) -> ModelConfig:
    """The shape of Llama-3.1-8B, with a plain rope."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        width=4096,
        hidden_width=14_336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        context_tokens=context_tokens,
        norm_eps=1e-5,
        attention=(LayerAttention(Rope(500_000.0, 128)),) * layers,
        attention_scale=128**-0.5,
    )


def write_folder(config: ModelConfig, folder: Path, shard_bytes: int = 5 * 10**9) -> int:
    """A folder in Hugging Face's layout, bf16, in shards; its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rope = config.attention[0].rope
    description = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.base,
        "tie_word_embeddings": config.tied_head,
    }
    (folder / "config.json").write_text(json.dumps(description))
    values = np.random.default_rng(0).normal(0, 0.02, _PATTERN_BYTES // 4).astype(np.float32)
    pattern = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)  # bf16, cut off
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in _pieces(config, HUGGING_FACE):
        size = 2 * int(np.prod(piece.shape))
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += size
    weight_map: dict[str, str] = {}
    for index, pieces in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, pieces, pattern)
        weight_map |= {piece.name: name for piece in pieces}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def write_gguf(config: ModelConfig, path: Path, kind: str = "Q4_K") -> int:
    """A GGUF file whose matrices are of one type; its bytes."""
    metadata: list[bytes] = [
        _text("general.architecture") + struct.pack("<I", _STRING) + _text("llama")
    ]
    numbers = {
        "context_length": config.context_tokens,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.hidden_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "rope.dimension_count": config.head_dim,
    }
    for key, number in numbers.items():
        metadata.append(_text(f"llama.{key}") + struct.pack("<II", _UINT32, number))
    floats = {
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.attention[0].rope.base,
    }
    for key, value in floats.items():
        metadata.append(_text(f"llama.{key}") + struct.pack("<If", _FLOAT32, value))
    table, sizes, offset = b"", [], 0
    for piece in _pieces(config, GGUF_LLAMA):
        stored = "F32" if len(piece.shape) == 1 else kind
        _, elements, block_bytes = TENSOR_TYPES[_NUMBERS[stored]]
        size = int(np.prod(piece.shape)) // elements * block_bytes
        shape = piece.shape[::-1]
        table += _text(piece.name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape, _NUMBERS[stored], offset
        )
        sizes.append((stored, size))
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(sizes), len(metadata)) + b"".join(metadata) + table
    patterns = {"F32": np.ones(2**20, np.float32).view(np.uint8), kind: _blocks(kind)}
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        for stored, size in sizes:
            _repeat(file, patterns[stored], size)
            file.write(bytes(-size % _ALIGNMENT))
    return path.stat().st_size


def _pieces(config: ModelConfig, naming: Naming) -> Iterable[Piece]:
    return (piece for parameter in parameters(config, naming) for piece in parameter.pieces)


def _write_shard(path: Path, pieces: list[Piece], pattern: Bytes) -> None:
    header, offset = {}, 0
    for piece in pieces:
        end = offset + 2 * int(np.prod(piece.shape))
        header[piece.name] = {
            "dtype": "BF16",
            "shape": list(piece.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        _repeat(file, pattern, offset)


def _blocks(kind: str) -> Bytes:
    """Random blocks whose scales are small: their first four bytes are those of Q4_K and Q4_1."""
    _, _, size = TENSOR_TYPES[_NUMBERS[kind]]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (_PATTERN_BYTES // size, size), np.uint8)
    scales = rng.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16)
    blocks[:, :4] = scales.view(np.uint8)
    return blocks.reshape(-1)


def _repeat(file: BinaryIO, pattern: Bytes, size: int) -> None:
    while size:
        part = pattern[: min(size, len(pattern))]
        file.write(part.data)
        size -= len(part)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw

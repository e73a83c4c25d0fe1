"""The made models of the loading benchmark are models, and their check sees a wrong row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.loading import check
from benchmarks.gpu.made_models import llama_8b, write_folder, write_gguf
from pagedd_daemon.models.config import LayerAttention, ModelConfig, Rope
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.model import read_model

SMALL = replace(
    llama_8b(context_tokens=64, layers=2),
    vocab_size=300,
    width=256,
    hidden_width=512,
    heads=8,
    kv_heads=2,
    head_dim=32,
    attention=(LayerAttention(Rope(500_000.0, 32)),) * 2,
    attention_scale=32**-0.5,
)


def shape(config: ModelConfig) -> ModelConfig:
    return replace(config, architecture="", norm_eps=round(config.norm_eps, 9))


@pytest.mark.parametrize("kind", ["safetensors", "Q4_K", "Q4_1"])
def test_made_models_load_and_their_check_sees_a_wrong_row(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if kind == "safetensors":
        size = write_folder(SMALL, path, shard_bytes=10**6)
        assert len(list(path.glob("*.safetensors"))) > 2
    else:
        size = write_gguf(SMALL, path, kind)
    assert size > SMALL.parameters() // 2
    stored = read_model(path)
    assert shape(stored.config) == shape(SMALL)
    decoder = Decoder.load(path, torch.device("cpu"), torch.bfloat16)
    check(decoder, stored)
    decoder.layers[1].qkv[-1].add_(1)
    with pytest.raises(AssertionError):
        check(decoder, stored)


def test_the_8b_shape_is_that_of_8_billion_weights() -> None:
    assert llama_8b().parameters() == 8_030_261_248
    assert llama_8b().kv_bytes_per_token(2) == 128 * 1024

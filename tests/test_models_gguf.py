"""GGUF files in the decoder: block formats against the gguf package, models against llama.cpp."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedd_daemon.models import weights
from pagedd_daemon.models.config import Rope
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.dequant import DEQUANTISERS, PLAIN, decode
from pagedd_daemon.models.errors import ModelError, ModelFileError, UnsupportedModelError
from pagedd_daemon.models.folder import read_config
from pagedd_daemon.models.gguf_config import read_gguf_model
from pagedd_daemon.models.gguf_header import read_header
from pagedd_daemon.models.stored import BLOCKS, READABLE
from tests.support.blocks import random_blocks
from tests.support.gguf_models import write_gguf
from tests.support.hf_models import write_model
from tests.support.paged import PagedSequences
from tests.support.plain_llama import PlainLlama

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", DEQUANTISERS)
def test_blocks_decode_to_the_very_numbers_of_the_gguf_package(kind: str) -> None:
    elements, _ = BLOCKS[kind]
    blocks = random_blocks(kind, 300, seed=5)
    wanted = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(100, -1)
    ours = decode(torch.from_numpy(blocks).flatten(), kind, 100, 3 * elements)
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), wanted)


def test_plain_types_decode_to_themselves() -> None:
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for kind, dtype in PLAIN.items():
        raw = values.to(dtype).view(torch.uint8).flatten()
        assert torch.equal(decode(raw, kind, 4, 6), values.to(dtype))
    assert PLAIN.keys() | DEQUANTISERS.keys() == READABLE


@pytest.mark.parametrize(
    "name",
    ["llama", "llama3", "qwen2", "qwen2-yarn", "qwen3", "gemma2", "gemma3-scaled", "phi3-longrope"],
)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "folder")
    folder = read_config(tmp_path / "folder")
    path = write_gguf(model, tmp_path / "tiny.gguf", divisors(name, folder.attention[0].rope))
    decoder = Decoder.load(path, CPU, torch.float32, context_tokens=2048)
    ids = torch.randint(3, 160, (120,), generator=torch.Generator().manual_seed(2)).tolist()
    ours = PagedSequences(decoder, [len(ids)]).step({0: ids}, every=True).numpy()
    with closing(PlainLlama(path)) as plain:
        theirs = plain.logits(ids)
    # llama.cpp multiplies its angles up from pair to pair, and looks GELU up in a table of halves.
    tolerance = 2e-3 if "gemma" in name else 1e-4
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def divisors(name: str, rope: Rope) -> dict[str, tuple[float, ...]]:
    """What the converter keeps as tensors."""
    if name == "llama3":
        return {"rope_freqs.weight": rope.divisors}
    if name == "phi3-longrope":
        return {
            "rope_factors_short.weight": rope.divisors,
            "rope_factors_long.weight": rope.long_divisors,
        }
    return {}


# ------------------------------------------------------------------------------------- refusals


def small_file(
    path: Path,
    arch: str = "llama",
    *,
    tensors: dict[str, npt.NDArray[Any] | None] | None = None,
    integers: dict[str, int] | None = None,
    tokens: int | None = None,
) -> Path:
    """A model of one layer; ``tensors`` replaces some, and drops those that are None."""
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        **(integers or {}),
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    if tokens is not None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{i}" for i in range(tokens)])
    shapes = {
        "token_embd.weight": (20, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (48, 32),
        "blk.0.ffn_up.weight": (48, 32),
        "blk.0.ffn_down.weight": (32, 48),
    }
    whole = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for name, values in {**whole, **(tensors or {})}.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> ModelError:
    """What loading says, before any weight is allocated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_empty", lambda *_: pytest.fail("memory was taken"))
        with pytest.raises(ModelError) as caught:
            Decoder.load(path, CPU, torch.float32)
    assert str(path) in (caught.value.message + str(caught.value.details))
    return caught.value


def test_a_small_file_is_loaded(tmp_path: Path) -> None:
    decoder = Decoder.load(small_file(tmp_path / "a.gguf", tokens=20), CPU, torch.float32)
    assert decoder.config.tied_head
    assert decoder.config.vocab_size == 20
    assert decoder.weight_bytes == 4 * (decoder.config.parameters() + 64 * 8)


@pytest.mark.parametrize("arch", ["mamba", "llama4", "gpt2"])
def test_an_unsupported_architecture_is_named_and_llama_cpp_offered(
    arch: str, tmp_path: Path
) -> None:
    error = refusal(small_file(tmp_path / "a.gguf", arch))
    assert isinstance(error, UnsupportedModelError)
    assert arch in error.message
    assert "--backend llama.cpp" in error.message
    assert "llama" in error.details["supported"]


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    error = refusal(small_file(tmp_path / "a.gguf", integers={"expert_count": 8}))
    assert isinstance(error, UnsupportedModelError)
    assert "8 experts" in error.message


def test_a_vocabulary_that_disagrees_with_the_embedding_is_refused(tmp_path: Path) -> None:
    error = refusal(small_file(tmp_path / "a.gguf", tokens=21))
    assert "vocabulary of 21 tokens and an embedding of 20" in error.message
    assert error.details["tensor"] == "token_embd.weight"


WRONG: dict[str, tuple[str, dict[str, npt.NDArray[Any] | None]]] = {
    "missing": ("has no tensor", {"blk.0.ffn_up.weight": None}),
    "no embedding": ("has no tensor", {"token_embd.weight": None}),
    "shape": ("of shape [32, 32]; by", {"blk.0.attn_k.weight": np.ones((32, 32), np.float32)}),
    "type": (
        "of I32, which is no type of weights",
        {"blk.0.ffn_norm.weight": np.ones(32, np.int32)},
    ),
    "head": ("of shape [21, 32]", {"output.weight": np.ones((21, 32), np.float32)}),
    "unknown": ("models do not have", {"blk.0.attn_output.bias": np.ones(32, np.float32)}),
    "divisors": ("of F32 [8] and not of F32 [4]", {"rope_freqs.weight": np.ones(8, np.float32)}),
    "zero": ("impossible values", {"rope_freqs.weight": np.zeros(4, np.float32)}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tensor_is_named_before_memory_is_taken(case: str, tmp_path: Path) -> None:
    reason, tensors = WRONG[case]
    error = refusal(small_file(tmp_path / "a.gguf", tensors=tensors))
    assert isinstance(error, ModelFileError)
    assert reason in error.message
    (name,) = tensors
    assert error.details["tensor"] == name
    assert repr(name) in error.message


def test_a_type_that_llama_cpp_alone_reads_is_refused_and_llama_cpp_offered(
    tmp_path: Path,
) -> None:
    stored = read_gguf_model(small_file(tmp_path / "a.gguf"))
    name = "blk.0.ffn_up.weight"
    other = dataclasses.replace(stored.tensors[name], kind="IQ4_NL")
    changed = dataclasses.replace(stored, tensors={**stored.tensors, name: other})
    with pytest.raises(ModelFileError, match=r"cannot read; llama\.cpp may") as caught:
        changed.plan()
    assert caught.value.details == {"tensor": name, "type": "IQ4_NL", "path": str(stored.path)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count", 5),
        ("attention.head_count_kv", 3),
        ("attention.key_length", 7),
        ("attention.value_length", 16),
        ("rope.dimension_count", 10),
        ("block_count", 5000),
    ],
)
def test_an_impossible_figure_is_refused(key: str, value: int, tmp_path: Path) -> None:
    error = refusal(small_file(tmp_path / "a.gguf", integers={key: value}))
    assert isinstance(error, ModelFileError)


def test_a_file_that_ends_while_it_is_read_is_refused_with_the_tensor(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf")
    stored = read_gguf_model(path)
    last = max(stored.tensors.values(), key=lambda t: t.offset)
    with path.open("r+b") as file:
        file.truncate(last.offset + 8)
    with pytest.raises(ModelFileError, match="ends within tensor") as caught:
        weights.load_weights(stored, CPU, torch.float32)
    assert caught.value.details["tensor"] == last.name


@given(data=st.data())
@settings(max_examples=200)
def test_whatever_is_damaged_in_a_header_is_a_model_or_a_refusal(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole.gguf"
    if not whole.exists():
        scaling = {"rope.scaling.original_context_length": 32, "attention.sliding_window": 16}
        freqs: dict[str, npt.NDArray[Any] | None] = {"rope_freqs.weight": np.ones(4, np.float32)}
        small_file(whole, tensors=freqs, integers=scaling, tokens=20)
    raw = bytearray(whole.read_bytes())
    end = read_header(whole).header_bytes
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(24, end - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.gguf"
    path.write_bytes(raw)
    with contextlib.suppress(ModelError):
        stored = read_gguf_model(path)
        for _, tensors in stored.plan():
            assert all(t.offset + t.size <= len(raw) for t in tensors)

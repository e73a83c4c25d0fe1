"""Model folders in Hugging Face's layout: what is read, and what is refused before it costs."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pagedd_daemon.models import weights
from pagedd_daemon.models.config import fits
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.errors import (
    ModelError,
    ModelFileError,
    ModelTooLargeError,
    UnsupportedModelError,
)
from pagedd_daemon.models.families import config_of
from pagedd_daemon.models.fields import Fields
from pagedd_daemon.models.folder import read_config, read_folder
from pagedd_daemon.models.safetensors_header import SafetensorsLimits, read_safetensors
from tests.support.hf_models import MODELS, write_model
from tests.support.paged import PagedSequences

CPU = torch.device("cpu")
TEXT = list(range(3, 90))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama model in one file."""
    folder = tmp_path_factory.mktemp("llama")
    write_model("llama", folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def refusal(folder: Path) -> ModelError:
    """What loading says, before any weight is allocated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_empty", lambda *_: pytest.fail("memory was taken"))
        with pytest.raises(ModelError) as caught:
            Decoder.load(folder, CPU, torch.float32)
    assert caught.value.code == "E_MODEL"
    return caught.value


# ------------------------------------------------------------------------------------- loading


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    decoder = Decoder.load(folder, CPU, dtype, context_tokens=128)
    return PagedSequences(decoder, [len(TEXT)]).step({0: TEXT}, every=True)


def test_shards_and_small_buffers_change_nothing(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model("llama", tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = logits(written)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)
    told: list[tuple[int, int]] = []
    Decoder.load(tmp_path, CPU, torch.float32, lambda done, total: told.append((done, total)))
    assert torch.equal(logits(tmp_path), whole)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_stored_type_gives_its_own_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = write_model("llama3", tmp_path, dtype=dtype)
    with torch.inference_mode():
        wanted = reference(torch.tensor([TEXT])).logits[0]
    ours = logits(tmp_path)
    assert float((ours - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_float64_gives_the_same_tokens_in_any_chunks(written: Path) -> None:
    decoder = Decoder.load(written, CPU, torch.float64, context_tokens=128)
    whole = PagedSequences(decoder, [len(TEXT)]).step({0: TEXT}, every=True)
    run, rows = PagedSequences(decoder, [len(TEXT)], seed=1), []
    for first in range(0, len(TEXT), 13):
        rows.append(run.step({0: TEXT[first : first + 13]}, every=True))
    assert whole.dtype == torch.float64
    assert torch.equal(torch.cat(rows).argmax(-1), whole.argmax(-1))
    assert float((torch.cat(rows) - whole).abs().max()) < 1e-12


def test_longrope_serves_all_of_a_long_context_with_its_long_divisors(tmp_path: Path) -> None:
    reference = write_model("phi3-longrope", tmp_path)
    with torch.inference_mode():
        wanted = reference(torch.tensor([TEXT])).logits[0]  # 87 tokens: more than the 64 of before
    ours = logits(tmp_path)
    assert float((ours - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_random_weights_are_made_by_their_seed(written: Path) -> None:
    config = read_config(written)
    one, same, other = (Decoder.random(config, CPU, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(one.layers[2].down, same.layers[2].down)
    assert not torch.equal(one.layers[2].down, other.layers[2].down)
    step = PagedSequences(one, [len(TEXT)]).step({0: TEXT})
    assert bool(step.isfinite().all())
    assert 0.1 < float(step.std()) < 10


def test_the_seeing_gemma_3_gives_its_language_model(tmp_path: Path) -> None:
    reference = write_model("gemma3", tmp_path)
    change(
        tmp_path,
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=json.loads((tmp_path / "config.json").read_text()),
        vision_config={},
    )
    with torch.inference_mode():
        wanted = reference(torch.tensor([TEXT])).logits[0]
    tensors = tensors_of(tmp_path)
    for prefix, instead in (("model.", "model.language_model."), ("", "language_model.")):
        renamed = {instead + n.removeprefix(prefix): t for n, t in tensors.items()}
        renamed["vision_tower.patch.weight"] = torch.zeros(3)
        save_file(renamed, tmp_path / "model.safetensors")
        ours = logits(tmp_path)
        assert float((ours - wanted).abs().max() / wanted.abs().max()) <= 1e-5


# ------------------------------------------------------------------------------ the configuration


def test_the_generation_config_names_further_ends(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_config(folder).eog_tokens == {2, 7, 9}


def test_an_older_config_says_the_same_of_its_rope(folder: Path) -> None:
    """Before transformers 5: ``rope_theta`` and ``rope_scaling`` instead of ``rope_parameters``."""
    scaling = {"rope_type": "linear", "factor": 4.0}
    change(folder, rope_parameters={**scaling, "rope_theta": 5e5})
    new = read_config(folder)
    change(folder, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    assert read_config(folder) == new
    change(folder, rope_scaling={"type": "linear", "factor": 4.0})
    assert read_config(folder) == new
    assert new.attention[0].rope.frequencies(64)[0] == 0.25


def test_older_configs_of_gemma_say_the_same_of_windows_and_ropes(tmp_path: Path) -> None:
    """As the published folders have them: rules and defaults instead of a list of layers."""
    for name, plain in (
        (
            "gemma3-scaled",
            {
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 6,
            },
        ),
        ("gemma2", {"rope_theta": 10_000.0, "hidden_act": "gelu_pytorch_tanh"}),
    ):
        folder = tmp_path / name
        write_model(name, folder)
        new = read_config(folder)
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        for absent in ("rope_parameters", "layer_types", "hidden_activation", "rms_norm_eps"):
            fields.pop(absent, None)
        path.write_text(json.dumps({**fields, **plain}))
        assert read_config(folder) == new
        assert {layer.window for layer in new.attention} == {0, 20}


def test_the_text_half_of_gemma_3_has_defaults_for_all_it_leaves_out(tmp_path: Path) -> None:
    """The published 4B: its ``text_config`` says six figures."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "eos_token_id": [1, 106],
                "text_config": text,
            }
        )
    )
    config = read_config(tmp_path)
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.context_tokens) == (262_208, 131_072)
    assert [layer.window for layer in config.attention[:6]] == [1024] * 5 + [0]
    assert config.attention[0].rope.base == 10_000
    assert config.attention[5].rope.base == 1_000_000
    assert config.attention[5].rope.divisors == (8.0,) * 128
    assert config.tied_head
    assert config.eog_tokens == {1, 106}
    assert config.kv_bytes_per_token(2) == 34 * 2 * 4 * 256 * 2


@pytest.mark.parametrize(
    "architecture", ["MixtralForCausalLM", "MambaForCausalLM", "T5ForConditionalGeneration"]
)
def test_an_unsupported_architecture_is_named_and_llama_cpp_offered(
    architecture: str, folder: Path
) -> None:
    change(folder, architectures=[architecture])
    error = refusal(folder)
    assert isinstance(error, UnsupportedModelError)
    assert architecture in error.message
    assert "--backend llama.cpp" in error.message


@pytest.mark.parametrize(
    ("trait", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("hidden_act", "relu"),
    ],
)
def test_a_trait_that_would_be_computed_wrongly_is_refused(
    trait: str, value: Any, folder: Path
) -> None:
    change(folder, **{trait: value})
    assert isinstance(refusal(folder), UnsupportedModelError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", []),
        ("architectures", "LlamaForCausalLM"),
        ("hidden_size", None),
        ("hidden_size", -64),
        ("hidden_size", 64.5),
        ("hidden_size", True),
        ("vocab_size", 2**31),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", 1),
        ("eos_token_id", [-1]),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1]}),
    ],
)
def test_an_impossible_figure_is_refused_with_its_name(
    field: str, value: Any, folder: Path
) -> None:
    change(folder, **{field: value})
    error = refusal(folder)
    assert isinstance(error, ModelFileError)
    assert error.path == folder / "config.json"
    assert field in error.message or field in error.details["field"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b'{"a": ' * 100_000, b" " * (2**20 + 1)]
)
def test_a_config_that_is_none_is_refused(raw: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(raw)
    error = refusal(folder)
    assert isinstance(error, ModelFileError)
    assert error.path == folder / "config.json"


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.integers(0, 64)
    | st.floats()
    | st.sampled_from(["", "default", "llama3", "yarn", "longrope", "linear", "silu", "x" * 500]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("name", ["llama3", "gemma3-scaled", "phi3-longrope", "qwen2-yarn"])
@given(data=st.data())
@settings(max_examples=150)
def test_whatever_a_config_says_is_a_model_or_a_refusal(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = {**MODELS[name]().to_dict(), "architectures": [ARCHITECTURES[name]]}
    places = [fields, *(v for v in fields.values() if isinstance(v, dict))]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ANYTHING)
    path = tmp_path_factory.getbasetemp() / f"{name}.json"
    try:
        config = config_of(Fields(path, fields))
    except ModelError:
        return
    assert config.parameters() > 0
    for layer in config.attention:
        for context in (1, config.context_tokens):
            assert all(math.isfinite(f) for f in layer.rope.frequencies(context))


ARCHITECTURES = {
    "llama3": "LlamaForCausalLM",
    "gemma3-scaled": "Gemma3ForCausalLM",
    "phi3-longrope": "Phi3ForCausalLM",
    "qwen2-yarn": "Qwen2ForCausalLM",
}


# -------------------------------------------------------------------------------------- the tensors


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    error = refusal(folder)
    assert error.details["tensor"] == "model.layers.1.mlp.up_proj.weight"


def test_an_absent_output_head_is_refused_unless_the_embedding_is_said_to_be_it(
    folder: Path,
) -> None:
    tensors = tensors_of(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    error = refusal(folder)
    assert "no output head" in error.message
    assert error.details["tensor"] == "lm_head.weight"
    change(folder, tie_word_embeddings=True)
    decoder = Decoder.load(folder, CPU, torch.float32)
    assert decoder.head is decoder.embedding


def test_a_tensor_that_the_architecture_has_not_is_refused(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.layers.0.rotary_emb.inv_freq"] = torch.ones(8)  # a table; old files have it
    save_file(tensors, folder / "model.safetensors")
    Decoder.load(folder, CPU, torch.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors")
    assert refusal(folder).details["tensor"] == "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_a_type_that_cannot_be_read_is_refused_with_file_and_tensor(
    dtype: torch.dtype, folder: Path
) -> None:
    tensors = tensors_of(folder)
    name = "model.layers.2.self_attn.v_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    error = refusal(folder)
    assert isinstance(error, ModelFileError)
    assert (error.path.name, error.details["tensor"]) == ("model.safetensors", name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 161), ("intermediate_size", 97), ("num_key_value_heads", 4), ("head_dim", 32)],
)
def test_shapes_that_disagree_with_the_config_are_refused_with_both(
    field: str, value: int, folder: Path
) -> None:
    change(folder, **{field: value})
    error = refusal(folder)
    assert error.details["shape"] != error.details["expected_shape"]
    assert "tensor" in error.details


# --------------------------------------------------------------------------------------- the index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_model("llama", tmp_path, max_shard_size="60KB")
    return tmp_path


def index_of(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    error = refusal(sharded)
    assert isinstance(error, ModelFileError)
    assert error.path == shard
    assert error.details["shard"] == shard.name


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_an_index_cannot_name_a_file_elsewhere(name: str, sharded: Path) -> None:
    index_of(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    error = refusal(sharded)
    assert "outside its folder" in error.message


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_index_may_name_what_no_file_can_be_called(name: str, sharded: Path) -> None:
    index_of(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    assert "is missing" in refusal(sharded).message


def test_an_index_that_names_tensors_that_are_not_there_is_refused(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    index_of(sharded, lambda index: index["weight_map"].update({"none": shard}))
    assert refusal(sharded).details["tensor"] == "none"
    index_of(sharded, lambda index: index.update(weight_map={}))
    assert "weight_map" in refusal(sharded).message


def test_a_folder_without_weights_says_which_file_it_wants(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: does not exist" in refusal(folder).message


# ------------------------------------------------------------------------------ safetensors headers


def file_of(path: Path, header: object, data: int = 64, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def entry(
    begin: int = 0, end: int = 16, shape: object = (4,), kind: object = "F32"
) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[object, str]] = {
    "no JSON": (b"{]", "no JSON"),
    "no brace": (b" {}", "does not begin with a brace"),
    "no UTF-8": (b'{"\xff": 1}', "no JSON"),
    "deep": (b'{"a":' * 50_000, "no JSON"),
    "empty": ({}, "no tensors"),
    "only metadata": ({"__metadata__": {"format": "pt"}}, "no tensors"),
    "no map": ({"a": [1]}, "does not describe"),
    "type": ({"a": entry(kind="F4")}, "unknown type"),
    "type of type": ({"a": entry(kind=["F32"])}, "unknown type"),
    "shape": ({"a": entry(shape="4")}, "impossible shape"),
    "negative": ({"a": entry(shape=[-4, -1])}, "impossible shape"),
    "huge": ({"a": entry(shape=[2**40, 2**40])}, "impossible shape"),
    "true": ({"a": entry(shape=[True])}, "impossible shape"),
    "dimensions": ({"a": entry(shape=[1] * 9)}, "impossible shape"),
    "size": ({"a": entry(end=12)}, "not the 16 bytes"),
    "backwards": ({"a": entry(16, 0)}, "not the 16 bytes"),
    "before": ({"a": {**entry(), "data_offsets": [-16, 0]}}, "not the 16 bytes"),
    "offsets": ({"a": {**entry(), "data_offsets": None}}, "not the 16 bytes"),
    "overlap": ({"a": entry(), "b": entry(8, 24)}, "overlapping"),
    "beyond": ({"a": entry(64, 80)}, "is truncated"),
    "name": ({"n" * 600: entry()}, "more than 512 bytes"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused(case: str, tmp_path: Path) -> None:
    header, reason = BROKEN[case]
    with pytest.raises(ModelFileError) as caught:
        read_safetensors(file_of(tmp_path / "a.safetensors", header))
    assert reason in caught.value.message
    assert caught.value.details["path"] == str(tmp_path / "a.safetensors")


def test_lengths_over_limit_or_file_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length, reason in ((2**63, "the limit"), (2**23 + 1, "the limit"), (10**6, "truncated")):
        with pytest.raises(ModelFileError, match=reason):
            read_safetensors(file_of(path, {"a": entry()}, length=length))
    with pytest.raises(ModelFileError, match="2 tensors; 1 is the limit"):
        read_safetensors(
            file_of(path, {"a": entry(), "b": entry(16, 32)}), SafetensorsLimits(tensors=1)
        )
    for raw, reason in ((b"", "is empty"), (b"12345678", "is truncated")):
        path.write_bytes(raw)
        with pytest.raises(ModelFileError, match=reason):
            read_safetensors(path)


@given(st.data())
def test_any_damage_to_a_header_is_a_refusal_or_a_table_within_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    file_of(path, {"a": entry(), "b": entry(16, 32, [2, 2]), "__metadata__": {"format": "pt"}})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 65))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    path.write_bytes(raw[:cut])
    try:
        read = read_safetensors(path)
    except ModelFileError:
        return
    for tensor in read.tensors.values():
        assert 8 <= tensor.offset <= tensor.offset + tensor.size <= cut


def test_the_digest_sees_config_header_and_data(folder: Path) -> None:
    seen = {read_folder(folder).digest}
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    seen.add(read_folder(folder).digest)
    change(folder, rms_norm_eps=1e-3)
    seen.add(read_folder(folder).digest)
    assert len(seen) == 3


# ------------------------------------------------------------------------------------------ fitting


def test_a_model_that_does_not_fit_is_refused_with_the_figures(written: Path) -> None:
    config = read_config(written)
    weight_bytes, per_token = 2 * config.parameters(), config.kv_bytes_per_token(2)
    needed = weight_bytes + 32 * per_token + 1000
    footprint = fits(config, dtype_bytes=2, free_bytes=needed, tokens=32, reserve_bytes=1000)
    assert (footprint.weights, footprint.kv_per_1000_tokens) == (weight_bytes, 1000 * per_token)
    with pytest.raises(ModelTooLargeError) as caught:
        fits(config, dtype_bytes=2, free_bytes=needed - 1, tokens=32, reserve_bytes=1000)
    assert caught.value.details == {
        "weights_bytes": weight_bytes,
        "kv_bytes_per_1000_tokens": 1000 * per_token,
        "free_bytes": needed - 1,
        "needed_bytes": needed,
        "tokens": 32,
    }


def test_the_weights_counted_are_the_weights_loaded(written: Path) -> None:
    decoder = Decoder.load(written, CPU, torch.float32, context_tokens=16)
    tables = 16 * decoder.config.head_dim
    assert decoder.weight_bytes == 4 * (decoder.config.parameters() + tables)

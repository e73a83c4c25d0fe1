"""The GGUF header check: every field of a good file, and a quick, clear refusal of every other."""

from __future__ import annotations

import hashlib
import math
import os
import random
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.chaos.mutants import agrees
from pagedd_daemon.models import ggml_types
from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.gguf_header import GgufHeader, HeaderLimits, read_header


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: str,
    shape: tuple[int, ...] = (32,),
    kind: int = 0,
    offset: int = 0,
    dims: int | None = None,
) -> bytes:
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


ARCHITECTURE = entry("general.architecture", 8, text("llama"))


def layers(count: int) -> bytes:
    return entry("llama.block_count", 4, struct.pack("<I", count))


def epsilon(value: float) -> bytes:
    key = "llama.attention.layer_norm_rms_epsilon"
    return entry(key, 6, struct.pack("<f", value))


def file_of(
    path: Path,
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> Path:
    """A file of exactly these parts, right or wrong."""
    entries = [ARCHITECTURE] if entries is None else entries
    tensors = [tensor("a")] if tensors is None else tensors
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, tensor_count, entry_count)
    path.write_bytes(head + b"".join(entries) + b"".join(tensors) + bytes(data))
    return path


def model_file(path: Path) -> Path:
    """A small model as the `gguf` package writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(512)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1])
    writer.add_file_type(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 3])
    writer.add_chat_template("{{ messages }}" * 1000)
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.add_tensor("output.weight", np.zeros((3, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_field_of_a_written_model_is_read(tmp_path: Path) -> None:
    path = model_file(tmp_path / "tiny.gguf")
    header = read_header(path)
    assert header == GgufHeader(
        path=path,
        version=3,
        architecture="llama",
        name="Tiny",
        context_length=512,
        block_count=2,
        vocab_size=3,
        heads=4,
        kv_heads=2,
        key_length=16,
        value_length=16,
        parameters=2 * 3 * 64,
        tensors=2,
        quantization="Q4_1",
        size_bytes=path.stat().st_size,
        header_bytes=gguf.GGUFReader(path).data_offset,
        tokenizer="gpt2",
        has_chat_template=True,
        digest=header.digest,
    )


@pytest.mark.model
def test_the_packaged_model_is_read(smollm2_path: Path) -> None:
    header = read_header(smollm2_path)
    assert (header.architecture, header.quantization) == ("llama", "Q4_1")
    assert (header.block_count, header.heads, header.kv_heads) == (30, 9, 3)
    assert (header.key_length, header.context_length) == (64, 8192)
    assert (header.vocab_size, header.parameters) == (49152, 134_515_008)
    assert header.tokenizer == "gpt2"
    assert header.has_chat_template


def test_the_digest_is_what_is_documented_and_sees_data_size_and_header(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.gguf", data=10 * 2**20)
    raw = path.read_bytes()
    end = 24 + len(ARCHITECTURE) + len(tensor("a"))
    expected = hashlib.sha256(raw[:end] + struct.pack("<Q", len(raw)))
    for index in range(64):
        start = (len(raw) - 65_536) * index // 63
        expected.update(raw[start : start + 65_536])
    assert read_header(path).digest == expected.digest()
    seen = {expected.digest()}
    for at in (end + 5, len(raw) - 1):
        path.write_bytes(raw[:at] + b"\1" + raw[at + 1 :])
        seen.add(read_header(path).digest)
    path.write_bytes(raw + b"\0")
    seen.add(read_header(path).digest)
    assert len(seen) == 4


def test_the_quantisation_is_that_of_most_elements_where_none_is_named(tmp_path: Path) -> None:
    path = file_of(
        tmp_path / "a.gguf", None, [tensor("a", (32,), 0), tensor("b", (256, 1), 12, offset=128)]
    )
    assert read_header(path).quantization == "Q4_K"


def test_value_and_tensor_types_are_those_of_the_gguf_package() -> None:
    sizes = {
        kind.value: (kind.name, *size) for kind, size in gguf.constants.GGML_QUANT_SIZES.items()
    }
    assert sizes == ggml_types.TENSOR_TYPES
    scalars = {v.value for v in gguf.GGUFValueType} - {ggml_types.ARRAY, ggml_types.STRING}
    assert scalars == set(ggml_types.SCALARS)
    labels = {
        t.value: t.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for t in gguf.LlamaFileType
        if t.name != "GUESSED"
    }
    assert labels == ggml_types.FILE_TYPES


NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
VECTORS: dict[str, tuple[int, ...]] = {
    "output_norm.weight": (256,),
    "a scalar": (),
    "blk.0.attn_q_norm.weight": (256, 2),
    "blk.0.ffn_up_exps.bias": (256, 2),
    "rope_freqs.weight": (256, 1),
}


@pytest.mark.parametrize("kind", ggml_types.TENSOR_TYPES)
def test_what_llama_cpp_cannot_compute_with_is_refused_and_named(kind: int, tmp_path: Path) -> None:
    label, block, _ = ggml_types.TENSOR_TYPES[kind]
    matrix = file_of(tmp_path / "m.gguf", None, [tensor("m", (256, 1), kind)])
    if label in NO_WEIGHTS:
        assert f"tensor 'm' of {label}, which is no type of weights" in refusal(matrix).message
        return
    assert read_header(matrix).tensors == 1
    for name, shape in VECTORS.items():
        if not shape and block > 1:
            continue
        vector = file_of(tmp_path / "v.gguf", None, [tensor(name, shape, kind)])
        if label == "F32":
            assert read_header(vector).tensors == 1
        else:
            error = refusal(vector)
            assert f"tensor {name!r} of {label}, where only F32 can be used" in error.message
            assert (error.details["tensor"], error.details["type"]) == (name, label)


# ------------------------------------------------------------------------------------- no model


def refusal(path: Path, limits: HeaderLimits | None = None) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        read_header(path, limits)
    assert caught.value.code == "E_MODEL"
    assert caught.value.details["path"] == str(path)
    assert str(path) in caught.value.message
    return caught.value


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "empty.gguf").touch()
    reasons = {
        tmp_path / "none.gguf": "does not exist",
        tmp_path: "is a directory",
        tmp_path / "pipe.gguf": "is a named pipe",
        Path("/dev/zero"): "is a character device",
        tmp_path / "dangling.gguf": "is a symbolic link to",
        tmp_path / "loop.gguf": "cannot be opened",
        tmp_path / "none.gguf" / "x": "does not exist",
        tmp_path / ("x" * 300): "cannot be opened",
        tmp_path / "nul\0byte": "cannot be opened",
        tmp_path / "empty.gguf": "is empty",
    }
    for path, reason in reasons.items():
        assert refusal(path).reason.startswith(reason), path


def test_a_link_to_a_model_is_followed(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.gguf")
    (tmp_path / "link.gguf").symlink_to(path)
    assert read_header(tmp_path / "link.gguf").digest == read_header(path).digest


def test_truncation_at_any_byte_is_refused_with_the_sizes(tmp_path: Path) -> None:
    whole = model_file(tmp_path / "tiny.gguf").read_bytes()
    last = gguf.GGUFReader(tmp_path / "tiny.gguf").tensors[-1]
    needed = int(last.data_offset + last.n_bytes)
    path = tmp_path / "cut.gguf"
    for size in [*range(1, 200), *range(200, needed, 97), needed - 1]:
        path.write_bytes(whole[:size])
        error = refusal(path)
        assert error.reason.startswith("is truncated"), size
        assert error.details["size_bytes"] == size < error.details["needed_bytes"] <= needed
    path.write_bytes(whole[:needed])
    read_header(path)


HUGE = 2**63 + 5
BROKEN: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "magic": ("is not a GGUF file", lambda p: file_of(p, magic=b"GGJT")),
    "version 1": ("version 1", lambda p: file_of(p, version=1)),
    "version 4": ("version 4", lambda p: file_of(p, version=4)),
    "big endian": ("big-endian", lambda p: file_of(p, version=0x03000000)),
    "tensor count": ("tensors; 65536", lambda p: file_of(p, counts=(HUGE, 1))),
    "entry count": ("metadata entries", lambda p: file_of(p, counts=(1, HUGE))),
    "no tensors": ("no tensors", lambda p: file_of(p, tensors=[])),
    "no architecture": ("does not name an architecture", lambda p: file_of(p, [])),
    "architecture is a number": (
        "does not name an architecture",
        lambda p: file_of(p, [entry("general.architecture", 4, bytes(4))]),
    ),
    "adapter": (
        "'adapter' and not a model",
        lambda p: file_of(p, [ARCHITECTURE, entry("general.type", 8, text("adapter"))]),
    ),
    "split": (
        "one of 3 parts",
        lambda p: file_of(p, [ARCHITECTURE, entry("split.count", 2, struct.pack("<H", 3))]),
    ),
    "key twice": ("twice", lambda p: file_of(p, [ARCHITECTURE, ARCHITECTURE])),
    "empty key": ("empty metadata key", lambda p: file_of(p, [entry("", 4, bytes(4))])),
    "key not text": ("not UTF-8", lambda p: file_of(p, [entry(b"\xff\xfe", 4, bytes(4))])),
    "long key": ("bytes of a metadata key", lambda p: file_of(p, [entry("k" * 2000, 4, bytes(4))])),
    "key length overflows": (
        "bytes of a metadata key",
        lambda p: file_of(p, [struct.pack("<Q", HUGE)]),
    ),
    "value type": ("unknown type 13", lambda p: file_of(p, [entry("k", 13, bytes(8))])),
    "truth value": ("truth value of 2", lambda p: file_of(p, [entry("k", 7, b"\2")])),
    "string length overflows": (
        "bytes of the value",
        lambda p: file_of(p, [entry("k", 8, struct.pack("<Q", HUGE))]),
    ),
    "string past the end": (
        "truncated",
        lambda p: file_of(p, [entry("k", 8, struct.pack("<Q", 10**6))]),
    ),
    "array count overflows": (
        "elements of 'k'",
        lambda p: file_of(p, [entry("k", 9, struct.pack("<IQ", 4, HUGE))]),
    ),
    "array past the end": (
        "truncated",
        lambda p: file_of(p, [entry("k", 9, struct.pack("<IQ", 12, 10**7))]),
    ),
    "many strings in a small file": (
        "truncated",
        lambda p: file_of(p, [entry("k", 9, struct.pack("<IQ", 8, 10**6))]),
    ),
    "too many strings": (
        "strings in arrays",
        lambda p: file_of(p, [entry("k", 9, struct.pack("<IQ", 8, 2**22))]),
    ),
    "string in an array overflows": (
        "bytes of an element",
        lambda p: file_of(p, [entry("k", 9, struct.pack("<IQQ", 8, 1, HUGE))]),
    ),
    "no layers": ("says that it has 0 layers", lambda p: file_of(p, [ARCHITECTURE, layers(0)])),
    "many layers": ("1 to 512", lambda p: file_of(p, [ARCHITECTURE, layers(513)])),
    "layers are text": (
        "layers",
        lambda p: file_of(p, [ARCHITECTURE, entry("llama.block_count", 8, text("2"))]),
    ),
    "negative epsilon": ("epsilon of -1.0", lambda p: file_of(p, [ARCHITECTURE, epsilon(-1)])),
    "no epsilon": ("epsilon of nan", lambda p: file_of(p, [ARCHITECTURE, epsilon(math.nan)])),
    "arrays of arrays": (
        "unusable type 9",
        lambda p: file_of(p, [entry("k", 9, struct.pack("<IQ", 9, 1))]),
    ),
    "array of an unknown type": (
        "unusable type 99",
        lambda p: file_of(p, [entry("k", 9, struct.pack("<IQ", 99, 1))]),
    ),
    "alignment 0": (
        "alignment of 0",
        lambda p: file_of(p, [ARCHITECTURE, entry("general.alignment", 4, bytes(4))]),
    ),
    "alignment 24": (
        "alignment of 24",
        lambda p: file_of(p, [entry("general.alignment", 4, struct.pack("<I", 24))]),
    ),
    "alignment is text": (
        "alignment of 'x'",
        lambda p: file_of(p, [entry("general.alignment", 8, text("x"))]),
    ),
    "long tensor name": (
        "bytes of a tensor name",
        lambda p: file_of(p, None, [tensor("n" * 64)]),
    ),
    "dimensions": ("dimensions", lambda p: file_of(p, None, [tensor("a", (1,) * 5)])),
    "dimension count overflows": (
        "dimensions",
        lambda p: file_of(p, None, [tensor("a", dims=2**32 - 1)]),
    ),
    "dimension of 0": ("impossible shape", lambda p: file_of(p, None, [tensor("a", (32, 0))])),
    "product wraps to 0": (
        "impossible shape",
        lambda p: file_of(p, None, [tensor("a", (2**32, 2**32))]),
    ),
    "huge dimension": ("impossible shape", lambda p: file_of(p, None, [tensor("a", (HUGE,))])),
    "tensor type": ("unknown type 42", lambda p: file_of(p, None, [tensor("a", kind=42)])),
    "removed tensor type": ("unknown type 4", lambda p: file_of(p, None, [tensor("a", kind=4)])),
    "integers": (
        "of I32, which is no type of weights",
        lambda p: file_of(p, None, [tensor("a", kind=26)]),
    ),
    "rows are no blocks": (
        "rows of 33",
        lambda p: file_of(p, None, [tensor("a", (33, 32), kind=2)]),
    ),
    "key that goes on behind a zero byte": (
        "a metadata key with a zero byte",
        lambda p: file_of(p, [ARCHITECTURE, entry("llama.block_count\0", 4, struct.pack("<I", 0))]),
    ),
    "architecture that goes on behind a zero byte": (
        "does not name an architecture",
        lambda p: file_of(p, [entry("general.architecture", 8, text("llama\0")), layers(0)]),
    ),
    "tensor's name that goes on behind a zero byte": (
        "a tensor name with a zero byte",
        lambda p: file_of(p, None, [tensor("a\0")]),
    ),
    "unaligned": ("not aligned", lambda p: file_of(p, None, [tensor("a", offset=8)])),
    "name twice": (
        "twice",
        lambda p: file_of(p, None, [tensor("a"), tensor("a", offset=128)]),
    ),
    "overlap": (
        "overlapping",
        lambda p: file_of(p, None, [tensor("a", (64,), offset=0), tensor("b", offset=128)]),
    ),
    "offset past the end": (
        "truncated",
        lambda p: file_of(p, None, [tensor("a", offset=2**20)]),
    ),
    "offset overflows": (
        "truncated",
        lambda p: file_of(p, None, [tensor("a", offset=2**64 - 32)]),
    ),
    "tensor past the end": (
        "truncated",
        lambda p: file_of(p, None, [tensor("a", (1024, 1024))]),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    reason, make = BROKEN[case]
    assert reason in refusal(make(tmp_path / "broken.gguf")).reason


def test_a_header_over_the_limit_is_refused_though_the_file_is_large(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    file_of(path, [entry("k", 9, struct.pack("<IQ", 10, 2**26))])  # 512 MiB of numbers
    os.truncate(path, 2**40)
    assert "has a header of more than" in refusal(path).reason
    small = HeaderLimits(header_bytes=64)
    assert "more than 64 bytes" in refusal(file_of(tmp_path / "a.gguf"), small).reason


def test_a_header_cannot_fill_the_memory_of_who_reads_it(tmp_path: Path) -> None:
    numbers = struct.pack("<IQ", 10, 4096) + bytes(range(256)) * 128
    many = [entry(f"k{i}", 9, numbers) for i in range(1000)]
    path = file_of(tmp_path / "a.gguf", [ARCHITECTURE, *many])
    tracemalloc.start()
    read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_mutants_of_a_header_are_refused_or_read_and_never_cost_much(tmp_path: Path) -> None:
    whole = model_file(tmp_path / "tiny.gguf").read_bytes()
    end = gguf.GGUFReader(tmp_path / "tiny.gguf").data_offset
    template = whole.index(b"{{ messages }}")
    # The long template is one string: bytes inside it are no structure.
    places = [*range(template), *range(template + 14_000, end)]
    seed = random.SystemRandom().randrange(2**32)
    print(f"mutants: seed {seed}")
    rng = random.Random(seed)
    path = tmp_path / "mutant.gguf"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = 0
    for _ in range(600):
        mutant = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(places)
            if rng.random() < 0.5:
                mutant[at] = rng.randrange(256)
            else:
                number = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)])
                mutant[at : at + 8] = struct.pack("<Q", number)
        path.write_bytes(mutant[: rng.choice([len(mutant), len(mutant), rng.randrange(24, end)])])
        try:
            header = read_header(path)
        except ModelFileError:
            continue
        read += 1
        assert agrees(header, path)
    assert read < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024

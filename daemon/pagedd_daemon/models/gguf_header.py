"""Reads and checks the header of a GGUF file, before anything else touches the file.

llama.cpp's own reader has had an overflow in its header code year after year, so no file reaches it
that has not passed here. Nothing is mapped and nothing large is kept: the header goes by in
pieces, and the vocabulary's arrays are skipped. Format: ggml's ``docs/gguf.md``, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.files import open_regular
from pagedd_daemon.models.ggml_types import (
    ARRAY,
    BOOL,
    FILE_TYPES,
    SCALARS,
    STRING,
    TENSOR_TYPES,
)
from pagedd_daemon.models.gguf_reader import BoundedReader, HeaderLimits
from pagedd_daemon.models.stored import StoredTensor

__all__ = ["GgufFile", "GgufHeader", "HeaderLimits", "Skipped", "read_gguf", "read_header"]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header of a model says. `None` where it does not say."""

    path: Path
    version: int
    architecture: str
    name: str | None
    context_length: int | None
    """Tokens the model was trained with."""
    block_count: int | None
    """Layers."""
    vocab_size: int | None
    heads: int | None
    kv_heads: int | None
    """The largest of all layers."""
    key_length: int | None
    """Elements of one key head."""
    value_length: int | None
    """Elements of one value head."""
    parameters: int
    """Elements of all tensors."""
    tensors: int
    quantization: str
    """As people call it: ``Q4_1``, ``Q4_K_M``, ``F16``."""
    size_bytes: int
    """Of the file."""
    header_bytes: int
    """Bytes before the tensor data."""
    tokenizer: str | None
    """``tokenizer.ggml.model``: ``gpt2``, ``llama``, …"""
    has_chat_template: bool
    digest: bytes
    """32 bytes that name the file: SHA-256 over the header, the file size (uint64) and `SAMPLES`
    evenly spaced pieces of `SAMPLE_BYTES`, so that it takes milliseconds for a file of any size."""


_MAGIC = b"GGUF"
_EPSILONS = ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon")
_NO_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
"""llama.cpp takes tensors of these types and multiplies by them: an assertion, or a jump to
nowhere. The last two are what it makes of activations."""
_VECTORS = (".bias", "_norm.weight")
"""How tensors end that are added or multiplied element by element, whatever their shape."""
_KEPT_STRING_BYTES = 1024
_KEPT_ELEMENTS = 65_536
"""Numbers of all arrays together that are kept: some models say a figure for every layer."""
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header with all that was kept of it."""

    header: GgufHeader
    values: Mapping[str, Any]
    """Metadata: numbers, texts up to `_KEPT_STRING_BYTES`, short arrays of numbers as tuples, and
    `Skipped` for the rest."""
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A value that was checked and not kept."""

    count: int
    """Elements of the array; 1 for a text."""


def read_header(path: Path, limits: HeaderLimits | None = None) -> GgufHeader:
    """Check a GGUF file's header and say what is in it: `read_gguf` without the tables."""
    return read_gguf(path, limits).header


def read_gguf(path: Path, limits: HeaderLimits | None = None) -> GgufFile:
    """Check a GGUF file's header, and keep its metadata and the table of its tensors.

    Args:
        path: The file; symbolic links are followed.
        limits: What to refuse.

    Raises:
        ModelFileError: It cannot be read, is no GGUF model, or is damaged.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        header = _Header(path, fd, size, limits or HeaderLimits())
        return header.read()
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    kind: int
    shape: tuple[int, ...]
    elements: int
    offset: int
    size: int


class _Header(BoundedReader):
    """One pass over a header."""

    def __init__(self, path: Path, fd: int, size: int, limits: HeaderLimits) -> None:
        super().__init__(path, fd, size, limits)
        self._strings = 0  # walked so far
        self._kept = 0  # numbers of arrays

    def read(self) -> GgufFile:
        version, tensor_count, entry_count = self._preamble()
        values: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._text(self._limits.key_bytes, "a metadata key")
            if not key:
                self._refuse("has an empty metadata key")
            if key in values:
                self._refuse(f"has the metadata key {key!r} twice")
            values[key] = self._value(key)
        alignment = self._alignment(values)
        tensors = [self._tensor(alignment) for _ in range(tensor_count)]
        end = self._position()
        self._bound_header(end)  # it may have fitted into the first window
        data = -(-end // alignment) * alignment
        self._check_data(tensors, data)
        header = self._summary(version, values, tensors, data, self._digest(end))
        stored = {
            t.name: StoredTensor(
                t.name,
                self._path,
                data + t.offset,
                t.size,
                TENSOR_TYPES[t.kind][0],
                t.shape[::-1],  # ggml counts dimensions from the contiguous one
            )
            for t in tensors
        }
        return GgufFile(header, values, stored)

    def _summary(
        self,
        version: int,
        values: Mapping[str, Any],
        tensors: list[_Tensor],
        data: int,
        digest: bytes,
    ) -> GgufHeader:
        architecture = values.get("general.architecture")
        # llama.cpp reads it up to a zero byte, and with it the names of what is checked here.
        if not isinstance(architecture, str) or not architecture or "\0" in architecture:
            self._refuse("does not name an architecture (general.architecture)")
        kind = values.get("general.type", "model")
        if kind != "model":
            self._refuse(f"holds {kind!r} and not a model (general.type)")
        parts = values.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            self._refuse(f"is one of {parts} parts of a model; join them to one file first")

        self._check_figures(architecture, values)

        def number(key: str) -> int | None:
            value = values.get(f"{architecture}.{key}")
            if isinstance(value, tuple):  # one per layer
                value = max(value, default=None)
            return value if isinstance(value, int) and 0 < value < 2**31 else None

        heads, width = number("attention.head_count"), number("embedding_length")
        head_length = width // heads if width and heads else None
        words = values.get("tokenizer.ggml.tokens")
        label = FILE_TYPES.get(_file_type(values))
        if label is None:
            sizes: Counter[int] = Counter()
            for tensor in tensors:
                sizes[tensor.kind] += tensor.elements
            label = TENSOR_TYPES[sizes.most_common(1)[0][0]][0]
        return GgufHeader(
            path=self._path,
            version=version,
            architecture=architecture,
            name=_text_or_none(values.get("general.name")),
            context_length=number("context_length"),
            block_count=number("block_count"),
            vocab_size=words.count if isinstance(words, Skipped) else number("vocab_size"),
            heads=heads,
            kv_heads=number("attention.head_count_kv") or heads,
            key_length=number("attention.key_length") or head_length,
            value_length=number("attention.value_length") or head_length,
            parameters=sum(tensor.elements for tensor in tensors),
            tensors=len(tensors),
            quantization=label,
            size_bytes=self._size,
            header_bytes=data,
            tokenizer=_text_or_none(values.get("tokenizer.ggml.model")),
            has_chat_template="tokenizer.chat_template" in values,
            digest=digest,
        )

    def _check_figures(self, architecture: str, values: Mapping[str, Any]) -> None:
        """What llama.cpp does not refuse but asserts, which would end the engine."""
        layers, at_most = values.get(f"{architecture}.block_count", 1), self._limits.layers
        if not isinstance(layers, int) or not 1 <= layers <= at_most:
            self._refuse(
                f"says that it has {layers!r} layers; 1 to {at_most} can be loaded",
                {"limit": at_most},
            )
        for key in _EPSILONS:
            value = values.get(f"{architecture}.attention.{key}", 0.0)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                self._refuse(f"has an epsilon of {value!r} ({key})")

    # ------------------------------------------------------------------------------- the parts

    def _preamble(self) -> tuple[int, int, int]:
        if self._size == 0:
            self._refuse("is empty")
        magic = os.pread(self._fd, 4, 0)
        if magic != _MAGIC[: len(magic)]:
            self._refuse("is not a GGUF file")
        self._take(4)
        version = self._u32()
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                self._refuse("is a GGUF file of big-endian numbers, which cannot be used here")
            self._refuse(
                f"is a GGUF file of version {version}; versions 2 and 3 can be read",
                {"version": version},
            )
        tensors, entries = self._u64(), self._u64()
        self._bound(tensors, self._limits.tensors, "tensors")
        self._bound(entries, self._limits.metadata_entries, "metadata entries")
        if not tensors:
            self._refuse("has no tensors")
        return version, tensors, entries

    def _value(self, key: str) -> Any:
        """A number, a short text, a short array of numbers, or `Skipped`."""
        kind = self._u32()
        if kind == ARRAY:
            return self._array(key)
        if kind == STRING:
            length = self._length(self._limits.string_bytes, f"the value of {key!r}")
            if length > _KEPT_STRING_BYTES:
                self._skip(length)
                return Skipped(1)
            return self._take(length).decode("utf-8", "replace")
        return self._scalar(kind, key)

    def _scalar(self, kind: int, key: str) -> int | float | bool:
        code = SCALARS.get(kind)
        if code is None:
            self._refuse(f"has a value of unknown type {kind} ({key})", {"type": kind})
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        if kind == BOOL:
            if value > 1:
                self._refuse(f"has a truth value of {value} ({key})")
            return bool(value)
        assert isinstance(value, int | float)
        return value

    def _array(self, key: str) -> Any:
        kind, count = self._u32(), self._u64()
        self._bound(count, self._limits.array_elements, f"elements of {key!r}")
        if kind == STRING:
            self._skip_strings(count, key)
            return Skipped(count)
        code = SCALARS.get(kind)
        if code is None:  # ggml reads no arrays of arrays either
            self._refuse(f"has an array of unusable type {kind} ({key})", {"type": kind})
        size = count * struct.calcsize("<" + code)
        if self._kept + count <= _KEPT_ELEMENTS:
            self._kept += count
            return struct.unpack(f"<{count}{code}", self._take(size))
        self._skip(size)
        return Skipped(count)

    def _skip_strings(self, count: int, key: str) -> None:
        """Walk over strings: the hot loop, over 100,000 in most files."""
        self._strings += count
        self._bound(self._strings, self._limits.strings, "strings in arrays")
        if count * 8 > self._size - self._position():
            self._truncated(self._position() + count * 8)
        longest, unpack = self._limits.string_bytes, _U64.unpack_from
        window, at, end = self._window, self._at, len(self._window)
        for _ in range(count):
            if at + 8 > end:
                self._at = at
                self._fill(8)
                window, at, end = self._window, self._at, len(self._window)
            (length,) = unpack(window, at)
            at += 8 + length
            if at > end:
                self._at = at - length
                self._bound(length, longest, f"bytes of an element of {key!r}")
                self._skip(length)
                window, at, end = self._window, self._at, len(self._window)
        self._at = at

    def _alignment(self, values: Mapping[str, Any]) -> int:
        alignment = values.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= self._limits.alignment
            or alignment & (alignment - 1)
        ):
            self._refuse(f"has an alignment of {alignment!r}", {"alignment": repr(alignment)})
        return alignment

    def _tensor(self, alignment: int) -> _Tensor:
        name = self._text(self._limits.tensor_name_bytes, "a tensor name")
        dimensions = self._u32()
        self._bound(dimensions, self._limits.dimensions, f"dimensions of tensor {name!r}")
        shape = [self._u64() for _ in range(dimensions)]
        elements = 1
        for length in shape:
            elements *= length
            if not length or elements > self._limits.elements:
                self._refuse(f"has tensor {name!r} of impossible shape {shape}", {"shape": shape})
        kind = self._u32()
        if kind not in TENSOR_TYPES:
            self._refuse(f"has tensor {name!r} of unknown type {kind}", {"type": kind})
        label, block, block_bytes = TENSOR_TYPES[kind]
        if (shape[0] if shape else 1) % block:
            self._refuse(f"has tensor {name!r} of {label} with rows of {shape[0]}, not {block}s")
        self._check_kind(name, label, dimensions)
        offset = self._u64()
        if offset % alignment:
            self._refuse(f"has tensor {name!r} at {offset}, which is not aligned to {alignment}")
        return _Tensor(name, kind, tuple(shape), elements, offset, elements // block * block_bytes)

    def _check_kind(self, name: str, label: str, dimensions: int) -> None:
        """What llama.cpp would compute with until it asserts, which would end the engine.

        Its converter and its quantiser leave vectors and norms in F32, and its operations on them
        rely on it; measured with version 0.3.36 for every type in every place of a llama model.
        """
        details = {"tensor": name, "type": label}
        if label in _NO_WEIGHTS:
            self._refuse(f"has tensor {name!r} of {label}, which is no type of weights", details)
        vector = dimensions <= 1 or name.endswith(_VECTORS) or name.startswith("rope_")
        if vector and label != "F32":
            self._refuse(f"has tensor {name!r} of {label}, where only F32 can be used", details)

    def _check_data(self, tensors: list[_Tensor], data: int) -> None:
        """Every tensor lies in the file, and none in another."""
        names: set[str] = set()
        for tensor in tensors:
            if tensor.name in names:
                self._refuse(f"has the tensor {tensor.name!r} twice")
            names.add(tensor.name)
        free = 0
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if tensor.offset < free:
                self._refuse(f"has tensor {tensor.name!r} overlapping another")
            free = tensor.offset + tensor.size
        if data + free > self._size:
            self._truncated(data + free)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _file_type(values: Mapping[str, Any]) -> int:
    value = values.get("general.file_type", -1)
    guessed = 1024  # a flag of llama.cpp's
    return value & ~guessed if isinstance(value, int) and value >= 0 else -1

"""Reads and checks the header of a safetensors file, before anything else touches the file.

The format is 8 bytes of length, that many bytes of JSON, then the data (documented in the README of
the safetensors project). The JSON is bounded before it is parsed, every tensor must lie in the
file, none in another, and its bytes must be what its shape and type come to.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.files import open_regular, sample
from pagedd_daemon.models.stored import StoredTensor

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class SafetensorsLimits:
    """What a header may hold at most."""

    header_bytes: int = 8 * 2**20
    """Bytes of JSON: about 80,000 tensors. The format's own limit is 100 MB; parsed, it would take
    ten times as much memory, in the front too, which lists models."""
    tensors: int = 65_536
    """Tensors of one file. Models have 200 to 3,000."""
    name_bytes: int = 512
    """Bytes of a tensor's name."""
    dimensions: int = 8
    elements: int = 2**48
    """Elements of one tensor, so that no product of sizes comes near 64 bits."""


_ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Whole bytes per element. Types of less than a byte are refused where they occur."""


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What a safetensors file holds."""

    path: Path
    size_bytes: int
    tensors: Mapping[str, StoredTensor]
    digest: bytes
    """32 bytes: SHA-256 over the header, the file size (uint64) and evenly spaced samples."""


def read_safetensors(path: Path, limits: SafetensorsLimits | None = None) -> SafetensorsFile:
    """Check a safetensors file's header and say what is in it.

    Raises:
        ModelFileError: It cannot be read, is no safetensors file, or is damaged.
    """
    fd = open_regular(path)
    try:
        return _Header(path, fd, limits or SafetensorsLimits()).read()
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


class _Header:
    def __init__(self, path: Path, fd: int, limits: SafetensorsLimits) -> None:
        self._path = path
        self._fd = fd
        self._limits = limits
        self._size = os.fstat(fd).st_size

    def read(self) -> SafetensorsFile:
        raw = self._raw()
        start = _LENGTH.size + len(raw)
        tensors = {}
        for name, entry in self._entries(raw).items():
            if name != "__metadata__":
                tensors[name] = self._tensor(name, entry, start)
        if not tensors:
            self._refuse("has no tensors")
        self._check_places(tensors, start)
        digest = hashlib.sha256(raw)
        sample(digest, self._fd, self._size)
        return SafetensorsFile(self._path, self._size, tensors, digest.digest())

    def _raw(self) -> bytes:
        """The JSON, bounded."""
        if self._size == 0:
            self._refuse("is empty")
        if self._size < _LENGTH.size + 2:
            self._truncated(_LENGTH.size + 2)
        (length,) = _LENGTH.unpack(os.pread(self._fd, _LENGTH.size, 0))
        if length > self._limits.header_bytes:
            self._refuse(
                f"claims a header of {length} bytes; {self._limits.header_bytes} is the limit, so "
                "it may be no safetensors file",
                {"limit": self._limits.header_bytes},
            )
        if _LENGTH.size + length > self._size:
            self._truncated(_LENGTH.size + length)
        raw = b""
        while len(raw) < length:
            part = os.pread(self._fd, length - len(raw), _LENGTH.size + len(raw))
            if not part:
                self._truncated(_LENGTH.size + length)
            raw += part
        return raw

    def _entries(self, raw: bytes) -> dict[str, Any]:
        if raw[:1] != b"{":
            self._refuse("is not a safetensors file: its header does not begin with a brace")
        try:
            entries = json.loads(raw.decode("utf-8"), object_pairs_hook=self._without_twins)
        except (ValueError, RecursionError) as error:
            self._refuse(f"has a header that is no JSON: {str(error)[:200]}")
        if len(entries) > self._limits.tensors:
            self._refuse(
                f"has {len(entries)} tensors; {self._limits.tensors} is the limit",
                {"limit": self._limits.tensors},
            )
        return dict(entries)

    def _without_twins(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            ((twin, _),) = counts.most_common(1)
            self._refuse(f"has {twin[:100]!r} twice in its header", {"tensor": twin[:100]})
        return unique

    def _tensor(self, name: str, entry: Any, start: int) -> StoredTensor:
        if len(name.encode("utf-8", "surrogatepass")) > self._limits.name_bytes:
            self._refuse(f"has a tensor with a name of more than {self._limits.name_bytes} bytes")
        if not isinstance(entry, dict):
            self._refuse(f"does not describe tensor {name!r}", {"tensor": name})
        kind, shape, place = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
        if not isinstance(kind, str) or kind not in _ITEM_BYTES:
            self._refuse(
                f"has tensor {name!r} of unknown type {str(kind)[:40]!r}", {"tensor": name}
            )
        if (
            not isinstance(shape, list)
            or len(shape) > self._limits.dimensions
            or not all(type(n) is int and 0 <= n <= self._limits.elements for n in shape)
        ):
            self._refuse(f"has tensor {name!r} of impossible shape", {"tensor": name})
        elements = 1
        for length in shape:
            elements *= length
            if elements > self._limits.elements:
                self._refuse(f"has tensor {name!r} of impossible shape {shape}", {"tensor": name})
        if (
            not isinstance(place, list)
            or len(place) != 2
            or not all(type(n) is int and n >= 0 for n in place)
            or place[1] - place[0] != elements * _ITEM_BYTES[kind]
        ):
            self._refuse(
                f"has tensor {name!r} of {kind} {shape} at {str(place)[:60]}, which is not the "
                f"{elements * _ITEM_BYTES[kind]} bytes it comes to",
                {"tensor": name},
            )
        begin, end = place
        return StoredTensor(name, self._path, start + begin, end - begin, kind, tuple(shape))

    def _check_places(self, tensors: Mapping[str, StoredTensor], start: int) -> None:
        """Every tensor lies in the file, and none in another."""
        free = start
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.size)):
            if tensor.offset < free:
                self._refuse(
                    f"has tensor {tensor.name!r} overlapping another", {"tensor": tensor.name}
                )
            free = tensor.offset + tensor.size
        if free > self._size:
            self._truncated(free)

    def _truncated(self, needed: int) -> NoReturn:
        self._refuse(
            f"is truncated: it has {self._size} bytes and needs at least {needed}",
            {"size_bytes": self._size, "needed_bytes": needed},
        )

    def _refuse(self, reason: str, details: Mapping[str, Any] | None = None) -> NoReturn:
        raise ModelFileError(self._path, reason, details)

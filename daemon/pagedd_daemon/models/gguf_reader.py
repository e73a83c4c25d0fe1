"""Bounded reads of a GGUF header: never past the file, never past a limit, never large at once."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pagedd_daemon.models.errors import ModelFileError
from pagedd_daemon.models.files import sample

_WINDOW_BYTES = 2**20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """What a header may hold at most: several times what the largest known models need."""

    header_bytes: int = 128 * 2**20
    """Bytes before the tensor data. A vocabulary of 262,144 with merges takes 20 MB."""
    metadata_entries: int = 4096
    """Key and value pairs. Models have 20 to 60."""
    key_bytes: int = 1024
    """Bytes of one key. The format allows 65,535; the longest in use has 60."""
    string_bytes: int = 64 * 2**20
    """Bytes of one string: some files carry a whole ``tokenizer.json``."""
    array_elements: int = 2**26
    """Elements of one array. Skipping numbers takes no time, whatever their count."""
    strings: int = 2**21
    """Strings in all arrays together, for these are walked one by one (about 0.1 s per million)."""
    tensors: int = 65_536
    """Tensors. Models have 200 to 3,000."""
    tensor_name_bytes: int = 63
    """Bytes of one tensor name: ggml keeps 64 with the final zero."""
    dimensions: int = 4
    """Dimensions of one tensor: ggml has no more."""
    elements: int = 2**48
    """Elements of one tensor, so that no product of sizes comes near 64 bits."""
    layers: int = 512
    """Layers; llama.cpp has room for as many, and ends the process that loads more."""
    alignment: int = 65_536
    """Alignment of the tensor data; 32 is usual."""


class BoundedReader:
    """Passes over a header, in a window that is never larger than it must be."""

    def __init__(self, path: Path, fd: int, size: int, limits: HeaderLimits) -> None:
        self._path = path
        self._fd = fd
        self._size = size
        self._limits = limits
        self._hash = hashlib.sha256()
        self._window = b""
        self._at = 0  # in the window
        self._base = 0  # of the window in the file

    def _position(self) -> int:
        return self._base + self._at

    def _fill(self, count: int) -> None:
        """Have at least ``count`` bytes before the end of the window."""
        start = self._position()
        if start + count > self._size:
            self._truncated(start + count)
        self._bound_header(start + count)
        self._hash.update(self._window[: self._at])
        kept = self._window[self._at :]
        parts, have = [kept], len(kept)
        while have < count:
            part = os.pread(self._fd, max(count - have, _WINDOW_BYTES), start + have)
            if not part:
                self._truncated(start + count)
            parts.append(part)
            have += len(part)
        self._window, self._at, self._base = b"".join(parts), 0, start

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._window):
            self._fill(count)
        taken = self._window[self._at : self._at + count]
        self._at += count
        return taken

    def _skip(self, count: int) -> None:
        if self._position() + count > self._size:
            self._truncated(self._position() + count)
        while count:
            step = min(count, max(len(self._window) - self._at, 0) or _WINDOW_BYTES)
            self._take(step)
            count -= step

    def _u32(self) -> int:
        (value,) = _U32.unpack(self._take(4))
        return int(value)

    def _u64(self) -> int:
        (value,) = _U64.unpack(self._take(8))
        return int(value)

    def _length(self, limit: int, what: str) -> int:
        length = self._u64()
        self._bound(length, limit, f"bytes of {what}")
        if length > self._size - self._position():
            self._truncated(self._position() + length)
        return length

    def _text(self, limit: int, what: str) -> str:
        raw = self._take(self._length(limit, what))
        if b"\0" in raw:
            # llama.cpp reads up to it, and would find what was looked for here in vain.
            self._refuse(f"has {what} with a zero byte", {"bytes": raw[:64].hex()})
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"has {what} that is not UTF-8", {"bytes": raw[:64].hex()})

    def _bound(self, value: int, limit: int, what: str) -> None:
        if value > limit:
            self._refuse(f"claims {value} {what}; {limit} is the limit", {"limit": limit})

    def _bound_header(self, end: int) -> None:
        limit = self._limits.header_bytes
        if end > limit:
            self._refuse(f"has a header of more than {limit} bytes", {"limit": limit})

    def _truncated(self, needed: int) -> NoReturn:
        self._refuse(
            f"is truncated: it has {self._size} bytes and needs at least {needed}",
            {"size_bytes": self._size, "needed_bytes": needed},
        )

    def _refuse(self, reason: str, details: Mapping[str, Any] | None = None) -> NoReturn:
        raise ModelFileError(self._path, reason, details)

    def _digest(self, end: int) -> bytes:
        digest = self._hash
        digest.update(self._window[: end - self._base])
        sample(digest, self._fd, self._size)
        return digest.digest()

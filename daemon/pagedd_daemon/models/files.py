"""Opening files that may be anything, and naming large ones by a sample of their bytes."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any, Protocol

from pagedd_daemon.models.errors import ModelFileError

SAMPLES = 64
SAMPLE_BYTES = 65_536
_U64 = struct.Struct("<Q")


class Hash(Protocol):
    """What `sample` needs of a hash of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes in."""
        ...


def sample(digest: Hash, fd: int, size: int) -> None:
    """Take a file's size (uint64) and `SAMPLES` evenly spaced pieces of `SAMPLE_BYTES` into a hash.

    Takes milliseconds for a file of any size.
    """
    digest.update(_U64.pack(size))
    last = max(size - SAMPLE_BYTES, 0)
    for index in range(SAMPLES):
        digest.update(os.pread(fd, SAMPLE_BYTES, last * index // (SAMPLES - 1)))


def open_regular(path: Path) -> int:
    """A descriptor of a regular file; symbolic links are followed.

    Raises:
        ModelFileError: It does not exist, cannot be opened, or is something else.
    """
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            raise ModelFileError(path, f"is {_kind_name(kind)}, not a file")
        # Not blocking, and looked at again, in case it was just replaced by a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        if path.is_symlink():
            reason = f"is a symbolic link to {os.readlink(path)}, which does not exist"
        else:
            reason = "does not exist"
        raise ModelFileError(path, reason) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelFileError(path, f"cannot be opened: {reason}") from error
    kind = os.fstat(fd).st_mode
    if not stat.S_ISREG(kind):
        os.close(fd)
        raise ModelFileError(path, f"is {_kind_name(kind)}, not a file")
    return fd


def read_bounded(path: Path, limit: int) -> bytes:
    """A small file whole.

    Raises:
        ModelFileError: It cannot be read, or has more than ``limit`` bytes.
    """
    fd = open_regular(path)
    try:
        with os.fdopen(fd, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise ModelFileError(path, f"has more than {limit} bytes", {"limit": limit})
    return data


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A small file that holds a JSON map.

    Raises:
        ModelFileError: It cannot be read, is too large, or holds something else.
    """
    try:
        value = json.loads(read_bounded(path, limit).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"is no JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "is no JSON map")
    return value


def _kind_name(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return "no regular file"

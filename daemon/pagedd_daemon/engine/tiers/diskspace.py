"""Room on a disk: preallocated, so that no write meets a full disk later.

Swap space has no name (``O_TMPFILE``): nobody can open it, and it is gone with the process, however
that ends. Where there is less room than was asked for, there is a smaller tier or none, and a
sentence that says so.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LEAST_BYTES = 1 << 20
LEFT_FREE = 0.05
"""Share of a file system that is left to others, whatever was asked for."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Space:
    """An open file of so many bytes; -1 and 0 where there is none."""

    descriptor: int
    bytes: int
    notice: str = ""
    """What people must know: that it is smaller than asked for, or not there, and why."""


def swap_space(
    folder: Path,
    budget_bytes: int,
    allocate: Callable[[int, int, int], None] = os.posix_fallocate,
) -> Space:
    """An unnamed file of up to ``budget_bytes`` in ``folder``, which is made if it is missing.

    Args:
        folder: Where.
        budget_bytes: Most; less where the disk has less.
        allocate: `os.posix_fallocate`.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = _unnamed(folder)
    except OSError as error:
        return Space(-1, 0, f"there is no disk tier: {folder}: {error.strerror or error}")
    return reserve(descriptor, folder, budget_bytes, allocate)


def reserve(
    descriptor: int,
    folder: Path,
    budget_bytes: int,
    allocate: Callable[[int, int, int], None] = os.posix_fallocate,
) -> Space:
    """Allocate an open file's bytes, all or as many as there are; closed if there are none."""
    there = os.fstatvfs(descriptor)
    have = os.fstat(descriptor).st_blocks * 512
    left = int(there.f_blocks * there.f_frsize * LEFT_FREE)
    size = min(budget_bytes, have + max(0, there.f_bavail * there.f_frsize - left))
    why = f"{folder} has no more room"
    while size >= LEAST_BYTES:
        refusal = _try(allocate, descriptor, size)
        if refusal is None:
            wanted = f"{size / 1e9:.1f} GB and not {budget_bytes / 1e9:.1f}"
            notice = f"the disk tier has {wanted}: {why}" if size < budget_bytes else ""
            return Space(descriptor, size, notice)
        why = f"{folder}: {refusal.strerror or refusal}"
        size = size // 2 if refusal.errno in _FULL else 0
    os.close(descriptor)
    return Space(-1, 0, f"there is no disk tier: {why}")


def _try(allocate: Callable[[int, int, int], None], descriptor: int, size: int) -> OSError | None:
    try:
        allocate(descriptor, 0, size)
    except OSError as error:
        return error
    return None


def _unnamed(folder: Path) -> int:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    # A file system without unnamed files: one that loses its name at once.
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".swap-")
    os.unlink(name)
    return descriptor

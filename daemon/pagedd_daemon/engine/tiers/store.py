"""The prefix store: a disk tier that outlives the daemon, for those who ask for it.

One private file per user and folder, bound to one model, KV type and layout: loading another makes
it anew. Page names are chains from a key (`KEY_NAME`, made by the front, 0600), so the file's table
tells nothing of any prompt. The pages themselves do, to whoever can read the file: that is
why nobody has a store who has not asked for it.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagedd_daemon.engine.tiers.diskspace import Space, reserve
from pagedd_daemon.engine.tiers.records import (
    COMMITTED,
    HEADER_BYTES,
    RECORD_BYTES,
    TABLE_OFFSET,
    read_header,
    read_record,
)
from pagedd_daemon.private_files import (
    ERAS_NAME,
    KEY_NAME,
    STORE_NAME,
    open_private,
    private_folder,
)


def store_space(folder: Path, budget_bytes: int) -> Space:
    """The store's file, of up to ``budget_bytes``, locked for this process."""
    path = folder / STORE_NAME
    try:
        private_folder(folder)
        descriptor = open_private(path)
    except OSError as error:
        return Space(-1, 0, f"there is no disk tier: {error}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return Space(-1, 0, f"there is no disk tier: another daemon uses {path}")
    if os.fstat(descriptor).st_size > budget_bytes:
        os.ftruncate(descriptor, budget_bytes)
    return reserve(descriptor, folder, budget_bytes)


@dataclass(frozen=True, slots=True)
class Summary:
    """What is in a store."""

    path: str
    bytes: int
    """Of the file."""
    pages: int
    tokens: int
    page_bytes: int
    """Of the pages in it, each byte string once."""
    binding: str
    """What it is bound to: the beginning of a digest of model, KV type and layout; empty for a
    file that is no store."""
    in_use: bool
    """Whether a daemon has it open."""


def show(folder: Path) -> Summary | None:
    """What the store in ``folder`` holds; None if there is none.

    Raises:
        OSError: It cannot be read, or is not private.
    """
    path = folder / STORE_NAME
    try:
        descriptor = open_private(path, create=False)
    except FileNotFoundError:
        return None
    try:
        in_use = not _lock(descriptor)
        size = os.fstat(descriptor).st_size
        shape = read_header(os.pread(descriptor, HEADER_BYTES, 0), size)
        pages = tokens = 0
        pieces: set[tuple[int, int]] = set()
        for slot in range(shape.slots if shape is not None else 0):
            raw = os.pread(descriptor, RECORD_BYTES, TABLE_OFFSET + slot * RECORD_BYTES)
            if len(raw) < RECORD_BYTES or raw[4] != COMMITTED or shape is None:
                continue
            record = read_record(shape, slot, raw)
            if record is not None:
                pages += 1
                tokens += record.tokens
                pieces.add((record.offset, record.length))
        held = sum(length for _, length in pieces)
        binding = shape.binding.hex()[:16] if shape is not None else ""
        return Summary(str(path), size, pages, tokens, held, binding, in_use)
    finally:
        os.close(descriptor)


def clear(folder: Path) -> int:
    """Remove the store in ``folder`` and its key, without which nothing in a copy can be named.

    Returns:
        Bytes that are free again.

    Raises:
        BlockingIOError: A daemon uses it.
        OSError: It cannot be removed.
    """
    path, size = folder / STORE_NAME, 0
    with suppress(FileNotFoundError):
        descriptor = open_private(path, create=False)
        try:
            if not _lock(descriptor):
                raise BlockingIOError(f"a daemon uses {path}")
            size = os.fstat(descriptor).st_blocks * 512
            path.unlink()
        finally:
            os.close(descriptor)
    for name in (KEY_NAME, ERAS_NAME):
        with suppress(FileNotFoundError):
            (folder / name).unlink()
    return size


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

"""A disk tier in simulated time: the real file format and queue, in memory and without threads."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

from pagedd_daemon.backends.simulated import BLOCK_TOKENS
from pagedd_daemon.engine.tiers.disk import DiskTier
from pagedd_daemon.engine.tiers.diskfile import DiskFile, Io
from pagedd_daemon.engine.tiers.opening import Disk
from pagedd_daemon.engine.tiers.ranges import UNIT
from pagedd_daemon.engine.tiers.records import RECORD_BYTES, TABLE_OFFSET, Shape, bind


@dataclass(slots=True)
class FailingIo(Io):
    """System calls that fail when the dice say so."""

    dice: random.Random
    failing: float = 0.0
    """Share of calls that fail; the tier is not used after the first."""
    corrupt: float = 0.0
    """Share of reads that bring something else than was written."""

    def pread(self, descriptor: int, into: memoryview, offset: int) -> int:
        """See `Io`."""
        self._maybe_fail()
        count = os.preadv(descriptor, [into], offset)
        if count and self.dice.random() < self.corrupt:
            into[0] ^= 1
        return count

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """See `Io`."""
        self._maybe_fail()
        return os.pwrite(descriptor, data, offset)

    def _maybe_fail(self) -> None:
        if self.dice.random() < self.failing:
            raise OSError(5, "Input/output error")


def empty_file(pages: int) -> int:
    """A file for so many pages; its descriptor."""
    descriptor = os.memfd_create("pagedd-sim-disk", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _size(pages))
    return descriptor


def open_disk(
    descriptor: int,
    pages: int,
    digest: bytes,
    io: Io,
    clock: Callable[[], float],
    *,
    persists: bool,
) -> Disk:
    """The tier over `empty_file`, whose descriptor it takes over, for one model.

    Raises:
        OSError: The file cannot be read or written.
    """
    shape = Shape(bind("simulated", digest, BLOCK_TOKENS), pages, _size(pages))
    try:
        file = DiskFile(descriptor, shape, io=io, readers=0, clock=clock)
    except OSError:
        os.close(descriptor)
        raise
    return Disk(DiskTier(file), pages, persists=persists)


def _size(pages: int) -> int:
    table = TABLE_OFFSET + pages * RECORD_BYTES
    return -(-table // UNIT) * UNIT + pages * UNIT

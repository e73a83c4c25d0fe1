"""The pool follows the memory of its device: smaller while other programs want it, then back.

A thread looks once a second, off the step loop, and wakes the loop only where the pool shall have
another size. What size that is, is `Follower`'s, which knows no clock and no device.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable

from pagedd_daemon.backends.base import Capabilities, Elastic
from pagedd_daemon.engine.relief import floor_blocks

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks: programs take memory over seconds, and what is kept free covers the first."""
SPARE_BYTES = 1 << 30
"""Kept free for whoever wants memory next, unless that is more than a sixteenth of the device."""
GROW_AFTER_S = 10.0
"""Memory must have been free for so long before the pool takes it back: programs that start and end
take and give it several times."""


class Follower:
    """Where less than half of what shall be free is free, the pool gives the rest of it back; where
    half as much again has been free for a while, it takes what is more."""

    def __init__(self, caps: Capabilities, total_bytes: int, free_bytes: int) -> None:
        """For a pool that has all its blocks.

        Args:
            caps: The pool.
            total_bytes: Bytes of the device.
            free_bytes: Of these, free now. A pool that leaves less than `SPARE_BYTES` was asked to.
        """
        self.spare = max(1, min(SPARE_BYTES, total_bytes // 16, free_bytes))
        """Bytes that shall be free."""
        self._most = caps.gpu_blocks
        self._floor = floor_blocks(caps)
        self._block_bytes = caps.block_bytes
        self._calm_since = math.inf
        self._seen = caps.gpu_blocks

    def blocks(self, now: float, present: int, there: int, free_bytes: int) -> int:
        """How many blocks the pool shall have.

        Args:
            now: Seconds, monotonic.
            present: Blocks it has, as the pager was told.
            there: Blocks that still take memory: more while the pool is being vacated.
            free_bytes: Bytes of the device that are free.
        """
        if present < self._seen:  # be it that a step found no memory
            self._calm_since = math.inf
        self._seen = present
        free = free_bytes + (there - present) * self._block_bytes
        if free < self.spare // 2:
            self._calm_since = math.inf
            fewer = present - -(-(self.spare - free) // self._block_bytes)
            return min(present, max(fewer, self._floor))
        more = (free - self.spare) // self._block_bytes
        if present >= self._most or 2 * free < 3 * self.spare or more < 1:
            self._calm_since = math.inf
            return present
        self._calm_since = min(self._calm_since, now)
        if now - self._calm_since < GROW_AFTER_S:
            return present
        return min(present + more, self._most)


class Watch:
    """Looks at the device's memory, and says when the pool shall have another size.

    `fileno` is readable then, for a poll; `wanted` is the size.
    """

    def __init__(
        self,
        caps: Capabilities,
        elastic: Elastic,
        present: Callable[[], int],
        *,
        look_s: float = LOOK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to look.

        Args:
            caps: The pool, which has all its blocks now.
            elastic: Its device.
            present: Blocks it has; asked from the thread.
            look_s: Seconds between two looks.
            clock: Seconds, monotonic.
        """
        self._elastic = elastic
        self._present = present
        self._look_s = look_s
        self._clock = clock
        self._follower = Follower(caps, elastic.total_bytes, elastic.free_bytes())
        self._wanted: int | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._thread = threading.Thread(target=self._run, name="vram", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable when `wanted` has something to say."""
        return self._read

    def wanted(self) -> int | None:
        """The size the pool shall have, once for each that was found; None: as it is."""
        with self._lock:
            wanted, self._wanted = self._wanted, None
            if wanted is not None:
                os.read(self._read, 1)
        return wanted

    def close(self) -> None:
        """Look no more."""
        self._end.set()
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        while not self._end.wait(self._look_s):
            try:
                free, there = self._elastic.free_bytes(), self._elastic.there
            except RuntimeError:  # the device is in trouble, as the next step will say
                log.warning("the pool keeps its size from now on", exc_info=True)
                return
            present = self._present()
            wanted = self._follower.blocks(self._clock(), present, there, free)
            if wanted != present:
                self._tell(wanted)

    def _tell(self, blocks: int) -> None:
        with self._lock:
            if self._wanted is None:
                os.write(self._write, b"\0")
            self._wanted = blocks

"""The RAM tier's memory: pages, and a table of them that the next engine can read.

The contract, for backends and for whoever replaces an engine:

* `RamStore` maps the memory file that the front made (`pagedd_daemon.memory_file`). Where it was
  made for the same model, KV type and layout (`binding`) and as many slots, what an earlier engine
  committed is in `RamStore.found`; otherwise the table is made anew and ``found`` is empty.
* A backend calls `clear` for slots before it changes a byte of what their records point to, writes,
  and calls `commit` for a slot once the copy has ended: on CUDA, once its event has. An engine that
  is killed at any byte in between leaves a slot that is not committed, never a wrong page.
* Committed pages stay when their slots are merely forgotten: a page is what its name says for as
  long as its bytes are there.
* `pagedd_daemon.engine.pool.Pool` offers what `Backend.adoptable` lists to the pager, as cached
  pages of the RAM tier, before the first request. So a replayed stream finds its full blocks and
  computes its tail. Whoever wants more to be found stores more: any `Store` to the RAM tier of full
  blocks, of live sequences too, is committed when it ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pagedd_daemon.engine.tiers.records import Record, RecordTable, Shape
from pagedd_daemon.memory_file import create_memory

Bytes = npt.NDArray[np.uint8]


class RamStore:
    """Memory for the pages of one engine, and the records of them. Not thread-safe."""

    def __init__(self, descriptor: int, budget_bytes: int, binding: bytes, slots: int) -> None:
        """Map the memory file ``descriptor``, or a new one where it is -1.

        Args:
            descriptor: An inherited descriptor; it is not closed, and not inherited any further.
            budget_bytes: Of the tier; the file is made for it.
            binding: 32 bytes over all that the bytes of a page depend on.
            slots: Pages at most.

        Raises:
            OSError: There is no memory.
            TierFormatError: The file is too small for so many records.
        """
        own = descriptor < 0
        if own:
            descriptor = create_memory(budget_bytes)
        try:
            os.set_inheritable(descriptor, False)
            size = os.fstat(descriptor).st_size
            self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        finally:
            if own:
                os.close(descriptor)
        self._map.madvise(mmap.MADV_DONTDUMP)  # prompts can be read from keys and values
        shape = Shape(binding, slots, size)
        self._table = RecordTable(self._map, shape)
        self._data_offset = shape.data_offset
        self.data: Bytes = np.frombuffer(self._map, np.uint8, offset=shape.data_offset)
        """The pages, uint8, shape ``(data bytes,)``; offsets of records count from its start."""
        self.found: list[Record] = self._table.committed()
        """What an earlier engine left, oldest first."""

    @property
    def size(self) -> int:
        """Bytes of data there is room for."""
        return len(self.data)

    def part(self, offset: int, length: int) -> Bytes:
        """Bytes of the data, a view."""
        return self.data[offset : offset + length]

    def clear(self, slots: Iterable[int]) -> None:
        """What these slots hold is about to change, or is not to be trusted."""
        self._table.clear(slots)

    def commit(self, record: Record) -> None:
        """The page of ``record`` is there, all of it."""
        self._table.commit(record)

    def committed(self) -> list[Record]:
        """What the next engine would find, oldest first."""
        return self._table.committed()

    def forget(self, offset: int, length: int) -> None:
        """Give the memory of a range back to the system; both are multiples of 4096."""
        self._map.madvise(mmap.MADV_REMOVE, self._data_offset + offset, length)

    def close(self) -> None:
        """Unmap it, as soon as nobody holds a view of it any more. Idempotent."""
        self.data = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # the mapping ends with the last view of it
            self._map.close()

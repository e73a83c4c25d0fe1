"""The RAM tier: slabs of memory the device can copy from and to by itself.

Page-locking runs at 2 GB/s, most of it spent on the first touch of each page, so it happens in the
background, a few slabs ahead of what is used. A slab that is needed before it is locked serves as
ordinary memory, at a lower rate. Memory is taken as pages are stored and not before: the budget is
a bound and no reservation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kvpager.types import PageName
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.ranges import UNIT, round_up
from pagedd_daemon.engine.tiers.records import Record

log = logging.getLogger(__name__)

SLAB_BYTES = 64 << 20
"""Of one slab, about: locking one takes some 30 ms."""
AHEAD = 16
"""Slabs that are locked beyond those in use: what a pool that must shrink at once has to send away,
about. At most an eighth of the tier."""


class RamTier:
    """Memory for ``slots`` pages of ``page_values`` elements."""

    def __init__(
        self, store: RamStore, slots: int, page_values: int, dtype: torch.dtype, *, lock: bool
    ) -> None:
        """A tier in the memory of ``store``, with what an earlier engine left there.

        Args:
            store: Whose data the pages are; closed with the tier.
            slots: Pages at most.
            page_values: Elements of a page.
            dtype: Of the elements.
            lock: Page-lock the memory for CUDA, in the background.
        """
        self._store = store
        self._slots = slots
        self.page_bytes = page_values * dtype.itemsize
        self.slab_pages = max(1, SLAB_BYTES // self.page_bytes)
        """Pages per slab."""
        # Slabs begin at pages of the system: two of them must not share one to be locked.
        self._stride = round_up(self.slab_pages * self.page_bytes)
        self._slabs = [
            self._slab(number, page_values, dtype) for number in range(-(-slots // self.slab_pages))
        ]
        self._addresses = [slab.data_ptr() for slab in self._slabs]
        self._ahead = max(1, min(AHEAD, slots // self.slab_pages // 8))
        self._wanted = 0
        self._wake = threading.Event()
        self._closing = False
        self._used: set[int] = set()
        self._names: dict[int, PageName] = {}
        for record in store.found:
            if (record.offset, record.length) == (self._offset(record.slot), self.page_bytes):
                self._names[record.slot] = record.name
                self._used.add(record.slot)
        self._locked = 0
        self._thread: threading.Thread | None = None
        if lock and slots:
            self._thread = threading.Thread(target=self._work, name="page-lock", daemon=True)
            self._thread.start()
            last = max(self._used, default=0)
            self._want(last // self.slab_pages + 1 + self._ahead)

    def _slab(self, number: int, page_values: int, dtype: torch.dtype) -> Tensor:
        pages = min(self.slab_pages, self._slots - number * self.slab_pages)
        start = number * self._stride
        data = torch.from_numpy(self._store.data[start : start + pages * self.page_bytes])
        return data.view(dtype).view(pages, page_values)

    def _offset(self, slot: int) -> int:
        """Of a page in the store's data."""
        number, at = divmod(slot, self.slab_pages)
        return number * self._stride + at * self.page_bytes

    @property
    def bytes(self) -> int:
        """Bytes of the slots that were ever stored to."""
        return len(self._used) * self.page_bytes

    @property
    def locked_slabs(self) -> int:
        """Slabs that are page-locked."""
        return self._locked

    def stored(self, slots: Iterable[int]) -> None:
        """These slots are about to be written."""
        changed = tuple(slots)
        self._used.update(changed)
        self._store.clear(changed)

    def commit(self, slot: int, name: PageName, tokens: int) -> None:
        """The slot has been written, and whoever comes next may find its page."""
        self._store.commit(Record(slot, name, tokens, self._offset(slot), self.page_bytes))

    def found(self) -> tuple[tuple[int, PageName], ...]:
        """What an earlier engine left, oldest first."""
        return tuple(self._names.items())

    def pages(self, slot: int, count: int) -> Tensor:
        """``count`` slots of one slab, ``[count, page_values]``, from ``slot`` on."""
        number, at = self._find(slot, count)
        return self._slabs[number][at : at + count]

    def address(self, slot: int, count: int) -> int:
        """Where `pages` begins."""
        number, at = self._find(slot, count)
        return self._addresses[number] + at * self.page_bytes

    def locked(self, slot: int) -> bool:
        """Whether the slots up to ``slot`` are page-locked."""
        return slot // self.slab_pages < self._locked

    def _find(self, slot: int, count: int) -> tuple[int, int]:
        """The slab of some slots, which is there then, and which of its pages is the first."""
        number, at = divmod(slot, self.slab_pages)
        assert at + count <= self.slab_pages
        assert slot + count <= self._slots
        if number + 1 + self._ahead > self._wanted and self._thread is not None:
            self._want(number + 1 + self._ahead)
        return number, at

    def close(self) -> None:
        """Unlock and give everything back. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            for slab in self._slabs[: self._locked]:
                _runtime().cudaHostUnregister(slab.data_ptr())
            self._locked = 0
        self._slabs.clear()
        self._addresses.clear()
        self._used.clear()
        self._store.close()

    def _want(self, slabs: int) -> None:
        most = -(-self._slots // self.slab_pages)
        if min(slabs, most) > self._wanted:
            self._wanted = min(slabs, most)
            self._wake.set()

    def _work(self) -> None:
        """Lock slabs as they are wanted."""
        while not self._closing:
            if self._locked == self._wanted:
                self._wake.wait()
                self._wake.clear()
                continue
            slab = self._slabs[self._locked]
            # The first touch is most of the time. Reading is enough, and changes nothing that an
            # earlier engine left.
            slab.view(torch.uint8).reshape(-1)[::UNIT].sum()
            status = _runtime().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)
            if int(status) != 0:
                log.warning("RAM cannot be page-locked any further (CUDA error %d)", int(status))
                return
            self._locked += 1


def _runtime() -> Any:
    return torch.cuda.cudart()

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

log = logging.getLogger(__name__)

SLAB_BYTES = 64 << 20
"""Of one slab, about: locking one takes some 30 ms."""
AHEAD = 16
"""Slabs that are locked beyond those in use: what a pool that must shrink at once has to send away,
about. At most an eighth of the tier."""


class RamTier:
    """Memory for ``slots`` pages of ``page_values`` elements."""

    def __init__(self, slots: int, page_values: int, dtype: torch.dtype, *, lock: bool) -> None:
        """An empty tier.

        Args:
            slots: Pages at most.
            page_values: Elements of a page.
            dtype: Of the elements.
            lock: Page-lock the memory for CUDA, in the background.
        """
        self._slots = slots
        self._page_values = page_values
        self._dtype = dtype
        self.page_bytes = page_values * dtype.itemsize
        self.slab_pages = max(1, SLAB_BYTES // self.page_bytes)
        """Pages per slab."""
        self._ahead = max(1, min(AHEAD, slots // self.slab_pages // 8))
        self._slabs: list[Tensor] = []
        self._addresses: list[int] = []
        self._guard = threading.Lock()
        self._wanted = 0
        self._wake = threading.Event()
        self._closing = False
        self._used: set[int] = set()
        self._locked = 0
        self._thread: threading.Thread | None = None
        if lock and slots:
            self._thread = threading.Thread(target=self._work, name="page-lock", daemon=True)
            self._thread.start()
            self._want(self._ahead)

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
        self._used.update(slots)

    def pages(self, slot: int, count: int) -> Tensor:
        """``count`` slots of one slab, ``[count, page_values]``, from ``slot`` on."""
        number, at = self._find(slot, count)
        return self._slabs[number][at : at + count]

    def address(self, slot: int, count: int) -> int:
        """Where `pages` begins."""
        number, at = self._find(slot, count)
        return self._addresses[number] + at * self.page_bytes

    def _find(self, slot: int, count: int) -> tuple[int, int]:
        """The slab of some slots, which is there then, and which of its pages is the first."""
        number, at = divmod(slot, self.slab_pages)
        assert at + count <= self.slab_pages
        assert slot + count <= self._slots
        if number >= len(self._addresses):
            self._have(number + 1)
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

    def _have(self, slabs: int) -> None:
        """Take memory for so many slabs."""
        with self._guard:
            while len(self._slabs) < slabs:
                self._add(self._make(len(self._slabs)))

    def _next_to_lock(self, number: int) -> Tensor:
        """The slab of this number, made here if nobody needed it yet."""
        if number == len(self._slabs):
            slab = self._make(number)
            # The first touch is most of the time, and holds up nobody: nobody knows the slab yet.
            slab.view(torch.uint8).numpy()[:] = 0
            with self._guard:
                if number == len(self._slabs):
                    self._add(slab)
        return self._slabs[number]

    def _add(self, slab: Tensor) -> None:
        self._slabs.append(slab)
        self._addresses.append(slab.data_ptr())

    def _make(self, number: int) -> Tensor:
        rest = self._slots - number * self.slab_pages
        return torch.empty((min(self.slab_pages, rest), self._page_values), dtype=self._dtype)

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
            slab = self._next_to_lock(self._locked)
            status = _runtime().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)
            if int(status) != 0:
                log.warning("RAM cannot be page-locked any further (CUDA error %d)", int(status))
                return
            self._locked += 1


def _runtime() -> Any:
    return torch.cuda.cudart()

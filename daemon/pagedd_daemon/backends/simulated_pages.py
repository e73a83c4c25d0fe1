"""The simulated backend's memory: cells of the pool, RAM, disk, and the copies between them.

Copies happen when they are polled and not when they are asked for, which is the latest a real
device might read or write: a block that is reused too early shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from kvpager.types import (
    Adopt,
    CopyBlock,
    Instruction,
    Load,
    PageName,
    Shrunk,
    Spill,
    Store,
    Tier,
)
from pagedd_daemon.backends.base import Capabilities, TransferResult
from pagedd_daemon.backends.chain import POISON
from pagedd_daemon.backends.simulated_faults import Faults
from pagedd_daemon.engine.tiers.disk import Blob, DiskTier, Moved, filled
from pagedd_daemon.engine.tiers.opening import Disk
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.records import Record, bind


def _of_disk(transfer: Store | Load | Spill) -> bool:
    return isinstance(transfer, Spill) or transfer.tier is Tier.DISK


class SimulatedPages:
    """Pages of all tiers. What each method does for the backend is said in `Backend`."""

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        page_s: float,
        ram_fd: int,
        disk: Disk | None,
        faults: Faults,
    ) -> None:
        """An empty pool; see `SimulatedBackend` for the arguments."""
        self._block_tokens = capabilities.block_tokens
        self._page_s = page_s
        self._faults = faults
        shape = (capabilities.gpu_blocks, capabilities.block_tokens)
        self.cells = np.full(shape, POISON, np.uint64)
        """A hash per token, uint64, shape ``(blocks, block_tokens)``."""
        binding = bind(capabilities.name, capabilities.model_digest, shape[1])
        slots = capabilities.ram_blocks
        budget = slots * capabilities.block_bytes
        self._store = RamStore(ram_fd, budget, binding, slots)
        self._page_bytes = 8 * shape[1]
        pages = self._store.data[: slots * self._page_bytes].view(np.uint64)
        self._ram = pages.reshape(slots, shape[1])
        self._found = tuple((record.slot, record.name) for record in self._store.found)
        self.stored: set[int] = {slot for slot, _ in self._found}
        """Slots of RAM that were ever filled."""
        self.begun = 0
        """Transfers that were asked for."""
        self._pending: deque[tuple[Store | Load | Spill, int, int]] = deque()
        self._disk = disk or Disk()
        self._on_disk: dict[int, Store | Load | Spill] = {}
        self._polls = 0

    def apply(self, instructions: Iterable[Instruction]) -> None:
        """See `Backend`."""
        for instruction in instructions:
            match instruction:
                case CopyBlock(src=src, dst=dst, tokens=tokens):
                    self.cells[dst] = POISON
                    self.cells[dst, :tokens] = self.cells[src, :tokens]
                case Store() | Load() | Spill():
                    ready = self._polls + self._faults.delay_polls
                    self._pending.append((instruction, self.begun, ready))
                    self.begun += 1
                case Shrunk(gpu_blocks=end):
                    # As if the memory were given back: whatever still reads it will show.
                    self.cells[end:] = POISON
                case _:
                    pass

    def poll_transfers(self) -> list[TransferResult]:
        """See `Backend`. Here is where the copies happen."""
        ended: list[TransferResult] = []
        while self._pending and self._pending[0][2] <= self._polls:
            transfer, number, _ = self._pending.popleft()
            ok = number not in self._faults.transfers
            if self._disk.tier is not None and ok and _of_disk(transfer):
                self._ask_disk(self._disk.tier, transfer)
                continue
            self._copy(transfer, ok)
            seconds = self._page_s * len(transfer.pages)
            ended.append(TransferResult(transfer.transfer, ok, seconds))
        if self._disk.tier is not None:
            ended += [self._moved(moved) for moved in self._disk.tier.poll()]
        self._polls += 1
        return ended

    def _ask_disk(self, tier: DiskTier, transfer: Store | Load | Spill) -> None:
        self._on_disk[transfer.transfer] = transfer
        if isinstance(transfer, Load):
            tier.get(transfer.transfer, (page.slot for page in transfer.pages))
            return
        if isinstance(transfer, Store):
            pages = [(self.cells[page.block], page.slot, page.tokens) for page in transfer.pages]
        else:
            pages = [(self._ram[move.source], move.target, move.tokens) for move in transfer.pages]
        blobs = [Blob(cells.view(np.uint8).copy(), {slot: (0, n)}, n) for cells, slot, n in pages]
        tier.put(transfer.transfer, blobs)

    def _moved(self, moved: Moved) -> TransferResult:
        """The disk has done its part."""
        transfer = self._on_disk.pop(moved.transfer)
        if isinstance(transfer, Load):
            assert self._disk.tier is not None
            data = {id(extent): data for extent, data in moved.read}
            for page in transfer.pages:
                self.cells[page.block] = POISON
                if moved.ok:
                    n, cells = page.tokens, data[id(self._disk.tier.at(page.slot))]
                    self.cells[page.block, :n] = cells.view(np.uint64)[:n]
        return TransferResult(moved.transfer, moved.ok, self._page_s * len(transfer.pages))

    def _copy(self, transfer: Store | Load | Spill, ok: bool) -> None:
        if isinstance(transfer, Spill) or transfer.tier is Tier.DISK:
            ok = False  # there is none
        for page in () if isinstance(transfer, Spill) else transfer.pages:
            n = page.tokens
            if isinstance(transfer, Store) and transfer.tier is Tier.DISK:
                continue
            if isinstance(transfer, Store):
                self._store.clear((page.slot,))
                self._ram[page.slot] = POISON
                if ok:
                    self._ram[page.slot, :n] = self.cells[page.block, :n]
                    self.stored.add(page.slot)
            else:
                self.cells[page.block] = POISON
                if ok:
                    self.cells[page.block, :n] = self._ram[page.slot, :n]

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        if _of_disk(transfer):
            for slot, name in zip(filled(transfer), names, strict=True):
                if name is not None and self._disk.tier is not None:
                    self._disk.tier.commit(slot, name)
        elif isinstance(transfer, Store):
            for page, name in zip(transfer.pages, names, strict=True):
                if name is not None:
                    size = self._page_bytes
                    at = page.slot * size
                    self._store.commit(Record(page.slot, name, page.tokens, at, size))

    def adoptable(self) -> list[Adopt]:
        """See `Backend`."""
        found = [Adopt(Tier.RAM, self._found)]
        if self._disk.tier is not None:
            found.append(self._disk.tier.adoptable())
        return found

    def troubles(self) -> list[str]:
        """See `Backend`."""
        return self._disk.troubles()

    def counters(self) -> dict[str, int]:
        """See `Backend`."""
        return self._disk.counters()

    def close(self) -> None:
        """See `Backend`."""
        self._pending.clear()
        self.stored.clear()
        self._ram = np.empty((0, self._block_tokens), np.uint64)
        self._store.close()
        self._disk.close()

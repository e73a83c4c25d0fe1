"""Pages between the pool, RAM and disk: one thread that submits copies, two streams each way.

Submitting a copy costs 6.6 µs of Python, so a swap of a long sequence would hold up the step loop
for milliseconds: a thread of its own submits them. What keeps it free of races:

* A store waits, on its stream, for every step that was launched before it: they may write its
  blocks. The pager hands the blocks to nobody before the store is reported as done.
* A load begins at once: the pager gives out no block that a step in flight may touch. Only a
  copy-on-write or a fresh segment's zeroing that is still queued may, so loads wait for the last of
  these (`Transfers.fence`). The steps that read the blocks come after the report.
* Reports are made by the step loop, from events that have ended.

On the CPU the same pages are copied while `submit` is called. What goes to disk, or comes from it,
goes through host memory: a store is copied first and then written, a load read and then copied.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kvpager.types import Load, Page, Spill, Store, Tier
from pagedd_daemon.backends.base import TransferResult
from pagedd_daemon.backends.paged.arena import PADDING_BLOCKS
from pagedd_daemon.backends.paged.slabs import RamTier
from pagedd_daemon.engine.tiers.disk import Blob, DiskTier, Moved
from pagedd_daemon.engine.tiers.ram import Bytes

log = logging.getLogger(__name__)

Transfer: TypeAlias = "Store | Load"


class Host(Protocol):
    """Memory of the host with places for pages."""

    slab_pages: int
    """Places that follow one another in memory, from each multiple of it on."""
    page_bytes: int

    def pages(self, slot: int, count: int) -> Tensor:
        """``[count, values]``, from place ``slot`` on."""
        ...

    def address(self, slot: int, count: int) -> int:
        """Where `pages` begins."""
        ...


class _Staged:
    """Host memory for the pages of one transfer, in order."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.slab_pages = max(1, len(memory))
        self.page_bytes = memory.shape[1] * memory.element_size()

    def pages(self, slot: int, count: int) -> Tensor:
        return self.memory[slot : slot + count]

    def address(self, slot: int, count: int) -> int:
        return self.memory[slot : slot + count].data_ptr()


@dataclass(frozen=True, slots=True)
class _Job:
    transfer: Transfer
    after: torch.cuda.Event | None
    host: Host
    pages: tuple[Page, ...]
    """As of the transfer, with places of ``host`` for slots."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A transfer whose copies are submitted."""

    transfer: int
    done: torch.cuda.Event | None
    """None: it is over."""
    ok: bool = True


class Transfers:
    """Carries out `Store`, `Load` and `Spill` between the pool, RAM and disk."""

    def __init__(
        self, kv: Tensor, ram: RamTier, device: torch.device, disk: DiskTier | None = None
    ) -> None:
        """Transfers of the pool ``kv``, whose blocks are contiguous.

        Args:
            kv: The arena's tensor.
            ram: Where pages go.
            device: Where the pool is.
            disk: Where they go from there, if anywhere.
        """
        self._disk = disk
        self._staged: dict[int, tuple[Transfer, _Staged | None]] = {}
        """Transfers of the disk, with the host memory that their pages go through."""
        self._blocks = kv.view(kv.shape[0], -1)
        self._ram = ram
        self._device = device
        self._ended: deque[TransferResult] = deque()
        self._flights: deque[_Flight] = deque()
        self._fence: torch.cuda.Event | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            from cuda.bindings import driver

            self._driver: Any = driver
            self._out = (torch.cuda.Stream(device), torch.cuda.Stream(device))
            self._in = (torch.cuda.Stream(device), torch.cuda.Stream(device))
            self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
            self._thread.start()

    def fence(self) -> None:
        """Loads submitted from now on wait for what the current stream has been given so far."""
        if self._thread is not None:
            self._fence = torch.cuda.Event()
            self._fence.record()

    def wait_fence(self) -> None:
        """Until what the last `fence` is about has been done."""
        if self._fence is not None:
            self._fence.synchronize()

    def submit(self, transfer: Transfer | Spill) -> None:
        """Begin a transfer; `poll` tells of its end. Called by the step loop."""
        if isinstance(transfer, Spill):
            self._spill(transfer)
        elif transfer.tier is Tier.RAM:
            if isinstance(transfer, Store):
                self._ram.stored(page.slot for page in transfer.pages)
            self._begin(transfer, self._ram, transfer.pages)
        elif self._disk is None:
            self._ended.append(TransferResult(transfer.transfer, False))
        elif isinstance(transfer, Load):
            self._staged[transfer.transfer] = transfer, None
            self._disk.get(transfer.transfer, (page.slot for page in transfer.pages))
        else:
            shape = len(transfer.pages), self._blocks.shape[1]
            staged = _Staged(torch.empty(shape, dtype=self._blocks.dtype))
            self._staged[transfer.transfer] = transfer, staged
            self._begin(transfer, staged, _in_order(transfer.pages))

    def _begin(self, transfer: Transfer, host: Host, pages: tuple[Page, ...]) -> None:
        """Begin to copy between the pool and the host."""
        if self._thread is None:
            try:
                self._copy(_Job(transfer, None, host, pages))
            except Exception:
                self._failed(transfer)
            else:
                self._flights.append(_Flight(transfer.transfer, None))
            return
        after = self._fence
        if isinstance(transfer, Store):
            after = torch.cuda.Event()
            after.record()
        self._jobs.put(_Job(transfer, after, host, pages))

    def poll(self) -> list[TransferResult]:
        """Transfers that ended since the last call."""
        if self._disk is not None:
            for moved in self._disk.poll():
                self._moved(moved)
        # Two streams, so not only the oldest may have ended.
        for _ in range(len(self._flights)):
            flight = self._flights.popleft()
            if flight.done is None or flight.done.query():
                self._copied(flight.transfer, flight.ok)
            else:
                self._flights.append(flight)
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def close(self) -> None:
        """End the thread once everything is submitted, and wait for the copies."""
        if self._thread is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
            for stream in (*self._out, *self._in):
                stream.synchronize()

    # -------------------------------------------------------------------------------- the disk

    def _spill(self, spill: Spill) -> None:
        if self._disk is None:
            self._ended.append(TransferResult(spill.transfer, False))
            return
        # The pager holds the slots until the disk has them: they are written from where they are.
        blobs = [_blob(self._ram.pages(m.source, 1), m.target, m.tokens) for m in spill.pages]
        self._disk.put(spill.transfer, blobs)

    def _copied(self, transfer: int, ok: bool) -> None:
        """A copy between the pool and the host has ended."""
        waiting, staged = self._staged.pop(transfer, (None, None))
        if self._disk is None or staged is None or not ok or not isinstance(waiting, Store):
            self._ended.append(TransferResult(transfer, ok))
            return
        pages = zip(waiting.pages, staged.memory, strict=True)
        self._disk.put(transfer, [_blob(data, page.slot, page.tokens) for page, data in pages])

    def _moved(self, moved: Moved) -> None:
        """The disk has done its part of a transfer."""
        waiting, _ = self._staged.pop(moved.transfer, (None, None))
        if not moved.ok or not isinstance(waiting, Load):
            self._ended.append(TransferResult(moved.transfer, moved.ok, moved.seconds))
            return
        assert self._disk is not None
        data = {id(extent): data for extent, data in moved.read}
        parts = [data[id(self._disk.at(page.slot))] for page in waiting.pages]
        memory = torch.stack([torch.from_numpy(part).view(self._blocks.dtype) for part in parts])
        staged = _Staged(memory)
        self._staged[moved.transfer] = waiting, staged
        self._begin(waiting, staged, _in_order(waiting.pages))

    # ------------------------------------------------------------------------------ the copies

    def _work(self) -> None:
        torch.cuda.set_device(self._device)
        self._out[0].synchronize()  # makes the device's context current in this thread
        while (job := self._jobs.get()) is not None:
            streams = self._out if isinstance(job.transfer, Store) else self._in
            try:
                if job.after is not None:
                    for stream in streams:
                        stream.wait_event(job.after)
                self._copy_on(streams, job)
                streams[0].wait_event(streams[1].record_event())
                done = streams[0].record_event()
            except Exception:
                self._failed(job.transfer)
            else:
                self._flights.append(_Flight(job.transfer.transfer, done))

    def _failed(self, transfer: Transfer) -> None:
        """A copy costs a computation where it fails, and nobody their text."""
        log.exception("transfer %d failed", transfer.transfer)
        self._flights.append(_Flight(transfer.transfer, None, ok=False))

    def _copy(self, job: _Job) -> None:
        """Copy its pages, neighbours on both sides together."""
        for block, slot, count in stretches(job.pages, job.host.slab_pages):
            pages = job.host.pages(slot, count)
            blocks = self._blocks[block + PADDING_BLOCKS : block + PADDING_BLOCKS + count]
            if isinstance(job.transfer, Store):
                pages.copy_(blocks)
            else:
                blocks.copy_(pages)

    def _copy_on(self, streams: tuple[torch.cuda.Stream, torch.cuda.Stream], job: _Job) -> None:
        """The same on two CUDA streams in turn, by the driver itself.

        The driver takes 2 µs a copy and torch 20, which would limit blocks of half a megabyte to
        half of what the bus carries. On one stream the next copy is set up only when the last one
        has ended, and blocks of half a megabyte get 74 % of what the bus carries.
        """
        driver, memory, size = self._driver, job.host, job.host.page_bytes
        base = self._blocks.data_ptr() + PADDING_BLOCKS * size
        for at, (block, slot, count) in enumerate(stretches(job.pages, memory.slab_pages)):
            handle = streams[at % 2].cuda_stream
            host, device = memory.address(slot, count), base + block * size
            if isinstance(job.transfer, Store):
                (status,) = driver.cuMemcpyDtoHAsync(host, device, count * size, handle)
            else:
                (status,) = driver.cuMemcpyHtoDAsync(device, host, count * size, handle)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"a copy was refused: {status.name}")


def _in_order(pages: Sequence[Page]) -> tuple[Page, ...]:
    """The same with their numbers for slots."""
    return tuple(Page(page.index, page.block, at, page.tokens) for at, page in enumerate(pages))


def _blob(values: Tensor, slot: int, tokens: int) -> Blob:
    """A page in host memory, where it is, for a slot on disk."""
    data: Bytes = values.reshape(-1).view(torch.uint8).numpy()
    return Blob(data, {slot: (0, tokens)}, tokens)


def stretches(pages: tuple[Page, ...], slab_pages: int) -> list[tuple[int, int, int]]:
    """Pages as ``(first block, first slot, count)``: neighbours in the pool and in one slab."""
    found: list[tuple[int, int, int]] = []
    for page in sorted(pages, key=lambda page: page.slot):
        if found:
            block, slot, count = found[-1]
            follows = page.block == block + count and page.slot == slot + count
            if follows and page.slot // slab_pages == slot // slab_pages:
                found[-1] = (block, slot, count + 1)
                continue
        found.append((page.block, page.slot, 1))
    return found

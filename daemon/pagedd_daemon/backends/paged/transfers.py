"""Pages between the pool, RAM and disk: one thread that submits copies, a stream each way.

Submitting a page costs some 5 µs of Python, so a swap of a long sequence would hold up the step
loop for a millisecond: a thread of its own submits them. What keeps it free of races:

* A store waits, on its stream, for every step that was launched before it: they may write its
  blocks. The pager hands the blocks to nobody before the store is reported as done.
* A load begins at once: the pager gives out no block that a step in flight may touch. Only a
  copy-on-write or a fresh segment's zeroing that is still queued may, so loads wait for the last of
  these (`Transfers.fence`). The steps that read the blocks come after the report.
* Reports are made by the step loop, from events that have ended. Where one is made a little early
  (`Transfers.poll`), everything that comes after it on the steps' stream waits for the load.

On the CPU the same pages are copied while `submit` is called. What goes to disk, or comes from it,
goes through host memory: a store is copied first and then written, a load read and then copied.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kvpager.types import Load, Page, Spill, Store, Tier
from pagedd_daemon.backends.base import TransferResult
from pagedd_daemon.backends.paged.arena import PADDING_BLOCKS
from pagedd_daemon.backends.paged.batches import Batches
from pagedd_daemon.backends.paged.slabs import RamTier
from pagedd_daemon.engine.tiers.disk import Blob, DiskTier, Moved
from pagedd_daemon.engine.tiers.ram import Bytes

log = logging.getLogger(__name__)

Transfer: TypeAlias = "Store | Load"

AHEAD_BYTES = 192 << 20
"""Of a load whose last so many bytes are on their way, an idle device may be told: they take 3.6 ms
over a bus of 55 GB/s, and the host as long until the step that reads them is launched."""


_BATCH_PAGES = 32
"""Pages of a batch: with more the bus is no busier, and its first byte waits for all of them."""
_FIRST_PAGES = 8
"""Of a load, submitted by the step loop itself: 60 µs of its time, and the bus need not wait until
the thread is woken, which takes up to 300 where the interpreter is wanted by both."""


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

    def locked(self, slot: int) -> bool:
        """Whether the places up to ``slot`` are page-locked."""
        ...


class _Staged:
    """Host memory for the pages of one transfer, in order."""

    slab_pages = 1
    """They need not follow one another."""

    def __init__(self, memory: Sequence[Tensor]) -> None:
        self.memory = memory
        self.page_bytes = memory[0].nbytes

    def pages(self, slot: int, count: int) -> Tensor:
        assert count == 1
        return self.memory[slot][None]

    def address(self, slot: int, count: int) -> int:
        assert count == 1
        return self.memory[slot].data_ptr()

    def locked(self, slot: int) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class _Job:
    transfer: Transfer
    after: torch.cuda.Event | None
    host: Host
    pages: tuple[Page, ...]
    """As of the transfer, with places of ``host`` for slots."""
    begun: torch.cuda.Event | None = None
    """In front of its first `_FIRST_PAGES`, which are submitted then."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A transfer whose copies are submitted."""

    transfer: int
    done: torch.cuda.Event | None = None
    """None: it is over."""
    begun: torch.cuda.Event | None = None
    nearly: torch.cuda.Event | None = None
    """Behind all copies of a load but the last `AHEAD_BYTES`; None: there is no such event."""
    before: float = 0.0
    """Of its bytes, the part in front of that."""
    ok: bool = True

    def over(self) -> bool:
        """Whether all of it has been copied."""
        return self.done is None or self.done.query()

    def seconds(self) -> float:
        """How long the copies have taken, or will have where the last are on their way; 0 where
        nothing tells."""
        if self.begun is None or self.done is None:
            return 0.0
        if self.done.query():
            return float(self.begun.elapsed_time(self.done)) * 1e-3
        if self.nearly is None or not self.before:
            return 0.0
        return float(self.begun.elapsed_time(self.nearly)) * 1e-3 / self.before


@dataclass(slots=True)
class _OfDisk:
    """A transfer of the disk."""

    transfer: Transfer
    staged: _Staged | None = None
    """The host memory that its pages go through, once they do."""
    seconds: float = 0.0
    """That reading has taken."""


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
        self._of_disk: dict[int, _OfDisk] = {}
        self._blocks = kv.view(kv.shape[0], -1)
        self._ram = ram
        self._device = device
        self._ended: deque[TransferResult] = deque()
        self._flights: deque[_Flight] = deque()
        self._fence: torch.cuda.Event | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._batches = Batches()
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
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
            self._of_disk[transfer.transfer] = _OfDisk(transfer)
            self._disk.get(transfer.transfer, (page.slot for page in transfer.pages))
        else:
            shape = len(transfer.pages), self._blocks.shape[1]
            staged = _Staged(torch.empty(shape, dtype=self._blocks.dtype).unbind())
            self._of_disk[transfer.transfer] = _OfDisk(transfer, staged)
            self._begin(transfer, staged, _in_order(transfer.pages))

    def _begin(self, transfer: Transfer, host: Host, pages: tuple[Page, ...]) -> None:
        """Begin to copy between the pool and the host."""
        if self._thread is None:
            try:
                self._copy(_Job(transfer, None, host, pages))
            except Exception:
                self._failed(transfer)
            else:
                self._flights.append(_Flight(transfer.transfer))
            return
        after = self._fence
        if isinstance(transfer, Store):
            after = torch.cuda.Event()
            after.record()
        job = _Job(transfer, after, host, pages)
        if isinstance(transfer, Load) and host.locked(max(page.slot for page in pages)):
            job = self._begun(job)
        self._jobs.put(job)

    def _begun(self, job: _Job) -> _Job:
        """The job with its first pages on their way, before the thread has been woken for it."""
        try:
            if job.after is not None:
                self._in.wait_event(job.after)
            begun = self._in.record_event(torch.cuda.Event(enable_timing=True))
            self._copy_batch(self._in, job, job.pages[:_FIRST_PAGES], together=True)
        except Exception:  # the thread meets it again, and says so
            return job
        return replace(job, begun=begun)

    def poll(self, *, idle: bool = False) -> list[TransferResult]:
        """Transfers that ended since the last call.

        Where the device has nothing to compute (``idle``), a load is reported when its last bytes
        are on their way: what is launched from then on waits for them there, and not for the host,
        which takes as long to find out, to plan the step and to launch it.
        """
        if self._disk is not None:
            for moved in self._disk.poll():
                self._moved(moved)
        # One stream each way, so not only the oldest may have ended.
        for _ in range(len(self._flights)):
            flight = self._flights.popleft()
            if flight.over():
                self._copied(flight)
            elif idle and flight.nearly is not None and flight.nearly.query():
                assert flight.done is not None
                torch.cuda.current_stream(self._device).wait_event(flight.done)
                self.fence()
                self._copied(flight)
            else:
                self._flights.append(flight)
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def close(self) -> None:
        """End the thread once everything is submitted, and wait for the copies."""
        if self._thread is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
            for stream in (self._out, self._in):
                stream.synchronize()

    # -------------------------------------------------------------------------------- the disk

    def _spill(self, spill: Spill) -> None:
        if self._disk is None:
            self._ended.append(TransferResult(spill.transfer, False))
            return
        # The pager holds the slots until the disk has them: they are written from where they are.
        blobs = [_blob(self._ram.pages(m.source, 1), m.target, m.tokens) for m in spill.pages]
        self._disk.put(spill.transfer, blobs)

    def _copied(self, flight: _Flight) -> None:
        """A copy between the pool and the host has ended."""
        number, seconds = flight.transfer, flight.seconds()
        known = self._of_disk.pop(number, None)
        if known is None or known.staged is None or not isinstance(known.transfer, Store):
            read = 0.0 if known is None else known.seconds
            self._ended.append(TransferResult(number, flight.ok, seconds + read))
        elif self._disk is None or not flight.ok:
            self._ended.append(TransferResult(number, False))
        else:
            pages = zip(known.transfer.pages, known.staged.memory, strict=True)
            self._disk.put(number, [_blob(data, page.slot, page.tokens) for page, data in pages])

    def _moved(self, moved: Moved) -> None:
        """The disk has done its part of a transfer."""
        known = self._of_disk.get(moved.transfer)
        if not moved.ok or known is None or not isinstance(known.transfer, Load):
            self._of_disk.pop(moved.transfer, None)
            self._ended.append(TransferResult(moved.transfer, moved.ok, moved.seconds))
            return
        assert self._disk is not None
        load, data = known.transfer, {id(extent): data for extent, data in moved.read}
        parts = [data[id(self._disk.at(page.slot))] for page in load.pages]
        known.staged = _Staged([torch.from_numpy(part).view(self._blocks.dtype) for part in parts])
        known.seconds = moved.seconds
        self._begin(load, known.staged, _in_order(load.pages))

    # ------------------------------------------------------------------------------ the copies

    def _work(self) -> None:
        torch.cuda.set_device(self._device)
        self._out.synchronize()  # makes the device's context current in this thread
        while (job := self._jobs.get()) is not None:
            stream = self._out if isinstance(job.transfer, Store) else self._in
            try:
                if job.after is not None and job.begun is None:
                    stream.wait_event(job.after)
                flight = self._copy_on(stream, job)
            except Exception:
                self._failed(job.transfer)
            else:
                self._flights.append(flight)

    def _failed(self, transfer: Transfer) -> None:
        """A copy costs a computation where it fails, and nobody their text."""
        log.exception("transfer %d failed", transfer.transfer)
        self._flights.append(_Flight(transfer.transfer, ok=False))

    def _copy(self, job: _Job) -> None:
        """Copy its pages, neighbours on both sides together."""
        for block, slot, count in stretches(job.pages, job.host.slab_pages):
            pages = job.host.pages(slot, count)
            blocks = self._blocks[block + PADDING_BLOCKS : block + PADDING_BLOCKS + count]
            if isinstance(job.transfer, Store):
                pages.copy_(blocks)
            else:
                blocks.copy_(pages)

    def _copy_on(self, stream: torch.cuda.Stream, job: _Job) -> _Flight:
        """The same on a CUDA stream, by the driver itself.

        It takes 5 µs for a page of a batch, most of it Python's; torch takes 20.
        """
        begun = job.begun or stream.record_event(torch.cuda.Event(enable_timing=True))
        locked = job.host.locked(max(page.slot for page in job.pages))
        nearly, before = None, 0.0
        at, last = 0 if job.begun is None else _FIRST_PAGES, len(job.pages)
        if locked and isinstance(job.transfer, Load):
            last = max(0, last - AHEAD_BYTES // job.host.page_bytes)
            before = last / len(job.pages)
        # The first are on their way while the others are looked for.
        while at < len(job.pages):
            if at >= last and nearly is None and locked:
                nearly = stream.record_event(torch.cuda.Event(enable_timing=True))
            end = at + _BATCH_PAGES
            if at < last < end:
                end = last
            self._copy_batch(stream, job, job.pages[at:end], together=locked)
            at = end
        if nearly is None and last < len(job.pages):  # all of it was submitted with its first pages
            nearly = stream.record_event(torch.cuda.Event(enable_timing=True))
        done = stream.record_event(torch.cuda.Event(enable_timing=True))
        return _Flight(job.transfer.transfer, done, begun, nearly, before)

    def _copy_batch(
        self, stream: torch.cuda.Stream, job: _Job, pages: tuple[Page, ...], *, together: bool
    ) -> None:
        memory, size = job.host, job.host.page_bytes
        base = self._blocks.data_ptr() + PADDING_BLOCKS * size
        parts = stretches(pages, memory.slab_pages)
        device = np.array([base + block * size for block, _, _ in parts], np.uint64)
        host = np.array([memory.address(slot, count) for _, slot, count in parts], np.uint64)
        sizes = np.array([count * size for _, _, count in parts], np.uint64)
        to, of = (host, device) if isinstance(job.transfer, Store) else (device, host)
        self._batches.copy(to, of, sizes, stream.cuda_stream, together=together)


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

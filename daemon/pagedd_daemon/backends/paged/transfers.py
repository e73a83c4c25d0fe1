"""Pages between the pool and RAM: one thread that submits copies, two streams each way.

Submitting a copy costs 6.6 µs of Python, so a swap of a long sequence would hold up the step loop
for milliseconds: a thread of its own submits them. What keeps it free of races:

* A store waits, on its stream, for every step that was launched before it: they may write its
  blocks. The pager hands the blocks to nobody before the store is reported as done.
* A load begins at once: the pager gives out no block that a step in flight may touch. Only a
  copy-on-write or a fresh segment's zeroing that is still queued may, so loads wait for the last of
  these (`Transfers.fence`). The steps that read the blocks come after the report.
* Reports are made by the step loop, from events that have ended.

On the CPU the same pages are copied while `submit` is called.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvpager.types import Load, Page, Store, Tier
from pagedd_daemon.backends.base import TransferResult
from pagedd_daemon.backends.paged.arena import PADDING_BLOCKS
from pagedd_daemon.backends.paged.slabs import RamTier

log = logging.getLogger(__name__)

Transfer: TypeAlias = "Store | Load"


@dataclass(frozen=True, slots=True)
class _Job:
    transfer: Transfer
    after: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A transfer whose copies are submitted."""

    transfer: int
    done: torch.cuda.Event | None
    """None: it was not submitted, and has failed."""


class Transfers:
    """Carries out `Store` and `Load` between the pool and the RAM tier."""

    def __init__(self, kv: Tensor, ram: RamTier, device: torch.device) -> None:
        """Transfers of the pool ``kv``, whose blocks are contiguous.

        Args:
            kv: The arena's tensor.
            ram: Where pages go.
            device: Where the pool is.
        """
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

    def submit(self, transfer: Transfer) -> None:
        """Begin a transfer; `poll` tells of its end. Called by the step loop."""
        assert transfer.tier is Tier.RAM
        if isinstance(transfer, Store):
            self._ram.stored(page.slot for page in transfer.pages)
        if self._thread is None:
            self._copy(transfer)
            self._ended.append(TransferResult(transfer.transfer, True))
            return
        after = self._fence
        if isinstance(transfer, Store):
            after = torch.cuda.Event()
            after.record()
        self._jobs.put(_Job(transfer, after))

    def poll(self) -> list[TransferResult]:
        """Transfers that ended since the last call."""
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        # Two streams, so not only the oldest may have ended.
        for _ in range(len(self._flights)):
            flight = self._flights.popleft()
            if flight.done is None:
                ended.append(TransferResult(flight.transfer, False))
            elif flight.done.query():
                ended.append(TransferResult(flight.transfer, True))
            else:
                self._flights.append(flight)
        return ended

    def close(self) -> None:
        """End the thread once everything is submitted, and wait for the copies."""
        if self._thread is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
            for stream in (*self._out, *self._in):
                stream.synchronize()

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
                self._copy_on(streams, job.transfer)
                streams[0].wait_event(streams[1].record_event())
                done = streams[0].record_event()
            except Exception:
                log.exception("transfer %d failed", job.transfer.transfer)
                self._flights.append(_Flight(job.transfer.transfer, None))
            else:
                self._flights.append(_Flight(job.transfer.transfer, done))

    def _copy(self, transfer: Transfer) -> None:
        """Copy its pages, neighbours on both sides together."""
        for block, slot, count in stretches(transfer.pages, self._ram.slab_pages):
            pages = self._ram.pages(slot, count)
            blocks = self._blocks[block + PADDING_BLOCKS : block + PADDING_BLOCKS + count]
            if isinstance(transfer, Store):
                pages.copy_(blocks)
            else:
                blocks.copy_(pages)

    def _copy_on(
        self, streams: tuple[torch.cuda.Stream, torch.cuda.Stream], transfer: Transfer
    ) -> None:
        """The same on two CUDA streams in turn, by the driver itself.

        The driver takes 2 µs a copy and torch 20, which would limit blocks of half a megabyte to
        half of what the bus carries. On one stream the next copy is set up only when the last one
        has ended, and blocks of half a megabyte get 74 % of what the bus carries.
        """
        driver, ram, size = self._driver, self._ram, self._ram.page_bytes
        base = self._blocks.data_ptr() + PADDING_BLOCKS * size
        for at, (block, slot, count) in enumerate(stretches(transfer.pages, ram.slab_pages)):
            handle = streams[at % 2].cuda_stream
            host, device = ram.address(slot, count), base + block * size
            if isinstance(transfer, Store):
                (status,) = driver.cuMemcpyDtoHAsync(host, device, count * size, handle)
            else:
                (status,) = driver.cuMemcpyHtoDAsync(device, host, count * size, handle)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"a copy was refused: {status.name}")


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

"""A file of pages: read and written by a few threads, trusted only where its checksums agree.

`pread` and `pwrite` and never a mapping: a sparse or truncated file that is mapped is a SIGBUS. All
writing, of data and of records, is done by one thread in the order in which it was asked for, so a
record is unmade before the bytes that it points to can change, and made after they have. Reading is
done by others meanwhile.

A read that takes longer than its deadline counts as failed, and whoever wanted the page computes
it. An error of the file, or a write that takes longer than that, ends the file's use for the life
of the process (`DiskFile.trouble`): a disk that fails once is not to be waited for again and again.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from pagedd_daemon.engine.tiers.ram import Bytes
from pagedd_daemon.engine.tiers.records import Record, RecordTable, Shape

log = logging.getLogger(__name__)

READERS = 2
READ_DEADLINE_S, WRITE_DEADLINE_S = 2.0, 30.0
SLOWEST_BYTES_PER_S = 20e6
"""Deadlines grow with what is asked for, by the time that a slow disk takes for it."""
MOST_QUEUED_BYTES = 256 << 20
"""Waiting to be written. Beyond it pages are refused: they are computed again if need be."""
_CHUNK = 8 << 20
"""Of one system call."""


class Io:
    """The system calls, for tests to fail."""

    def pread(self, descriptor: int, into: memoryview, offset: int) -> int:
        """Read up to ``len(into)`` bytes; how many."""
        return os.preadv(descriptor, [into], offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write up to ``len(data)`` bytes; how many."""
        return os.pwrite(descriptor, data, offset)


class _FileBuffer:
    """The file as the bytes that a `RecordTable` works on."""

    def __init__(self, descriptor: int, io: Io) -> None:
        self._descriptor = descriptor
        self._io = io

    def __getitem__(self, where: slice) -> bytes:
        data = bytearray(where.stop - where.start)
        with suppress(EOFError):  # what a file does not have reads as zeros, and as no record
            read_all(self._io, self._descriptor, memoryview(data), where.start)
        return bytes(data)

    def __setitem__(self, where: slice, data: bytes) -> None:
        write_all(self._io, self._descriptor, memoryview(data), where.start)


def read_all(io: Io, descriptor: int, into: memoryview, offset: int) -> None:
    """Fill ``into``, however few bytes each call brings.

    Raises:
        EOFError: The file ends before.
        OSError: The disk fails.
    """
    done = 0
    while done < len(into):
        count = io.pread(descriptor, into[done : done + _CHUNK], offset + done)
        if not count:
            raise EOFError(f"the file ends at byte {offset + done}")
        done += count


def write_all(io: Io, descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, however few bytes each call takes.

    Raises:
        OSError: The disk fails, or is full.
    """
    done = 0
    while done < len(data):
        count = io.pwrite(descriptor, data[done : done + _CHUNK], offset + done)
        if not count:
            raise OSError(f"nothing can be written at byte {offset + done}")
        done += count


@dataclass(frozen=True, slots=True)
class Chunk:
    """A byte string in the file."""

    offset: int
    length: int
    crc: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """Something to be written or read, in flight."""

    number: int
    writes: bool
    bytes: int
    begun: float
    """By the file's clock, when it was asked for."""
    chunks: list[Chunk]
    """Where; after a write with their checksums."""
    data: list[Bytes] = field(default_factory=list)
    """What was read, or is being written."""
    seconds: float = 0.0
    """How long the disk took, without waiting for its turn."""
    ok: bool = False
    corrupt: bool = False
    """It was read, and is not what was written."""
    over: bool = False
    behind: int = 0
    """Bytes that were to be wiped before it."""


Task: TypeAlias = Callable[[], None]


class DiskFile:
    """See the module. All but the work itself happens on the caller's thread."""

    def __init__(
        self,
        descriptor: int,
        shape: Shape,
        *,
        io: Io | None = None,
        readers: int = READERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take over an open file, of ``shape.total_bytes``.

        Args:
            descriptor: Closed with this.
            shape: What it is made for; made anew where it was not.
            io: Other system calls than the real ones.
            readers: Threads that read; with 0 nothing has a thread, and all is done by `poll`.
            clock: Seconds, monotonic.

        Raises:
            OSError: It cannot be read or written.
        """
        self._descriptor = descriptor
        self._io = io or Io()
        self._clock = clock
        self._table = RecordTable(_FileBuffer(descriptor, self._io), shape)
        self._data_offset = shape.data_offset
        self.size = shape.data_bytes
        """Bytes of data there is room for."""
        self.found: list[Record] = self._table.committed()
        """What was there already, oldest first."""
        self.trouble = ""
        """Why it is not used any more."""
        self.late = self.corrupt = 0
        """Reads that took too long, and reads of what was not what had been written."""
        self._queued = 0
        self._to_wipe = self._wiped = 0
        """Bytes that were ever asked to be wiped, and those of them that are: each is written by
        one thread alone."""
        self._flights: list[Job] = []
        self._to_write: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._to_read: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        work = [(self._to_write, "disk-writer")] * min(readers, 1)
        work += [(self._to_read, f"disk-reader-{i}") for i in range(readers)]
        self._threads = [
            threading.Thread(target=_work, args=(tasks,), name=name, daemon=True)
            for tasks, name in work
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------------------------ asking

    def write(self, number: int, parts: Sequence[tuple[int, Bytes]]) -> Job | None:
        """Begin to write byte strings to their offsets; None where too much waits already.

        They must not change before `poll` has told of the job's end.
        """
        size = sum(data.size for _, data in parts)
        if self._queued and self._queued + size > MOST_QUEUED_BYTES:
            return None
        chunks = [Chunk(offset, data.size) for offset, data in parts]
        job = Job(number, True, size, self._clock(), chunks, [data for _, data in parts])
        job.behind = self._to_wipe - self._wiped
        self._queued += size
        self._begin(job, self._to_write, self._write)
        return job

    def read(self, number: int, chunks: Sequence[Chunk]) -> Job:
        """Begin to read byte strings."""
        size = sum(chunk.length for chunk in chunks)
        job = Job(number, False, size, self._clock(), list(chunks))
        self._begin(job, self._to_read, self._read)
        return job

    def clear(self, slots: Iterable[int]) -> None:
        """What these slots hold is about to change, or is not to be trusted."""
        which = tuple(slots)
        self._to_write.put(lambda: self._record(lambda: self._table.clear(which)))

    def commit(self, record: Record) -> None:
        """The page of ``record`` is there, all of it."""
        self._to_write.put(lambda: self._record(lambda: self._table.commit(record)))

    def wipe(self, offset: int, length: int) -> None:
        """What was there is to be read by nobody any more: zeros take its place, before anything
        that is written there from now on."""
        at = self._data_offset + offset

        def fill() -> None:
            for done in range(0, length, _CHUNK):
                zeros = memoryview(bytes(min(_CHUNK, length - done)))
                write_all(self._io, self._descriptor, zeros, at + done)
            self._wiped += length

        self._to_wipe += length
        self._to_write.put(lambda: self._record(fill))

    def forget(self, offset: int, length: int) -> None:
        """Nothing: what the file has been given stays its own."""

    def poll(self) -> list[Job]:
        """Jobs that ended since the last call, well, badly, or too late."""
        if not self._threads:
            _do(self._to_write)
            _do(self._to_read)
        ended: list[Job] = []
        left: list[Job] = []
        now = self._clock()
        for job in self._flights:
            if not job.over and not self._is_late(job, now):
                left.append(job)
                continue
            ended.append(job)
            if job.writes:
                self._queued -= job.bytes
            self.corrupt += job.corrupt
        self._flights = left
        return ended

    def flush(self, timeout_s: float) -> None:
        """Wait until what was asked for has been written, for a while."""
        reached = threading.Event()
        self._to_write.put(reached.set)
        if not self._threads:
            _do(self._to_write)
        reached.wait(timeout_s)

    def close(self) -> None:
        """Stop the threads once they are done with what they are at, and close the file. Whatever
        hangs in the kernel is left to the end of the process. Idempotent."""
        if self._descriptor < 0:
            return
        self.trouble = self.trouble or "it is closed"
        for _ in self._threads:
            self._to_read.put(None)
        self._to_write.put(None)
        for thread in self._threads:
            thread.join(1.0)
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self._descriptor)
        self._descriptor = -1

    # ------------------------------------------------------------------------------------- doing

    def _begin(
        self, job: Job, tasks: queue.SimpleQueue[Task | None], work: Callable[[Job], None]
    ) -> None:
        self._flights.append(job)
        tasks.put(lambda: self._attempt(job, work))

    def _attempt(self, job: Job, work: Callable[[Job], None]) -> None:
        """Do a job, on a thread of its kind."""
        if not self.trouble:
            begin = time.perf_counter()
            try:
                work(job)
            except (OSError, EOFError) as error:
                self._fail(f"{'writing' if job.writes else 'reading'} failed: {error}")
            job.seconds = time.perf_counter() - begin
        job.over = True

    def _write(self, job: Job) -> None:
        for i, (chunk, data) in enumerate(zip(job.chunks, job.data, strict=True)):
            view = data.data
            job.chunks[i] = Chunk(chunk.offset, chunk.length, zlib.crc32(view))
            write_all(self._io, self._descriptor, view, self._data_offset + chunk.offset)
        job.ok = True

    def _read(self, job: Job) -> None:
        for chunk in job.chunks:
            data = np.empty(chunk.length, np.uint8)
            at = self._data_offset + chunk.offset
            read_all(self._io, self._descriptor, data.data, at)
            if zlib.crc32(data.data) != chunk.crc:
                job.corrupt = True
                return
            job.data.append(data)
        job.ok = True

    def _record(self, work: Task) -> None:
        if not self.trouble:
            try:
                work()
            except OSError as error:
                self._fail(f"writing failed: {error}")

    def _is_late(self, job: Job, now: float) -> bool:
        most = WRITE_DEADLINE_S if job.writes else READ_DEADLINE_S
        if now - job.begun <= most + (job.bytes + job.behind) / SLOWEST_BYTES_PER_S:
            return False
        if job.writes:
            # It may still be writing where others would be put next.
            self._fail(f"a write of {job.bytes} bytes takes more than {now - job.begun:.0f} s")
        else:
            self.late += 1
        return True

    def _fail(self, why: str) -> None:
        if not self.trouble:
            self.trouble = why
            log.error("the disk tier is not used any more: %s", why)


def _work(tasks: queue.SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task()


def _do(tasks: queue.SimpleQueue[Task | None]) -> None:
    with suppress(queue.Empty):
        while (task := tasks.get_nowait()) is not None:
            task()

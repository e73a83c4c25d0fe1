"""The disk tier: slots of pages in a file, behind RAM and in front of computing again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvpager.types import Adopt, PageName, Spill, Store, Tier
from pagedd_daemon.engine.tiers.diskfile import Chunk, DiskFile, Job
from pagedd_daemon.engine.tiers.extents import Extent, Extents, Span
from pagedd_daemon.engine.tiers.ram import Bytes

_WITHOUT_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that hold one page or several neighbours."""

    data: Bytes
    """uint8; must not change before `DiskTier.poll` has told of the transfer's end."""
    slots: Mapping[int, Span]
    """The slots that are to stand for them, with the positions they stand for."""
    tokens: int
    """Positions in it."""


@dataclass(slots=True)
class Moved:
    """A transfer that has ended."""

    transfer: int
    ok: bool
    seconds: float = 0.0
    read: list[tuple[Extent, Bytes]] = field(default_factory=list)
    """What was read, each byte string once."""


@dataclass(slots=True)
class _Flight:
    extents: list[Extent]
    slots: list[int]


def filled(transfer: Store | Spill) -> list[int]:
    """The slots that a transfer fills, in its order."""
    if isinstance(transfer, Store):
        return [page.slot for page in transfer.pages]
    return [move.target for move in transfer.pages]


class DiskTier:
    """Moves byte strings between memory and a `DiskFile`, and knows which slot is in which.

    Transfers are the caller's numbers, each in flight once. What cannot be done (no room, too much
    queued, a disk in trouble) is told by `poll` like any other failure, and costs a computation.
    """

    def __init__(self, file: DiskFile) -> None:
        """A tier in ``file``, with the pages that are in it already."""
        self._file = file
        self._extents = Extents(file, _WITHOUT_LIMIT)
        self._flights: dict[int, _Flight] = {}
        self._ended: list[Moved] = []

    @property
    def file(self) -> DiskFile:
        """The file."""
        return self._file

    def put(self, transfer: int, blobs: Sequence[Blob]) -> None:
        """Begin to write ``blobs``."""
        slots = [slot for blob in blobs for slot in blob.slots]
        # Whatever they stood for is gone, and its room may be what the new ones need.
        self._extents.drop(slots)
        parts: list[tuple[int, Bytes]] = []
        extents: list[Extent] = []
        for blob in blobs:
            offset = -1 if self._file.trouble else self._extents.room(blob.data.size)
            if offset < 0:
                break
            extent = Extent(offset, blob.data.size, blob.tokens)
            self._extents.put(extent, dict(blob.slots))
            extents.append(extent)
            parts.append((offset, blob.data))
        whole = len(parts) == len(blobs)
        if not whole or self._file.write(transfer, parts) is None:
            self._extents.drop(slots)
            self._ended.append(Moved(transfer, ok=False))
            return
        self._flights[transfer] = _Flight(extents, slots)

    def link(self, transfer: int, extent: Extent, slots: Mapping[int, Span]) -> None:
        """``slots`` are to stand for positions of an extent that has been written already."""
        self._extents.share(extent, dict(slots))
        self._ended.append(Moved(transfer, ok=True))

    def get(self, transfer: int, slots: Iterable[int]) -> None:
        """Begin to read what ``slots`` stand for."""
        wanted = list(slots)
        found = [self._extents.at(slot) for slot in wanted]
        extents = list(dict.fromkeys(extent for extent in found if extent is not None))
        if None in found or self._file.trouble:
            self._ended.append(Moved(transfer, ok=False))
            return
        self._flights[transfer] = _Flight(extents, wanted)
        self._file.read(transfer, [Chunk(e.offset, e.length, e.crc) for e in extents])

    def poll(self) -> list[Moved]:
        """Transfers that ended since the last call."""
        ended, self._ended = self._ended, []
        for job in self._file.poll():
            ended.append(self._end(job, self._flights.pop(job.number)))
        return ended

    def _end(self, job: Job, flight: _Flight) -> Moved:
        if not (job.over and job.ok):
            # The pager will not use these slots any more: neither may whoever comes next.
            self._extents.drop(flight.slots)
            return Moved(job.number, ok=False)
        if not job.writes:
            read = list(zip(flight.extents, job.data, strict=True))
            return Moved(job.number, True, job.seconds, read)
        for extent, chunk in zip(flight.extents, job.chunks, strict=True):
            extent.crc = chunk.crc
            extent.ready = True
        return Moved(job.number, True, job.seconds)

    def commit(self, slot: int, name: PageName) -> None:
        """The page of ``slot`` is called ``name``: whoever opens the file later may find it."""
        if self._extents.at(slot) is not None:
            self._extents.commit(slot, name)

    def erase(self, given_up: Callable[[PageName], bool]) -> int:
        """Forget the pages that are ``given_up``, and wipe their bytes; how many there were. Before
        the pager hears of them (`adoptable`)."""
        slots = {slot: None for slot, name in self._extents.named() if given_up(name)}
        extents = {id(extent): extent for slot in slots if (extent := self._extents.at(slot))}
        for extent in extents.values():
            if extent.slots.keys() <= slots.keys():
                self._file.wipe(extent.offset, extent.length)
        # After that: whoever is killed in between finds the records again, and begins anew.
        self._extents.drop(list(slots))
        return len(slots)

    def at(self, slot: int) -> Extent | None:
        """The extent that ``slot`` points into."""
        return self._extents.at(slot)

    def adoptable(self) -> Adopt:
        """What the file held when it was opened."""
        return Adopt(Tier.DISK, self._extents.named())

    def counters(self) -> dict[str, int]:
        """Figures for ``stats``."""
        return {"disk_late": self._file.late, "disk_corrupt": self._file.corrupt}

    def close(self, flush_s: float = 0.0) -> None:
        """Let go of the file, after waiting for what is still to be written for ``flush_s``."""
        if flush_s:
            self._file.flush(flush_s)
        self._extents.close()

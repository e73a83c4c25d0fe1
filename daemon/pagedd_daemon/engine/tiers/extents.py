"""Pages saved outside the pool, several in one piece.

llama.cpp saves and restores whole sequences, and each time walks over all its cells: page by page
that costs several times what the bytes do. So neighbouring pages are kept together as one *extent*,
and a page's slot points into it. An extent lives as long as a slot points into it, so it may hold
pages that nobody wants any more. It is short for that reason, and whoever stores packs the emptiest
extent again while `Extents.wasteful` names one.

Extents lie in the memory of a `RamStore` or in a `DiskFile`, whose records say which page is where
in which of them. On disk they are never packed: an extent is gone when the last of its pages is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from kvpager.types import PageName
from pagedd_daemon.engine.tiers.ranges import Ranges, round_up
from pagedd_daemon.engine.tiers.records import Record

EXTENT_PAGES = 16
"""Pages of an extent at most. Storing and loading 1,000 tokens of SmolLM2 take 2.3 and 1.8 ms at 16
pages, 5.1 and 5.0 ms page by page, and no less at 64 (16,640 cells, a shared 2-core machine)."""

Span: TypeAlias = tuple[int, int]
"""Positions from the first to the one before the second."""


@dataclass(slots=True, eq=False)
class Extent:
    """The saved state of some positions of one sequence."""

    offset: int
    """Of its bytes, in the store's data."""
    length: int
    tokens: int
    """Positions in it."""
    crc: int = 0
    """crc32 of its bytes, in a file."""
    ready: bool = False
    """Whether its bytes are there, in a file."""
    slots: dict[int, Span] = field(default_factory=dict)
    """Slots that point into it, with the positions they stand for."""

    def use(self) -> float:
        """Share of its positions that a slot stands for."""
        return sum(end - start for start, end in self.slots.values()) / self.tokens


class Store(Protocol):
    """Where extents lie."""

    @property
    def size(self) -> int:
        """Bytes there is room for."""
        ...

    @property
    def found(self) -> list[Record]:
        """What was there before, oldest first."""
        ...

    def clear(self, slots: Iterable[int]) -> None:
        """What these slots hold is about to change."""
        ...

    def commit(self, record: Record) -> None:
        """A page is there, all of it."""
        ...

    def forget(self, offset: int, length: int) -> None:
        """Nobody uses a range any more."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Extents:
    """Slots of pages, backed by extents."""

    def __init__(self, store: Store, budget_bytes: int) -> None:
        """Extents in ``store``, those that an earlier engine left included.

        Beyond ``budget_bytes`` in all, extents are to be packed.
        """
        self._store = store
        self._budget = budget_bytes
        self._ranges = Ranges(store.size)
        self._of_slot: dict[int, Extent] = {}
        self._extents: set[Extent] = set()
        self._names: dict[int, PageName] = {}
        """Slots whose record says that their page is there."""
        self.bytes = 0
        """Held now, unwanted pages included."""
        self._reclaiming = False
        self._find(store.found)

    def _find(self, records: Iterable[Record]) -> None:
        """Take over what an earlier engine left."""
        by_place: dict[tuple[int, int, int, int], Extent] = {}
        for record in records:
            place = (record.offset, record.length, record.whole, record.crc)
            extent = by_place.get(place)
            if extent is None:
                if not record.whole or not self._ranges.reserve(record.offset, record.length):
                    self._store.clear((record.slot,))
                    continue
                extent = by_place[place] = Extent(*place, ready=True)
                self._extents.add(extent)
                self.bytes += extent.length
            extent.slots[record.slot] = (record.start, record.start + record.tokens)
            self._of_slot[record.slot] = extent
            self._names[record.slot] = record.name

    @staticmethod
    def slots_for(budget_bytes: int, page_bytes: int) -> int:
        """Slots that can be served within a budget.

        An eighth is left for pages nobody wants any more: with less, storing would repack extents
        that are nearly full, over and over.
        """
        return budget_bytes * 7 // 8 // page_bytes

    def room(self, size: int) -> int:
        """The offset of a place for up to ``size`` bytes, to be filled and `put`, or given back
        with `give`; -1 where no hole is large enough."""
        return self._ranges.take(size)

    def give(self, offset: int, size: int, keep: int = 0) -> None:
        """Give back of a range of ``size`` bytes all but the first ``keep``."""
        kept = round_up(keep)
        if round_up(size) == kept:
            return
        self._ranges.give(offset + kept, size - kept)
        if not self._reclaiming and self._ranges.high > self._budget:
            # From here on memory that nobody uses is given back: there may be twice as much room
            # as memory. Up to here it is kept, for whoever comes next finds it at no cost.
            self._reclaiming = True
            for start, end in self._ranges.holes():
                self._store.forget(start, end - start)
        elif self._reclaiming:
            self._store.forget(offset + kept, round_up(size) - kept)

    def put(self, extent: Extent, slots: dict[int, Span]) -> None:
        """``slots`` now stand for these positions of ``extent``; what they stood for is gone."""
        for slot in slots:
            self._leave(slot)
        self._enter(extent, slots)

    def share(self, extent: Extent, slots: dict[int, Span]) -> None:
        """``slots`` too stand for positions of ``extent``, which is here already."""
        extent.slots.update(slots)  # first, or it might lose its last slot in between
        for slot in slots:
            if self._of_slot.get(slot) is extent:
                self._store.clear((slot,))
                self._names.pop(slot, None)
            else:
                self._leave(slot)
                self._of_slot[slot] = extent

    def replace(self, old: Extent, packed: Extent) -> None:
        """``packed`` holds all that slots stand for of ``old``, which is gone."""
        slots = dict(old.slots)
        for slot, (start, end) in slots.items():
            if slot in self._names:
                self._record(packed, slot, start, end)
        old.slots.clear()
        self._free(old)
        self._enter(packed, slots)

    def _enter(self, extent: Extent, slots: dict[int, Span]) -> None:
        extent.slots.update(slots)
        self._extents.add(extent)
        self.bytes += extent.length
        for slot in slots:
            self._of_slot[slot] = extent

    def commit(self, slot: int, name: PageName) -> None:
        """The page of ``slot`` is called ``name``: whoever comes later may find it."""
        extent = self._of_slot[slot]
        self._names[slot] = name
        self._record(extent, slot, *extent.slots[slot])

    def _record(self, extent: Extent, slot: int, start: int, end: int) -> None:
        self._store.commit(
            Record(
                slot=slot,
                name=self._names[slot],
                tokens=end - start,
                offset=extent.offset,
                length=extent.length,
                start=start,
                whole=extent.tokens,
                crc=extent.crc,
            )
        )

    def named(self) -> tuple[tuple[int, PageName], ...]:
        """Slots whose pages are there, oldest first."""
        return tuple(self._names.items())

    def at(self, slot: int) -> Extent | None:
        """The extent that ``slot`` points into."""
        return self._of_slot.get(slot)

    def wasteful(self) -> Extent | None:
        """The extent with the least use of its bytes, once all together exceed the budget; None
        where packing it would gain nothing, too."""
        if self.bytes <= self._budget:
            return None
        extent = min(self._extents, key=Extent.use)
        return extent if extent.use() < 1.0 else None

    def drop(self, slots: Sequence[int]) -> None:
        """Forget ``slots``."""
        for slot in slots:
            self._leave(slot)

    def close(self) -> None:
        """Forget where everything is; the pages stay in the store."""
        self._of_slot.clear()
        self._extents.clear()
        self._names.clear()
        self.bytes = 0
        self._store.close()

    def _leave(self, slot: int) -> None:
        extent = self._of_slot.pop(slot, None)
        if extent is None:
            return
        # Before its bytes can be anybody else's.
        self._store.clear((slot,))
        self._names.pop(slot, None)
        del extent.slots[slot]
        if not extent.slots:
            self._free(extent)

    def _free(self, extent: Extent) -> None:
        self._extents.remove(extent)
        self.bytes -= extent.length
        self.give(extent.offset, extent.length)

"""Pages of llama.cpp below the pool: saved and restored in extents, in RAM and on disk.

Through a temporary sequence id: copy the membership of a range to it (no cell is copied), save it,
drop it. They come back the same way. What concerns RAM is over when it was asked for. What concerns
the disk is done by its threads, but for saving and restoring, which llama.cpp's one thread does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvpager.types import Adopt, Load, Move, Page, PageName, Spill, Store, Tier
from pagedd_daemon.backends import llama_api as api
from pagedd_daemon.backends.base import TransferResult
from pagedd_daemon.engine.tiers.disk import Blob, Moved, filled
from pagedd_daemon.engine.tiers.extents import Extent, Extents, Span
from pagedd_daemon.engine.tiers.opening import Disk
from pagedd_daemon.engine.tiers.ram import Bytes, RamStore

_SAVE, _PACK = api.SEQUENCE_IDS - 1, api.SEQUENCE_IDS - 2
STATE_OVERHEAD = 1 << 20
"""Bytes of a saved extent beside its keys and values, at most."""


@dataclass(slots=True)
class _Coming:
    """A load from disk that has not landed."""

    load: Load
    length: int
    """Positions from here on are not wanted any more."""


class LlamaPages:
    """The tiers below one context."""

    def __init__(
        self,
        context: api.Context,
        ram: RamStore,
        ram_bytes: int,
        disk: Disk,
        *,
        block_tokens: int,
        block_bytes: int,
        extent_pages: int,
        source: Callable[[int], int | None],
        landed: Callable[[int, Sequence[Page]], None],
        target: Callable[[int], int],
    ) -> None:
        """Tiers without pages but those that an earlier engine left.

        Args:
            context: Whose cells are saved and restored.
            ram: Memory of the RAM tier.
            ram_bytes: Beyond it, extents in RAM are packed.
            disk: The disk tier, if there is one.
            block_tokens: Positions of a page.
            block_bytes: Bytes of keys and values of a page.
            extent_pages: Pages of an extent at most.
            source: The id of a sequence that holds cells, None if it holds none.
            landed: Told of each sequence and the pages that have been restored into it.
            target: The id of a sequence, given to it if it has none.
        """
        self._context = context
        self._ram = ram
        self._extents = Extents(ram, ram_bytes)
        self._disk = disk
        self._tokens = block_tokens
        self._page_bytes = block_bytes
        self._extent_pages = extent_pages
        self._source, self._landed, self._target = source, landed, target
        self._ended: list[TransferResult] = []
        self._coming: dict[int, _Coming] = {}
        self._begun: dict[int, float] = {}
        """Seconds that llama.cpp took for its part of transfers that wait for the disk."""
        self._twins: dict[Extent, Extent] = {}
        """Extents in RAM, with their copies on disk."""

    @property
    def ram_bytes(self) -> int:
        """Held in RAM now."""
        return self._extents.bytes

    # ----------------------------------------------------------------------------- what is asked

    def begin(self, transfer: Store | Load | Spill) -> None:
        """Carry a transfer out, or have the disk begin with it."""
        begin = time.perf_counter()
        if isinstance(transfer, Spill):
            self._spill(transfer)
            return
        disk = transfer.tier is Tier.DISK
        if isinstance(transfer, Load) and disk:
            assert self._disk.tier is not None
            self._coming[transfer.transfer] = _Coming(transfer, 1 << 62)
            self._disk.tier.get(transfer.transfer, (page.slot for page in transfer.pages))
            return
        if isinstance(transfer, Load):
            ok = self._load(transfer)
        else:
            ok = self._store_on_disk(transfer) if disk else self._store(transfer)
        seconds = time.perf_counter() - begin
        if disk and ok:
            self._begun[transfer.transfer] = seconds
        else:
            self._ended.append(TransferResult(transfer.transfer, ok, seconds))

    def trimmed(self, seq: int, length: int) -> None:
        """``seq`` gives up its positions from ``length`` on, those on their way included."""
        for coming in self._coming.values():
            if coming.load.seq == seq:
                coming.length = min(coming.length, length)

    def poll(self) -> list[TransferResult]:
        """Transfers that ended since the last call."""
        if self._disk.tier is not None:
            for moved in self._disk.tier.poll():
                self._moved(moved)
        ended, self._ended = self._ended, []
        return ended

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        in_ram = isinstance(transfer, Store) and transfer.tier is Tier.RAM
        for slot, name in zip(filled(transfer), names, strict=True):
            if name is None:
                continue
            if in_ram:
                self._extents.commit(slot, name)
            elif self._disk.tier is not None:
                self._disk.tier.commit(slot, name)

    def adoptable(self) -> list[Adopt]:
        """See `Backend`."""
        found = [Adopt(Tier.RAM, self._extents.named())]
        if self._disk.tier is not None:
            found.append(self._disk.tier.adoptable())
        return found

    def troubles(self) -> list[str]:
        """See `Backend`."""
        return self._disk.troubles()

    def counters(self) -> dict[str, int]:
        """Figures for ``stats``."""
        return self._disk.counters()

    def close(self) -> None:
        """Let go of RAM and disk."""
        self._extents.close()
        self._disk.close()

    # ------------------------------------------------------------------------------------- saving

    def _store(self, store: Store) -> bool:
        source = self._source(store.seq)
        if source is None:
            return False
        for group in self._neighbours(store.pages):
            spans = {page.slot: self._span(page) for page in group}
            start, end = self._span(group[0])[0], self._span(group[-1])[1]
            self._context.share(source, _SAVE, start, end)
            saved = self._save_in_ram(_SAVE, start, end, end - start)
            if saved is None:
                return False
            self._extents.put(saved, spans)
        while (extent := self._extents.wasteful()) is not None:
            self._pack(extent)
        return True

    def _store_on_disk(self, store: Store) -> bool:
        source = self._source(store.seq)
        if source is None or self._disk.tier is None:
            return False
        blobs: list[Blob] = []
        for group in self._neighbours(store.pages):
            spans = {page.slot: self._span(page) for page in group}
            start, end = self._span(group[0])[0], self._span(group[-1])[1]
            self._context.share(source, _SAVE, start, end)
            buffer = np.empty(self._most(end - start), np.uint8)
            size = self._save(_SAVE, start, end, buffer)
            if not size:
                return False
            blobs.append(Blob(buffer[:size], spans, end - start))
        self._disk.tier.put(store.transfer, blobs)
        return True

    def _most(self, tokens: int) -> int:
        """Bytes of a saved range of so many positions, at most."""
        return -(-tokens // self._tokens) * self._page_bytes + STATE_OVERHEAD

    def _save(self, identity: int, start: int, end: int, buffer: Bytes) -> int:
        """Save a temporary id, which must hold positions start to end - 1, and empty it.

        Returns:
            The bytes of ``buffer`` that it took; 0 where it failed.
        """
        whole = self._context.held(identity) == (start, end - 1)
        size = self._context.save(identity, buffer) if whole else 0
        self._context.remove(identity)
        return size

    def _save_in_ram(self, identity: int, start: int, end: int, tokens: int) -> Extent | None:
        """The same, into the RAM tier."""
        most = self._most(tokens)
        offset = self._extents.room(most)
        if offset < 0:
            self._context.remove(identity)
            return None
        size = self._save(identity, start, end, self._ram.part(offset, most))
        self._extents.give(offset, most, keep=size)
        return Extent(offset, size, tokens) if size else None

    def _pack(self, extent: Extent) -> None:
        """Save again what slots stand for of an extent, and let go of the rest."""
        spans = sorted(extent.slots.values())
        packed = None
        if self._context.restore(_SAVE, self._ram.part(extent.offset, extent.length)):
            for start, end in spans:
                self._context.share(_SAVE, _PACK, start, end)
            tokens = sum(end - start for start, end in spans)
            packed = self._save_in_ram(_PACK, spans[0][0], spans[-1][1], tokens)
        self._context.remove(_SAVE)
        assert packed is not None, "an extent that was saved cannot be restored"
        self._extents.replace(extent, packed)

    # ----------------------------------------------------------------------------------- spilling

    def _spill(self, spill: Spill) -> None:
        """Copy extents to disk whole: pages that are reclaimed next to each other lie so."""
        tier = self._disk.tier
        assert tier is not None
        groups: dict[Extent, list[Move]] = {}
        for move in spill.pages:
            extent = self._extents.at(move.source)
            if extent is None:
                self._ended.append(TransferResult(spill.transfer, ok=False))
                return
            groups.setdefault(extent, []).append(move)
        if len(groups) == 1:
            ((extent, moves),) = groups.items()
            twin = self._twins.get(extent)
            if twin is not None and twin.ready and twin.slots:
                tier.link(spill.transfer, twin, self._targets(extent, moves))
                return
        blobs = [
            Blob(
                # A copy: an extent in RAM may be packed, and its place be another's, meanwhile.
                self._ram.part(extent.offset, extent.length).copy(),
                self._targets(extent, moves),
                extent.tokens,
            )
            for extent, moves in groups.items()
        ]
        tier.put(spill.transfer, blobs)
        self._twins = {ram: disk for ram, disk in self._twins.items() if ram.slots and disk.slots}
        for extent, moves in groups.items():
            written = tier.at(moves[0].target)
            if written is not None:
                self._twins[extent] = written

    @staticmethod
    def _targets(extent: Extent, moves: Iterable[Move]) -> dict[int, Span]:
        return {move.target: extent.slots[move.source] for move in moves}

    # ---------------------------------------------------------------------------------- restoring

    def _load(self, load: Load) -> bool:
        mine = self._target(load.seq)
        groups: dict[Extent | None, list[Page]] = {}
        for page in load.pages:
            groups.setdefault(self._extents.at(page.slot), []).append(page)
        ok = all(
            extent is not None
            and self._restore(extent, self._ram.part(extent.offset, extent.length), pages, mine)
            for extent, pages in groups.items()
        )
        if ok:
            self._landed(load.seq, load.pages)
            return True
        for page in load.pages:
            self._context.remove(mine, *self._span(page))
        self._extents.drop([page.slot for page in load.pages])
        return False

    def _moved(self, moved: Moved) -> None:
        """The disk has done its part of a transfer."""
        seconds = moved.seconds + self._begun.pop(moved.transfer, 0.0)
        coming = self._coming.pop(moved.transfer, None)
        ok = moved.ok
        if coming is not None and ok:
            begin = time.perf_counter()
            ok = self._land(coming, moved)
            seconds += time.perf_counter() - begin
        self._ended.append(TransferResult(moved.transfer, ok, seconds))

    def _land(self, coming: _Coming, moved: Moved) -> bool:
        """Bring what has been read into the sequence that waits for it."""
        load = coming.load
        pages = [page for page in load.pages if self._span(page)[1] <= coming.length]
        tier = self._disk.tier
        assert tier is not None
        if not pages:
            return True
        mine = self._target(load.seq)
        for extent, data in moved.read:
            wanted = [page for page in pages if tier.at(page.slot) is extent]
            if wanted and not self._restore(extent, data, wanted, mine):
                for page in pages:
                    self._context.remove(mine, *self._span(page))
                return False
        self._landed(load.seq, pages)
        return True

    def _restore(self, extent: Extent, data: Bytes, pages: Sequence[Page], target: int) -> bool:
        """Bring pages of one extent back into ``target``."""
        if any(not _within(self._span(p), extent.slots[p.slot]) for p in pages):
            return False
        ok = self._context.restore(_SAVE, data)
        if ok:
            for start, end in _join(sorted(self._span(page) for page in pages)):
                self._context.share(_SAVE, target, start, end)
        self._context.remove(_SAVE)
        return ok

    # -------------------------------------------------------------------------------------- spans

    def _span(self, page: Page) -> Span:
        start = page.index * self._tokens
        return start, start + page.tokens

    def _neighbours(self, pages: Iterable[Page]) -> list[list[Page]]:
        """Pages in runs without a gap between their tokens, none longer than an extent."""
        groups: list[list[Page]] = []
        for page in sorted(pages, key=lambda p: p.index):
            last = groups[-1] if groups else []
            follows = last and self._span(last[-1])[1] == self._span(page)[0]
            if follows and len(last) < self._extent_pages:
                last.append(page)
            else:
                groups.append([page])
        return groups


def _within(inner: Span, outer: Span) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _join(spans: Iterable[Span]) -> list[Span]:
    """Sorted spans, those that touch made one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined

"""Keeping pages: what becomes cached, what is swapped, what is copied down before it is evicted."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TypeAlias

import numpy as np

from kvpager.cost import CostModel
from kvpager.pool import Pool
from kvpager.sequences import SequenceState, SequenceTable
from kvpager.tiers import Evict, LowerTier, Place
from kvpager.transfers import Transfers
from kvpager.types import Instruction, Move, Page, PreemptMode, Tier

_WRITE_BACK_SHARE = 16
_SPILL_SHARE = 4
_WRITE_BACK_MOST = 32
_WRITE_THROUGH_MOST = 32
"""Pages of one sequence at a time: 64 MB at 2 MB a page, 1 to 3 ms of a copy engine."""

Tails: TypeAlias = dict[tuple[int, int], Place]
"""By block and tokens: where partial pages have gone that siblings preempted together share."""


class Keeping:
    """Moves pages down the tiers."""

    def __init__(
        self, pool: Pool, seqs: SequenceTable, transfers: Transfers, cost: CostModel
    ) -> None:
        self._pool = pool
        self._keep_on_gpu = pool.config.keep_cached_on_gpu
        self._seqs = seqs
        self._transfers = transfers
        self._cost = cost
        self._size = pool.config.block_tokens

    # ------------------------------------------------------------------------ of one sequence

    def publish(self, state: SequenceState) -> int:
        """Register its full blocks where no other block stands for their pages; how many are full.

        A block may have stayed unregistered because another held the same page, and no longer does.
        Where pages live in the cells of sequences, a block that others hold too may be whole in
        this sequence alone (they were truncated): it cannot be shared from them.
        """
        full = int(self._seqs.computed[state.slot]) // self._size
        nodes = self._pool.index.find_all(state.chain, full)
        on_gpu = np.where(nodes >= 0, self._pool.index.wheres[Tier.GPU][nodes], -1)
        for index in np.flatnonzero(on_gpu < 0).tolist():
            block = int(state.table[index])
            if self._keep_on_gpu or self._pool.blocks.refcount[block] == 1:
                self._pool.register(block, *state.names(index))
        return full

    def cache(self, state: SequenceState, out: list[Instruction]) -> None:
        """Make cached pages of the full blocks: where they are, or below if they cannot stay."""
        full = self.publish(state)
        if self._keep_on_gpu:
            return
        pool, index = self._pool, self._pool.index
        nodes = index.find_all(state.chain, full).tolist()
        touched: list[Place] = []
        pages: dict[Tier, list[Page]] = defaultdict(list)
        missing: list[int] = []
        for i, node in enumerate(nodes):
            place = pool.below(node)
            if place is not None:
                # Pinned so that they age with the rest, and are not evicted to make room for it.
                place.tier.pin(place.slot)
                touched.append(place)
            elif node < 0 or (
                index.where[Tier.GPU][node] == state.table[i]
                and pool.blocks.refcount[state.table[i]] == 1
            ):
                missing.append(i)
        for i in missing:
            place = pool.take_below(state.owner, swap=False)
            if place is None:
                break  # pages behind a missing one would never be found
            self._name(state, i, nodes[i], place)
            page = Page(i, int(state.table[i]), place.slot, self._size)
            pages[place.tier.tier].append(page)
        for tier, stored in pages.items():
            self._transfers.begin_store(state.id, tier, stored, touched, out)
            touched = []
        for place in reversed(touched):
            place.tier.unpin(place.slot)

    def swap(
        self,
        state: SequenceState,
        full: int,
        mode: PreemptMode,
        tails: Tails,
        out: list[Instruction],
    ) -> bool:
        """Store what is not below yet and hold it all there; False, and nothing done, if not."""
        pool, index = self._pool, self._pool.index
        tail = int(self._seqs.computed[state.slot]) % self._size
        nodes = index.find_all(state.chain, full).tolist()
        places = [pool.below(node) for node in nodes]
        partial = int(state.table[full]) if tail else -1
        if tail:
            places.append(tails.get((partial, tail)))
        present = [place for place in places if place is not None]
        needed = len(places) - len(present)
        for place in present:
            place.tier.hold(place.slot)
        room = sum(tier.obtainable() for tier in pool.lower.values())
        if needed > room or not self._cheap(state, full, tail, needed, mode):
            for place in reversed(present):
                place.tier.unhold(place.slot)
            return False
        pages: dict[Tier, list[Page]] = defaultdict(list)
        held: list[Place] = []
        for i, known in enumerate(places):
            if known is not None:
                held.append(known)
                continue
            fresh = pool.take_below(state.owner, swap=True)
            assert fresh is not None
            fresh.tier.hold(fresh.slot)
            if i < full:
                self._name(state, i, nodes[i], fresh)
            else:
                tails[partial, tail] = fresh
            tokens = self._size if i < full else tail
            pages[fresh.tier.tier].append(Page(i, int(state.table[i]), fresh.slot, tokens))
            held.append(fresh)
        state.held = held
        for tier, stored in pages.items():
            self._transfers.begin_store(state.id, tier, stored, (), out)
        return True

    def discard(self, state: SequenceState) -> None:
        """Drop what only this sequence has computed and nobody else needs, from every tier."""
        pool, index = self._pool, self._pool.index
        full = int(self._seqs.computed[state.slot]) // self._size
        for node in index.find_all(state.chain, full)[state.found :][::-1].tolist():
            if node < 0:
                continue
            places = [(tier, index.where[tier.tier][node]) for tier in pool.lower.values()]
            block = index.where[Tier.GPU][node]
            for tier, slot in places:
                if slot >= 0:
                    tier.disown(slot)
            if block >= 0:
                pool.disown(block)

    def found_again(self, state: SequenceState, full: int) -> int:
        """Tokens at its front whose pages are resident in some tier now."""
        index = self._pool.index
        nodes = index.find_all(state.chain, full)
        resident = nodes >= 0
        if not self._keep_on_gpu:
            held = self._pool.blocks.refcounts[index.wheres[Tier.GPU][nodes]] > 0
            for tier in self._pool.lower.values():
                held |= index.wheres[tier.tier][nodes] >= 0
            resident &= held
        return int(np.argmin(resident) if not resident.all() else full) * self._size

    def let_go(self, state: SequenceState, keep: int = 0) -> None:
        """It needs its pages below no more, from page ``keep`` on."""
        for place in reversed(state.held[keep:]):
            place.tier.unhold(place.slot)
        del state.held[keep:]
        self._pool.shrink_caches()

    def _cheap(
        self, state: SequenceState, full: int, tail: int, needed: int, mode: PreemptMode
    ) -> bool:
        computed, to_store = full * self._size + tail, needed * self._size
        return mode is PreemptMode.SWAP or self._cost.swap_is_cheaper(
            computed, to_store, self.found_again(state, full)
        )

    def _name(self, state: SequenceState, index: int, node: int, place: Place) -> None:
        """The slot is being filled with page ``index`` of the sequence."""
        if node < 0:
            node = self._pool.index.add_after(*state.names(index))
        place.tier.name(place.slot, node)

    # -------------------------------------------------------------------------- in background

    def write_through(self, out: list[Instruction]) -> None:
        """Keep full blocks of running sequences in RAM too, as far as there is room.

        What it takes is what caching them would take at their end: never the swap reserve, and of
        cached pages only the place of some that no higher tier has.
        """
        seqs = self._seqs
        waiting, seqs.unsaved = seqs.unsaved, {}
        for state in waiting.values():
            if state.id in seqs.runnable and state.restore is None:
                self._write_through(state, out)

    def _write_through(self, state: SequenceState, out: list[Instruction]) -> None:
        ram, index = self._pool.ram, self._pool.index
        full = int(self._seqs.computed[state.slot]) // self._size
        first = min(state.saved, full)
        nodes = index.find_all(state.chain, full)[first:].tolist()
        pages: list[Page] = []
        for i, node in enumerate(nodes, first):
            if len(pages) == _WRITE_THROUGH_MOST:
                self._seqs.unsaved[state.id] = state
                break
            if self._pool.below(node) is None:
                slot = ram.take(swap=False, evict=Evict.OLD, owner=state.owner)
                if slot < 0:
                    break  # pages behind a missing one would never be found
                self._name(state, i, node, Place(ram, slot))
                pages.append(Page(i, int(state.table[i]), slot, self._size))
            state.saved = i + 1
        if pages:
            self._transfers.begin_store(state.id, Tier.RAM, pages, (), out, through=True)

    def write_back(self, out: list[Instruction]) -> None:
        """Keep what is evicted next in the tier below too, so that evicting it loses nothing."""
        pool = self._pool
        if pool.config.disk_persists:
            self._save(out)
        if self._keep_on_gpu and pool.blocks.cached.count:
            depth = -(-pool.blocks.limit // _WRITE_BACK_SHARE)
            if len(pool.blocks.free) < depth and not self._transfers.writing_back:
                self._write_back_blocks(depth, out)
        if pool.disk.total and pool.ram.cached.count:
            # A finished conversation comes down at once, so there must be room for a whole one.
            depth = -(-pool.ram.total // _SPILL_SHARE)
            if len(pool.ram.free) < depth and not self._transfers.spilling:
                self._spill(depth, out)

    def _save(self, out: list[Instruction]) -> None:
        """Copy to a disk that persists what has been cached since."""
        pool = self._pool
        on_disk = pool.index.where[Tier.DISK]
        if pool.fresh_blocks and not self._transfers.writing_back:
            pages: list[Page] = []
            for block in _take(pool.fresh_blocks, _WRITE_BACK_MOST):
                node = pool.blocks.node[block]
                # A page that has a slot of RAM too is saved from there.
                if block not in pool.blocks.cached or pool.below(node) is not None:
                    continue
                slot = pool.disk.take(swap=False, evict=Evict.OLD, owner=pool.index.owner(node))
                if slot < 0:
                    break
                pool.disk.name(slot, node)
                pool.begin_write_back(block)
                pages.append(Page(0, block, slot, self._size))
            if pages:
                self._transfers.begin_store(-1, Tier.DISK, pages, (), out, back=False)
        if pool.fresh_slots and not self._transfers.spilling:
            moves: list[Move] = []
            for source in _take(pool.fresh_slots, _WRITE_BACK_MOST):
                node = pool.ram.node[source]
                if node < 0 or not pool.ram.ready(source) or on_disk[node] >= 0:
                    continue
                target = pool.disk.take(swap=False, evict=Evict.OLD, owner=pool.index.owner(node))
                if target < 0:
                    break
                pool.disk.name(target, node)
                pool.ram.pin(source)
                moves.append(Move(source, target, self._size))
            if moves:
                self._transfers.begin_spill(moves, out, back=False)

    def _write_back_blocks(self, depth: int, out: list[Instruction]) -> None:
        pool = self._pool
        pages: dict[Tier, list[Page]] = defaultdict(list)
        for block in pool.dirty_blocks(depth, _WRITE_BACK_MOST):
            node = pool.blocks.node[block]
            place = pool.take_below(pool.index.owner(node), swap=False, background=True)
            if place is None:
                break
            place.tier.name(place.slot, node)
            pool.begin_write_back(block)
            pages[place.tier.tier].append(Page(0, block, place.slot, self._size))
        for tier, stored in pages.items():
            self._transfers.begin_store(-1, tier, stored, (), out)

    def _spill(self, depth: int, out: list[Instruction]) -> None:
        ram, disk = self._pool.ram, self._pool.disk
        on_disk = self._pool.index.where[Tier.DISK]
        moves: list[Move] = []
        for source in _first(ram, depth):
            node = ram.node[source]
            if on_disk[node] >= 0:
                continue
            if len(moves) == _WRITE_BACK_MOST:
                break
            owner = self._pool.index.owner(node)
            target = disk.take(swap=False, evict=Evict.OLD, owner=owner)
            if target < 0:
                break
            disk.name(target, node)
            ram.pin(source)
            moves.append(Move(source, target, self._size))
        if moves:
            self._transfers.begin_spill(moves, out)


def _take(waiting: deque[int], most: int) -> list[int]:
    """Up to so many of those who wait, each once."""
    taken: dict[int, None] = {}
    while waiting and len(taken) < most:
        taken[waiting.popleft()] = None
    return list(taken)


def _first(tier: LowerTier, depth: int) -> list[int]:
    """The slots that are reclaimed next."""
    return [slot for slot, _ in zip(tier.cached, range(depth), strict=False)]

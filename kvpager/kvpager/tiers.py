"""A lower tier (RAM or disk): slots that hold pages, held by swapped sequences or merely cached."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from enum import Enum, IntEnum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpager.blocks import LruList, zeros
from kvpager.figures import CellState, TierMap
from kvpager.owners import ByOwner
from kvpager.prefix import PageIndex
from kvpager.types import Tier, TierUsage


class SlotState(IntEnum):
    """The life of a slot."""

    FREE = 0
    FILLING = 1
    """A store writes it."""
    READY = 2
    DOOMED = 3
    """Its content is not to be trusted, but a transfer still names it."""


_LOWER = (Tier.RAM, Tier.DISK)
_FREE = int(SlotState.FREE)
_FILLING = int(SlotState.FILLING)
_READY = int(SlotState.READY)
_DOOMED = int(SlotState.DOOMED)


class Evict(Enum):
    """What may be evicted to make room in a lower tier."""

    COPIES = auto()
    """Pages that another lower tier has too."""
    OLD = auto()
    """Pages that no higher tier has; a higher tier would copy those down again, for ever."""
    ANY = auto()


class Place(NamedTuple):
    """A slot of a lower tier."""

    tier: LowerTier
    slot: int


class LowerTier:
    """Slots of one tier.

    A slot is *held* by swapped-out sequences that need it to resume, and *pinned* by transfers in
    flight. A page that is neither is cached: reclaimed leaf first, least recently used first. An
    overwritten slot needs no instruction.

    On disk, room for a page is taken from the owner who has most pages there, so that nobody can
    push out those of another: who has no more than an equal part keeps it, whatever others store.
    With one owner this is the order in which all were used.
    """

    def __init__(self, tier: Tier, total: int, swap_reserve: float, index: PageIndex) -> None:
        self.tier = tier
        self.total = total
        self.cache_limit = total - math.ceil(total * swap_reserve)
        """Slots that cached pages may take, so that caching never starves swapping."""
        self._index = index
        self.state = zeros("b", total, _FREE)
        self.holds = zeros("i", total)
        self.pins = zeros("h", total)
        self.node = zeros("i", total, -1)
        """The page in the slot; -1 while free, or for the partial tail of a swapped sequence."""
        self.cached = LruList(total)
        self._owners = ByOwner(total) if tier is Tier.DISK else None
        self.free = array("i", range(total - 1, -1, -1))
        self.held = 0
        """Slots that at least one sequence holds."""
        self.states: npt.NDArray[np.int8] = np.frombuffer(self.state, dtype=np.int8)
        self._all_holds: npt.NDArray[np.int32] = np.frombuffer(self.holds, dtype=np.int32)
        self._all_pins: npt.NDArray[np.int16] = np.frombuffer(self.pins, dtype=np.int16)

    @property
    def nbytes(self) -> int:
        """Bytes of bookkeeping."""
        arrays = (self.state, self.holds, self.pins, self.node, self.free)
        orders = self.cached.nbytes * (1 if self._owners is None else 2)
        return sum(item.itemsize for item in arrays) * self.total + orders

    def usage(self) -> TierUsage:
        """Slots held or in transfer, cached, and free."""
        cached, free = self.cached.count, len(self.free)
        return TierUsage(self.total, self.total - cached - free, cached, free)

    def cells(self) -> npt.NDArray[np.uint8]:
        """What each slot is doing, in the cells of `TierMap`, but for its owner."""
        total = self.total
        states, holds, pins = self.states[:total], self._all_holds[:total], self._all_pins[:total]
        cells = np.full(total, CellState.CACHED, dtype=np.uint8)
        cells[pins > 0] = CellState.STORING
        cells[holds > 0] = CellState.HELD
        cells[states == _FILLING] = CellState.LOADING
        cells[states == _DOOMED] = CellState.DYING
        cells[states == _FREE] = CellState.FREE
        cells[holds > 1] |= TierMap.SHARED
        return cells

    def owned(self) -> dict[int, int]:
        """Pages that no sequence holds by owner, where they are told apart."""
        return {} if self._owners is None else dict(self._owners.counts)

    def ready(self, slot: int) -> bool:
        """Whether the slot's page can be loaded."""
        return self.state[slot] == _READY

    def obtainable(self) -> int:
        """Slots that swapping could take at once."""
        return len(self.free) + self.cached.count

    def take(self, *, swap: bool, evict: Evict, owner: int) -> int:
        """A slot to fill, pinned once for the store that fills it; -1 if there is no room.

        Args:
            swap: Take the swap reserve too.
            evict: What may be evicted for it.
            owner: Whose page is to fill it.
        """
        unheld = self.total - len(self.free) - self.held
        if not (self.free and (swap or unheld < self.cache_limit)):
            if not self.cached.count or (not swap and not self.cache_limit):
                return -1
            victim = self._next_victim(owner)
            if not self._may(evict, self.node[victim]):
                return -1
            self._evict(victim)
        slot = self.free.pop()
        self.state[slot] = _FILLING
        self.pins[slot] = 1
        return slot

    def name(self, slot: int, node: int) -> None:
        """The slot being filled will hold the page ``node``."""
        self.node[slot] = node
        self._index.place(node, self.tier, slot)
        if not self.holds[slot]:
            self._count(slot, 1)

    def adopt(self, slots: Sequence[int]) -> None:
        """These slots, which are free, are ready and named; the first is reclaimed first."""
        taken = set(slots)
        self.free = array("i", [slot for slot in self.free if slot not in taken])
        for slot in slots:
            self.state[slot] = _READY
            self._enter_cache(slot)
        self.shrink_cache()

    def hold(self, slot: int) -> None:
        """One more swapped sequence needs the slot."""
        self._leave_cache(slot)
        self.holds[slot] += 1
        if self.holds[slot] == 1:
            self.held += 1
            self._count(slot, -1)

    def unhold(self, slot: int) -> None:
        """One swapped sequence less needs the slot."""
        self.holds[slot] -= 1
        if not self.holds[slot]:
            self.held -= 1
            self._count(slot, 1)
        self._settle(slot)

    def pin(self, slot: int) -> None:
        """One more transfer names the slot."""
        self._leave_cache(slot)
        self.pins[slot] += 1

    def pin_all(self, slots: npt.NDArray[np.int32]) -> None:
        """`pin` for many distinct slots at once."""
        idle = (self._all_holds[slots] == 0) & (self._all_pins[slots] == 0)
        for slot in slots[idle].tolist():
            self._leave_cache(slot)
        self._all_pins[slots] += 1

    def unpin(self, slot: int, *, back: bool = False) -> None:
        """One transfer less names the slot; with ``back`` it is as old as before that transfer."""
        self.pins[slot] -= 1
        self._settle(slot, back=back)

    def filled(self, slot: int) -> None:
        """The store into the slot has ended well."""
        if self.state[slot] == _FILLING:
            self.state[slot] = _READY
        self.unpin(slot)

    def spoil(self, slot: int) -> None:
        """A transfer of the slot has failed: forget its content. Nobody holds it any more."""
        assert not self.holds[slot]
        if self.node[slot] >= 0:
            self._drop(slot)
        # Other loads may still be reading it; it is free when the last of them has ended.
        self.state[slot] = _DOOMED
        self.unpin(slot)

    def disown(self, slot: int) -> None:
        """The slot's page is not to be found any more, though a store may still be filling it."""
        if slot in self.cached:
            self._evict(slot)
        elif self.state[slot] == _FILLING and not self.holds[slot]:
            self._drop(slot)

    def shrink_cache(self) -> None:
        """Evict what exceeds the cache's share, once swapped pages have become cached ones."""
        while self.cached.count and self.total - len(self.free) - self.held > self.cache_limit:
            self._evict(self._next_victim())

    def _settle(self, slot: int, *, back: bool = False) -> None:
        """Where a slot goes that may have lost its last user."""
        if self.holds[slot] or self.pins[slot]:
            return
        if self.state[slot] == _READY and self.node[slot] >= 0:
            self._enter_cache(slot, back=back)
            return
        self.state[slot] = _FREE
        self.free.append(slot)

    def _enter_cache(self, slot: int, *, back: bool = False) -> None:
        if back:
            self.cached.put_back(slot)
        else:
            self.cached.push_newest(slot)
        if self._owners is not None:
            order = self._owners.cached(self._index.owner(self.node[slot]))
            if back:
                order.put_back(slot)
            else:
                order.push_newest(slot)

    def _leave_cache(self, slot: int) -> None:
        if slot in self.cached:
            self.cached.remove(slot)
            if self._owners is not None:
                self._owners.cached(self._index.owner(self.node[slot])).remove(slot)

    def _count(self, slot: int, more: int) -> None:
        if self._owners is not None and self.node[slot] >= 0:
            self._owners.count(self._index.owner(self.node[slot]), more)

    def _drop(self, slot: int) -> None:
        """The page of a slot that nobody holds is not here any more."""
        self._count(slot, -1)
        self._index.drop(self.node[slot], self.tier)
        self.node[slot] = -1

    def _may(self, evict: Evict, node: int) -> bool:
        where = self._index.where
        if evict is Evict.COPIES:
            return any(where[tier][node] >= 0 for tier in _LOWER if tier != self.tier)
        if evict is Evict.OLD:
            return all(where[tier][node] < 0 for tier in Tier if tier < self.tier)
        return True

    def _next_victim(self, asking: int = -1) -> int:
        """The least recently used cached page that no other page here continues, of the owner
        whose turn it is when ``asking`` has a page more (-1: nobody has)."""
        children = self._index.children[self.tier]
        order = self.cached if self._owners is None else self._owners.giver(asking)
        slot = order.oldest()
        for _ in range(order.count):
            if not children[self.node[slot]]:
                break
            # A page that others continue is as recent as they are: to the other end with it.
            self._leave_cache(slot)
            self._enter_cache(slot)
            slot = order.oldest()
        return slot

    def _evict(self, slot: int) -> None:
        self._leave_cache(slot)
        self._drop(slot)
        self.state[slot] = _FREE
        self.free.append(slot)

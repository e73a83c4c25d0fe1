"""Transfers between the tiers: begun here, ended here, in any order, well or badly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvpager.blocks import ACTIVE
from kvpager.errors import ImpossibleEventError
from kvpager.pool import Pool
from kvpager.sequences import SequenceState, SequenceTable, Status
from kvpager.tiers import Place
from kvpager.types import (
    Attach,
    Instruction,
    Load,
    Move,
    Page,
    Runnable,
    Spill,
    Store,
    Tier,
    Trim,
)


@dataclass(slots=True)
class Transfer:
    """A transfer in flight."""

    instruction: Store | Load | Spill
    touched: tuple[Place, ...] = ()
    """Store: pages of the same prefix that were there already, pinned so that they age with it."""
    back: bool = True
    """Whether what nobody asked for is as old as before when it has been copied."""
    waiters: dict[int, SequenceState] = field(default_factory=dict)
    """Load: sequences that cannot run before it has ended."""


class Transfers:
    """All transfers in flight."""

    def __init__(self, pool: Pool, seqs: SequenceTable) -> None:
        self._pool = pool
        self._seqs = seqs
        self.live: dict[int, Transfer] = {}
        self.writing_back = 0
        """Stores in flight that no sequence asked for."""
        self.spilling = 0
        self.stored_pages = 0
        self.loaded_pages = 0
        self._next = 0

    # --------------------------------------------------------------------------- beginning

    def begin_store(
        self,
        seq: int,
        tier: Tier,
        pages: Sequence[Page],
        touched: Sequence[Place],
        out: list[Instruction],
        *,
        through: bool = False,
        back: bool = True,
    ) -> None:
        """Store ``pages``, whose slots of ``tier`` the caller has taken and named."""
        store = Store(self._number(), seq, tier, tuple(pages), through)
        for page in pages:
            self._pool.pin(page.block)
        self.live[store.transfer] = Transfer(store, tuple(touched), back)
        self.writing_back += seq < 0
        out.append(store)

    def begin_spill(
        self, moves: Sequence[Move], out: list[Instruction], *, back: bool = True
    ) -> None:
        """Copy pages from RAM to disk; the caller has pinned the one and named the other slots."""
        spill = Spill(self._number(), Tier.RAM, Tier.DISK, tuple(moves))
        self.live[spill.transfer] = Transfer(spill, back=back)
        self.spilling += 1
        out.append(spill)

    def begin_load(
        self, state: SequenceState, tier: Tier, pages: Sequence[Page], out: list[Instruction]
    ) -> None:
        """Load ``pages`` into blocks of ``state``, which the caller has taken and registered."""
        load = Load(self._number(), state.id, tier, tuple(pages))
        blocks = np.array([page.block for page in pages], dtype=np.int32)
        slots = np.array([page.slot for page in pages], dtype=np.int32)
        self._pool.begin_loading(blocks, load.transfer)
        self._pool.lower[tier].pin_all(slots)
        self.live[load.transfer] = Transfer(load)
        self.wait(state, load.transfer, None)
        out.append(load)

    def wait(self, state: SequenceState, transfer: int, attach: Attach | None) -> None:
        """``state`` may not run before ``transfer`` has ended; ``attach`` is due then."""
        self.live[transfer].waiters[state.id] = state
        due = state.loads.setdefault(transfer, [])
        if attach is not None:
            due.append(attach)

    # ------------------------------------------------------------------------------ ending

    def check(self, transfer: int) -> None:
        """Raise unless the transfer is in flight.

        Raises:
            ImpossibleEventError: It is not.
        """
        if transfer not in self.live:
            raise ImpossibleEventError(f"transfer {transfer} is not in flight")

    def done(self, transfer: int, out: list[Instruction]) -> None:
        """A transfer has ended well."""
        record = self.live.pop(transfer)
        instruction = record.instruction
        if isinstance(instruction, Store):
            self._store_done(record, instruction)
        elif isinstance(instruction, Load):
            self._load_done(record, instruction, out)
        else:
            self._spill_ended(record, instruction, ok=True)

    def failed(self, transfer: int, out: list[Instruction]) -> None:
        """A transfer has not happened: what it names in the lower tier is dropped."""
        record = self.live.pop(transfer)
        instruction = record.instruction
        if isinstance(instruction, Spill):
            self._spill_ended(record, instruction, ok=False)
            return
        tier = self._pool.lower[instruction.tier]
        for page in instruction.pages:
            self._cut_swapped(Place(tier, page.slot))
            tier.spoil(page.slot)
        if isinstance(instruction, Store):
            for place in record.touched:
                place.tier.unpin(place.slot)
            self._let_go(record, instruction, failed=True)
        else:
            self._load_failed(record, instruction, out)

    def _store_done(self, record: Transfer, store: Store) -> None:
        tier = self._pool.lower[store.tier]
        filled = [Place(tier, page.slot) for page in store.pages]
        # Last page first, so that a prefix is reclaimed from its end.
        for place in filled if store.seq < 0 else reversed(filled):
            tier.filled(place.slot)
        for place in reversed(record.touched):
            place.tier.unpin(place.slot)
        self._pool.shrink_caches()
        self.stored_pages += len(filled)
        self._let_go(record, store, failed=False)
        if store.tier is Tier.RAM and self._pool.config.disk_persists:
            self._pool.fresh_slots.extend(place.slot for place in filled)

    def _spill_ended(self, record: Transfer, spill: Spill, *, ok: bool) -> None:
        """The copies on disk are good, or were never made; those in RAM are what they were."""
        self.spilling -= 1
        ram, disk = self._pool.lower[spill.source], self._pool.lower[spill.target]
        for move in spill.pages:
            if ok:
                disk.filled(move.target)
            else:
                self._cut_swapped(Place(disk, move.target))
                disk.spoil(move.target)
        for move in spill.pages:
            # As old as before; after a failure not, or it would be tried for ever.
            ram.unpin(move.source, back=ok and record.back)
        self._pool.shrink_caches()

    def _let_go(self, record: Transfer, store: Store, *, failed: bool) -> None:
        """The blocks of an ended store; those of a write-back are as old as before: in front of
        those that were copied before them, a page would seem to be older than what it continues."""
        # After a failure they are the newest, or the same store would be tried for ever.
        self.writing_back -= store.seq < 0
        if store.seq < 0 and not failed and record.back:
            for page in store.pages:
                self._pool.unpin(page.block, back=True)
            return
        for page in reversed(store.pages):
            self._pool.unpin(page.block)

    def _load_done(self, record: Transfer, load: Load, out: list[Instruction]) -> None:
        pool = self._pool
        for page in reversed(load.pages):
            self._landed(page)
            pool.lower[load.tier].unpin(page.slot)
        pool.shrink_caches()
        self.loaded_pages += len(load.pages)
        for state in record.waiters.values():
            out.extend(state.loads.pop(load.transfer))
        self._trim_overrun(record, load, out)
        self._wake(record, out)

    def _trim_overrun(self, record: Transfer, load: Load, out: list[Instruction]) -> None:
        """Another load of the loader failed meanwhile, in front of what has arrived now."""
        state = record.waiters.get(load.seq)
        if state is None or state.restore is not None:
            return
        computed = int(self._seqs.computed[state.slot])
        last = load.pages[-1]
        if last.index * self._seqs.block_tokens + last.tokens > computed:
            out.append(Trim(state.id, computed))

    def _landed(self, page: Page) -> None:
        """A block is no longer being loaded."""
        pool = self._pool
        del pool.loading[page.block]
        pool.blocks.state[page.block] = ACTIVE
        pool.unpin(page.block)

    def _load_failed(self, record: Transfer, load: Load, out: list[Instruction]) -> None:
        pool = self._pool
        missing = {page.block for page in load.pages}
        for page in load.pages:
            pool.forget(page.block)
        for state in record.waiters.values():
            due = state.loads.pop(load.transfer)
            if state.restore is not None:
                continue  # it computes what is missing where it is
            table = state.blocks_held.tolist()
            first = next((i for i, block in enumerate(table) if block in missing), len(table))
            self._cut_running(state, first, due, out)
        for page in load.pages:
            self._landed(page)
        for state in record.waiters.values():
            if state.restore is None:
                self._refill(state)
        self._wake(record, out)

    def _wake(self, record: Transfer, out: list[Instruction]) -> None:
        """Those whose last load this was may run, unless they are about to end."""
        for state in record.waiters.values():
            if state.loads or state.status is not Status.LOADING or state.restore is not None:
                continue
            state.status = Status.RUNNING
            if state.pending is None:
                self._seqs.runnable[state.id] = state.slot
                computed = int(self._seqs.computed[state.slot])
                self._seqs.tell(state, f"loaded, computed {computed}")
                out.append(Runnable(state.id, computed))

    # ----------------------------------------------------------------------------- cutting

    def _cut_running(
        self, state: SequenceState, first: int, due: list[Attach], out: list[Instruction]
    ) -> None:
        """Logical blocks from ``first`` on of a loading sequence are not what they should be."""
        seqs, tokens = self._seqs, self._seqs.block_tokens
        for attach in due:
            out.extend(_clip(attach, first, tokens))
        for transfer, others in state.loads.items():
            state.loads[transfer] = [kept for item in others for kept in _clip(item, first, tokens)]
        lost = state.blocks_held[first:].copy()
        state.blocks = first
        self._pool.release(lost, state.space)
        computed = min(int(seqs.computed[state.slot]), first * tokens)
        seqs.computed[state.slot] = seqs.length[state.slot] = computed
        if computed < state.known_tokens:
            seqs.prefilling[state.id] = state
        seqs.place_cursor(state)
        seqs.tell(state, f"load failed, computed {computed}")
        out.append(Trim(state.id, computed))

    def _refill(self, state: SequenceState) -> None:
        """Give a cut sequence the blocks of its known tokens again, as far as there are any."""
        tokens = self._seqs.block_tokens
        wanted = -(-state.known_tokens // tokens) - state.blocks
        wanted = max(0, min(wanted, self._pool.available(state.space)))
        state.extend_table(self._pool.take(wanted, state.space))
        self._seqs.place_cursor(state)

    def _cut_swapped(self, lost: Place) -> None:
        """Swapped sequences that need a page resume with what lies in front of it."""
        for state in self._seqs.swapped.values():
            if lost in state.held:
                at = state.held.index(lost)
                for place in reversed(state.held[at:]):
                    place.tier.unhold(place.slot)
                del state.held[at:]
                self._pool.shrink_caches()
                self._seqs.tell(state, f"page {at} was lost in a transfer")
        for state in self._seqs.restoring.values():
            for index in [i for i, place in state.sources.items() if place == lost]:
                del state.sources[index]
                lost.tier.unhold(lost.slot)

    def _number(self) -> int:
        self._next += 1
        return self._next


def _clip(attach: Attach, blocks: int, block_tokens: int) -> list[Attach]:
    """The part of ``attach`` in front of logical block ``blocks``; nothing if there is none."""
    kept = attach.blocks[: max(0, blocks - attach.first)]
    if not kept:
        return []
    return [Attach(attach.seq, attach.first, kept, min(attach.tokens, len(kept) * block_tokens))]

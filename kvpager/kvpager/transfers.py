"""Transfers between the tiers: begun here, ended here, in any order, well or badly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpager.blocks import ACTIVE, LOADING
from kvpager.errors import ImpossibleEventError
from kvpager.pool import Pool
from kvpager.sequences import SequenceState, SequenceTable, Status
from kvpager.types import Attach, Instruction, Load, Page, Runnable, Store, Tier, Trim


@dataclass(slots=True)
class Transfer:
    """A transfer in flight."""

    instruction: Store | Load
    touched: tuple[int, ...] = ()
    """Store: slots of the same prefix that were there already, pinned so that they age with it."""
    waiters: dict[int, SequenceState] = field(default_factory=dict)
    """Load: sequences that cannot run before it has ended."""


class Transfers:
    """All transfers in flight."""

    def __init__(self, pool: Pool, seqs: SequenceTable) -> None:
        self._pool = pool
        self._seqs = seqs
        self.live: dict[int, Transfer] = {}
        self.stored_pages = 0
        self.loaded_pages = 0
        self._next = 0

    # --------------------------------------------------------------------------- beginning

    def begin_store(
        self, seq: int, pages: Sequence[Page], touched: Sequence[int], out: list[Instruction]
    ) -> None:
        """Store ``pages``, whose slots the caller has taken from RAM and named."""
        store = Store(self._number(), seq, Tier.RAM, tuple(pages))
        for page in pages:
            self._pool.pin(page.block)
        self.live[store.transfer] = Transfer(store, tuple(touched))
        out.append(store)

    def begin_load(
        self, state: SequenceState, pages: Sequence[Page], out: list[Instruction]
    ) -> None:
        """Load ``pages`` into blocks of ``state``, which the caller has taken and registered."""
        load = Load(self._number(), state.id, Tier.RAM, tuple(pages))
        for page in pages:
            self._pool.pin(page.block)
            self._pool.blocks.state[page.block] = LOADING
            self._pool.loading[page.block] = load.transfer
            self._pool.ram.pin(page.slot)
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
        if isinstance(record.instruction, Store):
            self._store_done(record, record.instruction)
        else:
            self._load_done(record, record.instruction, out)

    def failed(self, transfer: int, out: list[Instruction]) -> None:
        """A transfer has not happened: what it names in the lower tier is dropped."""
        record = self.live.pop(transfer)
        ram = self._pool.ram
        for page in record.instruction.pages:
            self._cut_swapped(page.slot)
            ram.spoil(page.slot)
        if isinstance(record.instruction, Store):
            for slot in record.touched:
                ram.unpin(slot)
            self._let_go(record.instruction, failed=True)
        else:
            self._load_failed(record, record.instruction, out)

    def _store_done(self, record: Transfer, store: Store) -> None:
        ram = self._pool.ram
        # Last page first, so that a prefix is reclaimed from its end.
        slots = [page.slot for page in store.pages]
        ordered = list(record.touched) + slots if store.seq >= 0 else slots[::-1]
        filled = set(slots)
        for slot in reversed(ordered):
            if slot in filled:
                ram.filled(slot)
            else:
                ram.unpin(slot)
        ram.shrink_cache()
        self.stored_pages += len(slots)
        self._let_go(store, failed=False)

    def _let_go(self, store: Store, *, failed: bool) -> None:
        """The blocks of an ended store; those of a write-back return to the end they came from."""
        # After a failure they go to the other end, or the same store would be tried for ever.
        oldest = store.seq < 0 and not failed
        for page in reversed(store.pages):
            self._pool.unpin(page.block, oldest=oldest)

    def _load_done(self, record: Transfer, load: Load, out: list[Instruction]) -> None:
        pool = self._pool
        for page in reversed(load.pages):
            self._landed(page)
            pool.ram.unpin(page.slot)
        pool.ram.shrink_cache()
        self.loaded_pages += len(load.pages)
        for state in record.waiters.values():
            out.extend(state.loads.pop(load.transfer))
        self._wake(record, out)

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
            table = state.blocks_held.tolist()
            first = next((i for i, block in enumerate(table) if block in missing), len(table))
            self._cut_running(state, first, due, out)
        for page in load.pages:
            self._landed(page)
        for state in record.waiters.values():
            self._refill(state)
        self._wake(record, out)

    def _wake(self, record: Transfer, out: list[Instruction]) -> None:
        """Those whose last load this was may run, unless they are about to end."""
        for state in record.waiters.values():
            if state.loads or state.status is not Status.LOADING:
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

    def _cut_swapped(self, slot: int) -> None:
        """Swapped sequences that need ``slot`` resume with what lies in front of it."""
        ram = self._pool.ram
        for state in self._seqs.swapped.values():
            if slot in state.held:
                at = state.held.index(slot)
                for held in reversed(state.held[at:]):
                    ram.unhold(held)
                del state.held[at:]
                ram.shrink_cache()
                self._seqs.tell(state, f"page {at} was lost in a transfer")

    def _number(self) -> int:
        self._next += 1
        return self._next


def _clip(attach: Attach, blocks: int, block_tokens: int) -> list[Attach]:
    """The part of ``attach`` in front of logical block ``blocks``; nothing if there is none."""
    kept = attach.blocks[: max(0, blocks - attach.first)]
    if not kept:
        return []
    return [Attach(attach.seq, attach.first, kept, min(attach.tokens, len(kept) * block_tokens))]

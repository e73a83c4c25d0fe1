"""Fork, truncate, free, preempt: how sequences multiply, shrink, leave, and step aside."""

from __future__ import annotations

import numpy as np

from kvpager.cost import CostModel
from kvpager.pool import Pool
from kvpager.prefix import DIGEST
from kvpager.sequences import SequenceState, SequenceTable, Status
from kvpager.transfers import Transfers
from kvpager.types import (
    Attach,
    Fork,
    Free,
    Instruction,
    Page,
    Preempt,
    Preempted,
    PreemptMode,
    Release,
    Tier,
    Trim,
    Truncate,
)


class Endings:
    """What gives blocks back, and what shares them with children."""

    def __init__(
        self, pool: Pool, seqs: SequenceTable, transfers: Transfers, cost: CostModel
    ) -> None:
        self._pool = pool
        self._config = pool.config
        self._seqs = seqs
        self._transfers = transfers
        self._cost = cost
        self._size = pool.config.block_tokens
        self.preemptions = dict.fromkeys((PreemptMode.SWAP, PreemptMode.RECOMPUTE), 0)

    # ---------------------------------------------------------------------------------- fork

    def fork(self, event: Fork, out: list[Instruction]) -> None:
        """Children share every block of the parent's computed tokens, the partial one included."""
        seqs = self._seqs
        parent = seqs.get(event.parent, "Fork")
        if event.parent not in seqs.runnable or seqs.in_flight[parent.slot]:
            raise seqs.impossible(
                event.parent, "Fork needs a running sequence without a step in flight"
            )
        if len(set(event.children)) != len(event.children):
            raise seqs.impossible(event.parent, f"Fork names a child twice: {event.children}")
        for child in event.children:
            if child in seqs.by_id:
                raise seqs.impossible(child, "Fork makes a child that exists already")
        allotted = min(len(event.children), parent.ids - 1)
        extra = len(event.children) - allotted
        limit = self._config.max_sequences
        if limit and seqs.ids_used + extra > limit:
            raise seqs.impossible(
                event.parent,
                f"Fork needs {extra} more sequence ids, {limit - seqs.ids_used} are free",
            )
        parent.ids -= allotted
        seqs.ids_used += extra
        computed = int(seqs.computed[parent.slot])
        shared = parent.blocks_held[: -(-computed // self._size)].copy()
        for seq in event.children:
            self._add_child(parent, seq, computed, shared.tolist(), out)
            self._pool.share(shared, parent.space)
        seqs.tell(parent, f"forked at {computed} into {event.children}")

    def _add_child(
        self,
        parent: SequenceState,
        seq: int,
        computed: int,
        shared: list[int],
        out: list[Instruction],
    ) -> None:
        seqs = self._seqs
        child = seqs.create(seq, parent.root, parent.klass, parent.group)
        full = computed // self._size
        child.chain = parent.chain[: full * DIGEST]
        child.learn(0, parent.known[: full * self._size])
        child.found = min(parent.found, full)
        child.extend_table(shared)
        seqs.computed[child.slot] = seqs.length[child.slot] = seqs.promised[child.slot] = computed
        seqs.tails[child.slot] = seqs.tails[parent.slot]
        seqs.place_cursor(child)
        seqs.runnable[seq] = child.slot
        seqs.tell(child, f"forked from {parent.id} at {computed}")
        out.append(Attach(seq, 0, tuple(shared), computed))

    # ------------------------------------------------------------------------------ truncate

    def truncate(self, event: Truncate, out: list[Instruction]) -> None:
        """Forget tokens from a position on: computed, in flight, or still to be computed."""
        seqs, length = self._seqs, event.length
        state = seqs.get(event.seq, "Truncate")
        slot = state.slot
        if state.status is Status.LOADING:
            raise seqs.impossible(event.seq, "Truncate of a sequence that is still loading")
        if not 0 <= length <= seqs.length[slot]:
            raise seqs.impossible(
                event.seq, f"Truncate to {length}, it has {seqs.length[slot]} tokens"
            )
        self._forget_tokens(state, length)
        seqs.tell(state, f"truncated to {length}")
        if state.status is Status.SWAPPED:
            seqs.computed[slot] = seqs.length[slot] = min(int(seqs.computed[slot]), length)
            for held in reversed(state.held[-(-length // self._size) :]):
                self._pool.ram.unhold(held)
            del state.held[-(-length // self._size) :]
            self._pool.ram.shrink_cache()
            return
        for record in seqs.steps:
            mine = record.slots == slot
            limit = np.maximum(0, length - record.starts[mine])
            record.valid[mine] = np.minimum(record.valid[mine], limit)
        self._drop_blocks(state, length)
        seqs.promised[slot] = length
        if length == seqs.length[slot]:
            seqs.place_cursor(state)
            return
        seqs.computed[slot] = min(int(seqs.computed[slot]), length)
        seqs.length[slot] = length
        seqs.place_cursor(state)
        if seqs.in_flight[slot]:
            # The step may still write what is to be forgotten, so the backend hears of it after.
            state.trim_epoch = int(seqs.last_epoch[slot])
            seqs.trimming[state.id] = state
        else:
            out.append(Trim(state.id, length))

    def _forget_tokens(self, state: SequenceState, length: int) -> None:
        """Tokens, digests, and promises beyond ``length``."""
        size, slot = self._size, state.slot
        start = length // size * size
        if start < int(self._seqs.computed[slot]) // size * size:
            self._seqs.tails[slot, : length - start] = state.known[start:length]
        state.known_tokens = min(state.known_tokens, length)
        del state.chain[length // size * DIGEST :]
        if self._seqs.computed[slot] >= state.known_tokens:
            self._seqs.prefilling.pop(state.id, None)

    def _drop_blocks(self, state: SequenceState, length: int) -> None:
        keep = -(-length // self._size)
        if length % self._size and keep <= state.blocks and not self._config.keep_cached_on_gpu:
            # There the cells behind ``length`` are gone for good: the block is no whole page now.
            self._pool.forget(int(state.table[keep - 1]))
        dropped = state.blocks_held[keep:].copy()
        state.blocks = min(state.blocks, keep)
        self._pool.release(dropped, state.space, self._seqs.epoch_of(state))

    # ----------------------------------------------------------------------- free and preempt

    def free(self, event: Free, out: list[Instruction]) -> None:
        """A sequence ends: at once, or when nothing of it is in flight any more."""
        state = self._seqs.by_id.get(event.seq)
        if state is None or isinstance(state.pending, Free):
            raise self._seqs.impossible(
                event.seq, "Free of a sequence that is not there, or is ending"
            )
        self._put_off(state, event, out)

    def preempt(self, event: Preempt, out: list[Instruction]) -> None:
        """A sequence and its group step aside: at once, or when nothing is in flight any more."""
        seqs = self._seqs
        state = seqs.get(event.seq, "Preempt")
        if state.status is Status.SWAPPED:
            raise seqs.impossible(event.seq, "Preempt of a sequence that does not run")
        tails: dict[tuple[int, int], int] = {}
        for member in seqs.members(state):
            if member.status is not Status.SWAPPED and member.pending is None:
                self._put_off(member, Preempt(member.id, event.mode), out, tails)

    def _put_off(
        self,
        state: SequenceState,
        event: Free | Preempt,
        out: list[Instruction],
        tails: dict[tuple[int, int], int] | None = None,
    ) -> None:
        state.pending = event
        self._seqs.pending[state.id] = state
        self._seqs.runnable.pop(state.id, None)
        self._seqs.tell(state, f"asked to {event}")
        if not self._seqs.busy(state):
            self._carry_out(state, tails if tails is not None else {}, out)

    def carry_out_idle(self, out: list[Instruction]) -> None:
        """End or preempt those that waited for steps and loads which are now over."""
        tails: dict[tuple[int, int], int] = {}
        for state in list(self._seqs.pending.values()):
            if not self._seqs.busy(state):
                self._carry_out(state, tails, out)

    def _carry_out(
        self, state: SequenceState, tails: dict[tuple[int, int], int], out: list[Instruction]
    ) -> None:
        event, state.pending = state.pending, None
        del self._seqs.pending[state.id]
        if isinstance(event, Preempt):
            self._step_aside(state, event.mode, tails, out)
            return
        assert event is not None
        if state.status is Status.SWAPPED:
            self._let_slots_go(state)
        else:
            if event.cache:
                self._keep_pages(state, out)
            self._leave(state, out)
        if not event.cache:
            self._discard_pages(state)
        self._seqs.remove(state)

    def _let_slots_go(self, state: SequenceState) -> None:
        for slot in reversed(state.held):
            self._pool.ram.unhold(slot)
        state.held = []
        self._pool.ram.shrink_cache()

    def _leave(self, state: SequenceState, out: list[Instruction]) -> None:
        """Give back the blocks and the sequence ids."""
        self._seqs.ids_used -= state.ids
        self._seqs.prefilling.pop(state.id, None)
        self._seqs.trimming.pop(state.id, None)
        blocks = state.blocks_held.copy()
        state.blocks = 0
        self._seqs.place_cursor(state)
        self._pool.release(blocks, state.space)
        out.append(Release(state.id))

    # ---------------------------------------------------------------------------------- pages

    def _publish(self, state: SequenceState) -> int:
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
            if self._config.keep_cached_on_gpu or self._pool.blocks.refcount[block] == 1:
                self._pool.register(block, *state.names(index))
        return full

    def _keep_pages(self, state: SequenceState, out: list[Instruction]) -> None:
        """Make cached pages of the full blocks: where they are, or in RAM."""
        full = self._publish(state)
        if self._config.keep_cached_on_gpu or not self._pool.ram.total:
            return
        pool, ram, index = self._pool, self._pool.ram, self._pool.index
        nodes = index.find_all(state.chain, full).tolist()
        touched: list[int] = []
        missing: list[int] = []
        for i, node in enumerate(nodes):
            slot = index.where[Tier.RAM][node] if node >= 0 else -1
            if slot >= 0:
                ram.pin(slot)
                touched.append(slot)
            elif node < 0 or (
                index.where[Tier.GPU][node] == state.table[i]
                and pool.blocks.refcount[state.table[i]] == 1
            ):
                missing.append(i)
        pages: list[Page] = []
        for i in missing:
            slot = ram.take(swap=False)
            if slot < 0:
                break  # pages behind a missing one would never be found
            ram.name(slot, nodes[i] if nodes[i] >= 0 else index.add_after(*state.names(i)))
            pages.append(Page(i, int(state.table[i]), slot, self._size))
        if pages:
            self._transfers.begin_store(state.id, pages, touched, out)
        else:
            for slot in reversed(touched):
                ram.unpin(slot)

    def _discard_pages(self, state: SequenceState) -> None:
        """Drop what only this sequence has computed and nobody else needs, from every tier."""
        pool, index = self._pool, self._pool.index
        full = int(self._seqs.computed[state.slot]) // self._size
        for node in index.find_all(state.chain, full)[state.found :][::-1].tolist():
            if node < 0:
                continue
            block, slot = index.where[Tier.GPU][node], index.where[Tier.RAM][node]
            if slot >= 0:
                pool.ram.uncache(slot)
            if block >= 0:
                pool.uncache(block)

    def _step_aside(
        self,
        state: SequenceState,
        mode: PreemptMode,
        tails: dict[tuple[int, int], int],
        out: list[Instruction],
    ) -> None:
        """Preempt a sequence of which nothing is in flight."""
        seqs = self._seqs
        computed = int(seqs.computed[state.slot])
        tail = computed % self._size
        if computed > state.known_tokens:
            state.learn(computed - tail, seqs.tails[state.slot, :tail])
        full = self._publish(state)
        swapped = mode is not PreemptMode.RECOMPUTE and self._swap(
            state, full, tail, mode, tails, out
        )
        if not swapped:
            self._keep_pages(state, out)
        self._leave(state, out)
        state.status = Status.SWAPPED
        seqs.length[state.slot] = computed
        seqs.swapped[state.id] = state
        lost = 0 if swapped else computed - self._found_again(state, full)
        mode = PreemptMode.SWAP if swapped else PreemptMode.RECOMPUTE
        self.preemptions[mode] += 1
        seqs.tell(state, f"preempted by {mode.value}, lost {lost} of {computed}")
        out.append(Preempted(state.id, mode, lost))

    def _swap(
        self,
        state: SequenceState,
        full: int,
        tail: int,
        mode: PreemptMode,
        tails: dict[tuple[int, int], int],
        out: list[Instruction],
    ) -> bool:
        """Store what is not in RAM yet and hold it all there; False, and nothing done, if not."""
        ram, index = self._pool.ram, self._pool.index
        nodes = index.find_all(state.chain, full).tolist()
        slots = [index.where[Tier.RAM][node] if node >= 0 else -1 for node in nodes]
        partial = int(state.table[full]) if tail else -1
        if tail:
            slots.append(tails.get((partial, tail), -1))
        present = [slot for slot in slots if slot >= 0]
        needed = len(slots) - len(present)
        for slot in present:
            ram.hold(slot)
        to_store = needed * self._size
        found = self._found_again(state, full)
        cheap = mode is PreemptMode.SWAP or self._cost.swap_is_cheaper(
            full * self._size + tail, to_store, found
        )
        if not cheap or ram.obtainable() < needed:
            for slot in reversed(present):
                ram.unhold(slot)
            return False
        pages: list[Page] = []
        for i, slot in enumerate(slots):
            if slot >= 0:
                continue
            slots[i] = fresh = ram.take(swap=True)
            ram.hold(fresh)
            if i < full:
                ram.name(fresh, nodes[i] if nodes[i] >= 0 else index.add_after(*state.names(i)))
            else:
                tails[partial, tail] = fresh
            pages.append(Page(i, int(state.table[i]), fresh, self._size if i < full else tail))
        state.held = slots
        if pages:
            self._transfers.begin_store(state.id, pages, (), out)
        return True

    def _found_again(self, state: SequenceState, full: int) -> int:
        """Tokens at its front whose pages are resident in some tier now."""
        index = self._pool.index
        nodes = index.find_all(state.chain, full)
        resident = nodes >= 0
        if not self._config.keep_cached_on_gpu:
            resident &= (index.wheres[Tier.RAM][nodes] >= 0) | (
                self._pool.blocks.refcounts[index.wheres[Tier.GPU][nodes]] > 0
            )
        return int(np.argmin(resident) if not resident.all() else full) * self._size

"""Fork, truncate, free, preempt: how sequences multiply, shrink, leave, and step aside."""

from __future__ import annotations

import numpy as np

from kvpager.keeping import Keeping, Tails
from kvpager.pool import Pool
from kvpager.prefix import DIGEST
from kvpager.restoring import Restoring
from kvpager.sequences import SequenceState, SequenceTable, Status
from kvpager.types import (
    Attach,
    Fork,
    Free,
    Instruction,
    Preempt,
    Preempted,
    PreemptMode,
    Release,
    Trim,
    Truncate,
)


class Endings:
    """What gives blocks back, and what shares them with children."""

    def __init__(
        self, pool: Pool, seqs: SequenceTable, keeping: Keeping, restoring: Restoring
    ) -> None:
        self._pool = pool
        self._config = pool.config
        self._seqs = seqs
        self._keeping = keeping
        self._restoring = restoring
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
        child.whole, child.owner = parent.whole, parent.owner
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
        if state.status is Status.LOADING and state.restore is None:
            raise seqs.impossible(event.seq, "Truncate of a sequence that is still loading")
        if not 0 <= length <= seqs.length[slot]:
            raise seqs.impossible(
                event.seq, f"Truncate to {length}, it has {seqs.length[slot]} tokens"
            )
        self._restoring.abandon(state)
        self._forget_tokens(state, length)
        seqs.tell(state, f"truncated to {length}")
        if state.status is Status.SWAPPED:
            seqs.computed[slot] = seqs.length[slot] = min(int(seqs.computed[slot]), length)
            self._keeping.let_go(state, -(-length // self._size))
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
        state.saved = min(state.saved, length // size)
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
        tails: Tails = {}
        for member in seqs.members(state):
            if member.status is not Status.SWAPPED and member.pending is None:
                self._put_off(member, Preempt(member.id, event.mode), out, tails)

    def _put_off(
        self,
        state: SequenceState,
        event: Free | Preempt,
        out: list[Instruction],
        tails: Tails | None = None,
    ) -> None:
        state.pending = event
        self._seqs.pending[state.id] = state
        self._seqs.runnable.pop(state.id, None)
        self._restoring.abandon(state)
        self._seqs.tell(state, f"asked to {event}")
        if not self._seqs.busy(state):
            self._carry_out(state, tails if tails is not None else {}, out)

    def carry_out_idle(self, out: list[Instruction]) -> None:
        """End or preempt those that waited for steps and loads which are now over."""
        if not self._seqs.pending:
            return
        tails: Tails = {}
        for state in list(self._seqs.pending.values()):
            if not self._seqs.busy(state):
                self._carry_out(state, tails, out)

    def _carry_out(self, state: SequenceState, tails: Tails, out: list[Instruction]) -> None:
        event, state.pending = state.pending, None
        del self._seqs.pending[state.id]
        if isinstance(event, Preempt):
            self._step_aside(state, event.mode, tails, out)
            return
        assert event is not None
        if state.status is Status.SWAPPED:
            self._keeping.let_go(state)
        else:
            if event.cache:
                self._keeping.cache(state, out)
            self._leave(state, out)
        if not event.cache:
            self._keeping.discard(state)
        self._seqs.remove(state)

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

    def _step_aside(
        self,
        state: SequenceState,
        mode: PreemptMode,
        tails: Tails,
        out: list[Instruction],
    ) -> None:
        """Preempt a sequence of which nothing is in flight."""
        seqs = self._seqs
        computed = int(seqs.computed[state.slot])
        tail = computed % self._size
        if computed > state.known_tokens:
            state.learn(computed - tail, seqs.tails[state.slot, :tail])
        full = self._keeping.publish(state)
        swapped = mode is not PreemptMode.RECOMPUTE and self._keeping.swap(
            state, full, mode, tails, out
        )
        if not swapped:
            self._keeping.cache(state, out)
        self._leave(state, out)
        state.status = Status.SWAPPED
        seqs.length[state.slot] = computed
        seqs.swapped[state.id] = state
        lost = 0 if swapped else computed - self._keeping.found_again(state, full)
        mode = PreemptMode.SWAP if swapped else PreemptMode.RECOMPUTE
        state.preemptions += 1
        self.preemptions[mode] += 1
        seqs.tell(state, f"preempted by {mode.value}, lost {lost} of {computed}")
        out.append(Preempted(state.id, mode, lost))

"""Reserve, launch, retire: the hot path.

A decode step is handled in NumPy over all its sequences; Python touches only those that cross the
edge of a block, compute several tokens, or are about to write a block they do not own alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpager.errors import ImpossibleEventError
from kvpager.pool import Pool
from kvpager.prefix import DIGEST, extend_chain
from kvpager.sequences import SequenceState, SequenceTable, StepRecord
from kvpager.types import (
    CopyBlock,
    DeferReason,
    Instruction,
    Reserve,
    Reserved,
    Shortage,
    StepFailed,
    StepLaunched,
    StepRetired,
    Tokens,
    Trim,
)


class Steps:
    """What steps do to sequences and blocks."""

    def __init__(self, pool: Pool, seqs: SequenceTable) -> None:
        self._pool = pool
        self._seqs = seqs
        self._size = pool.config.block_tokens
        self.copied_blocks = 0

    # ------------------------------------------------------------------------------- reserve

    def reserve(self, event: Reserve, out: list[Instruction]) -> None:
        """Room for the next tokens of each sequence, in order, each whole or not at all."""
        seqs = self._seqs
        slots = seqs.slots_of(event.seqs, "Reserve")
        counts = self._counts(event)
        ends = seqs.length[slots] + counts
        ready = self._writable(slots) & (ends <= seqs.capacity[slots])
        seqs.promised[slots[ready]] = ends[ready]
        short: list[Shortage] = []
        for i in np.flatnonzero(~ready).tolist():
            state = seqs.by_slot[slots[i]]
            assert state is not None
            shortage = self._make_room(state, int(ends[i]), out)
            if shortage is not None:
                short.append(shortage)
        out.append(Reserved(tuple(short)))

    def _counts(self, event: Reserve | StepLaunched) -> npt.NDArray[np.int64]:
        counts = np.array(event.counts, dtype=np.int64)
        if len(counts) != len(event.seqs) or (len(counts) and counts.min() < 1):
            raise ImpossibleEventError(
                f"{type(event).__name__} needs a positive count per sequence"
            )
        return counts

    def _writable(self, slots: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether the block of the next token is there, and nobody else's business."""
        arrays = self._pool.blocks
        block = self._seqs.write_block[slots]
        writable: npt.NDArray[np.bool_] = (
            (block >= 0)
            & (arrays.refcounts[block] == 1)
            & (arrays.nodes[block] < 0)
            & (arrays.all_pins[block] == 0)
        )
        return writable

    def _make_room(self, state: SequenceState, end: int, out: list[Instruction]) -> Shortage | None:
        """Blocks up to position ``end``, the first of them writable; what is missing, if any."""
        seqs, pool, arrays, slot = self._seqs, self._pool, self._pool.blocks, state.slot
        if state.until >= 0 and end > state.until:
            missing = -(-(end - state.until) // self._size)
            return Shortage(state.id, missing, DeferReason.TRANSFER)
        length = int(seqs.length[slot])
        block = int(seqs.write_block[slot])
        more = max(0, -(-end // self._size) - state.blocks)
        copy = block >= 0 and (arrays.refcount[block] > 1 or arrays.pins[block] > 0)
        if more + copy > pool.available(state.space):
            missing = more + copy - arrays.available()
            if missing > 0:
                return Shortage(state.id, missing)
            missing = more + copy - pool.available(state.space)
            return Shortage(state.id, missing, DeferReason.QUOTA)
        if copy:
            self._copy_on_write(state, length, block, out)
        elif block >= 0:
            # A truncation led back into a page; it is about to become something else.
            pool.forget(block)
        state.extend_table(pool.take(more, state.space))
        seqs.promised[slot] = end
        seqs.place_cursor(state)
        return None

    def _copy_on_write(
        self, state: SequenceState, length: int, block: int, out: list[Instruction]
    ) -> None:
        index = length // self._size
        (own,) = self._pool.take(1, state.space)
        out.append(CopyBlock(state.id, index, block, own, length % self._size))
        self._remap(state, index, own)
        self._pool.release([block], state.space, self._seqs.epoch_of(state))
        self.copied_blocks += 1
        self._seqs.tell(state, f"copied block {block} to {own} before writing position {length}")

    def _remap(self, state: SequenceState, index: int, block: int) -> None:
        state.table[index] = block

    # -------------------------------------------------------------------------------- launch

    def launch(self, event: StepLaunched, out: list[Instruction]) -> None:
        """A step is on its way; what it names stays untouched until it has retired."""
        seqs = self._seqs
        if event.epoch <= seqs.launched_epoch:
            raise ImpossibleEventError(f"epoch {event.epoch} after epoch {seqs.launched_epoch}")
        slots = seqs.slots_of(event.seqs, "StepLaunched")
        counts = self._counts(event)
        if len(set(event.seqs)) != len(event.seqs):
            raise ImpossibleEventError(f"step {event.epoch} names a sequence twice")
        starts = seqs.length[slots]
        ends = starts + counts
        roomy = self._writable(slots) & (ends <= seqs.capacity[slots])
        if not roomy.all():
            seq = event.seqs[int(np.argmin(roomy))]
            raise seqs.impossible(seq, f"step {event.epoch} was launched without a Reserve")
        record = StepRecord(event.epoch, event.seqs, slots, starts, counts, counts.copy())
        seqs.launched_epoch = event.epoch
        seqs.steps.append(record)
        seqs.length[slots] = ends
        seqs.promised[slots] = np.maximum(seqs.promised[slots], ends)
        seqs.in_flight[slots] += 1
        seqs.last_epoch[slots] = event.epoch
        self._move_cursors(slots[starts // self._size != ends // self._size])
        seqs.tell_step("launched", record)

    def _move_cursors(self, slots: npt.NDArray[np.intp]) -> None:
        for slot in slots.tolist():
            state = self._seqs.by_slot[slot]
            assert state is not None
            self._seqs.place_cursor(state)

    # -------------------------------------------------------------------------------- retire

    def retire(self, event: StepRetired, out: list[Instruction]) -> None:
        """The oldest step is over: its tokens are in the pool, and its full blocks are pages."""
        record = self._oldest(event.epoch)
        sizes = np.fromiter(map(len, event.tokens), dtype=np.int64, count=len(event.tokens))
        if len(sizes) != len(record.counts) or (sizes > record.counts).any():
            raise ImpossibleEventError(f"step {event.epoch}: its tokens are not those launched")
        cut = sizes < record.counts
        if cut.any() and (sizes[cut].min() < 1 or len(self._seqs.steps) > 1):
            raise ImpossibleEventError(
                f"step {event.epoch}: fewer tokens than launched, and a later step built on them"
            )
        self._check_prompts(record, event.tokens)

        seqs = self._seqs
        seqs.steps.popleft()
        slots, valid = record.slots, np.minimum(record.valid, sizes)
        single = (sizes == 1) & (valid == 1)
        if single.any():
            tokens = np.concatenate(event.tokens)[(np.cumsum(sizes) - 1)[single]]
            self._commit_single(slots[single], tokens)
        for i in np.flatnonzero(~single & (valid > 0)).tolist():
            state = seqs.by_slot[slots[i]]
            assert state is not None
            self._commit(state, event.tokens[i][: int(valid[i])])
        short = slots[cut & (valid > 0)]
        if len(short):
            seqs.length[short] = seqs.computed[short]
            self._move_cursors(short)
        seqs.resumed[slots[valid > 0]] = False
        seqs.end_prefills()
        self._end(record, "retired", out)

    def fail(self, event: StepFailed, out: list[Instruction]) -> None:
        """The oldest step wrote nothing of use; later steps that built on it did not either."""
        record = self._oldest(event.epoch)
        seqs = self._seqs
        seqs.steps.popleft()
        hit = record.slots[record.valid > 0]
        for later in seqs.steps:
            later.valid[np.isin(later.slots, hit)] = 0
        seqs.length[hit] = seqs.computed[hit]
        self._move_cursors(hit)
        for slot in hit.tolist():
            state = seqs.by_slot[slot]
            assert state is not None
            # What the step left behind must not be taken for content, now or after later steps.
            state.trim_epoch = int(seqs.last_epoch[slot])
            seqs.trimming[state.id] = state
        self._end(record, "failed", out)

    def _oldest(self, epoch: int) -> StepRecord:
        if not self._seqs.steps or self._seqs.steps[0].epoch != epoch:
            raise ImpossibleEventError(f"step {epoch} is not the oldest in flight")
        return self._seqs.steps[0]

    def _check_prompts(self, record: StepRecord, tokens: tuple[Tokens, ...]) -> None:
        """A step that computes other tokens than were admitted would poison the index."""
        if not self._seqs.prefilling:
            return
        for i, seq in enumerate(record.ids):
            state = self._seqs.prefilling.get(seq)
            if state is None or not record.valid[i]:
                continue
            start = int(record.starts[i])
            count = min(int(record.valid[i]), len(tokens[i]))
            known = state.known[start : min(state.known_tokens, start + count)]
            if not np.array_equal(known, tokens[i][: len(known)]):
                raise self._seqs.impossible(
                    seq, f"step {record.epoch} computed other tokens than its prompt"
                )

    def _end(self, record: StepRecord, what: str, out: list[Instruction]) -> None:
        seqs = self._seqs
        seqs.in_flight[record.slots] -= 1
        seqs.retired_epoch = record.epoch
        seqs.tell_step(what, record)
        self._pool.retire(record.epoch)
        for state in [
            state for state in seqs.trimming.values() if state.trim_epoch <= record.epoch
        ]:
            del seqs.trimming[state.id]
            out.append(Trim(state.id, int(seqs.length[state.slot])))

    # -------------------------------------------------------------------------------- commit

    def _commit_single(self, slots: npt.NDArray[np.intp], tokens: Tokens) -> None:
        """One token for each of many sequences."""
        seqs, size = self._seqs, self._size
        position = seqs.computed[slots]
        offset = position % size
        seqs.tails[slots, offset] = tokens
        seqs.computed[slots] = position + 1
        for slot in slots[offset == size - 1].tolist():
            state = seqs.by_slot[slot]
            assert state is not None
            self._fill(state, int(seqs.computed[slot]) - size, seqs.tails[slot])

    def _commit(self, state: SequenceState, tokens: Tokens) -> None:
        """Several tokens for one sequence."""
        seqs, slot = self._seqs, state.slot
        start = int(seqs.computed[slot])
        partial = start % self._size
        end = start + len(tokens)
        seqs.computed[slot] = end
        whole = np.concatenate((seqs.tails[slot, :partial], tokens))
        full = len(whole) // self._size * self._size
        if full:
            self._fill(state, start - partial, whole[:full])
        seqs.tails[slot, : len(whole) - full] = whole[full:]

    def _fill(self, state: SequenceState, start: int, tokens: Tokens) -> None:
        """Blocks from position ``start`` on are full: they get their names, and may be shared."""
        state.learn(start, tokens)
        first, last = start // self._size, (start + len(tokens)) // self._size
        if len(state.chain) < last * DIGEST:
            extend_chain(state.chain, state.root, state.known[: last * self._size], self._size)
        for index in range(first, last):
            self._pool.register(int(state.table[index]), *state.names(index))
        if self._pool.config.write_through:
            self._seqs.unsaved[state.id] = state

"""Sequences: their counters in flat arrays by slot, the rest in one object each."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from kvpager.errors import ImpossibleEventError
from kvpager.prefix import DIGEST
from kvpager.quotas import Namespace, Quotas
from kvpager.restore import Restore
from kvpager.tiers import Place
from kvpager.types import Attach, Free, Preempt, PriorityClass, Tokens

_STORY_LENGTH = 32
_STORIES_OF_THE_DEAD = 256
_STEPS_REMEMBERED = 16


class Status(Enum):
    """Where a sequence stands."""

    RUNNING = auto()
    LOADING = auto()
    """Admitted; its loads have not all ended."""
    SWAPPED = auto()
    """Preempted, whether by swap or for recomputation."""


class SequenceState:
    """One live sequence. Its counters are in `SequenceTable`, at ``slot``."""

    __slots__ = (
        "blocks",
        "chain",
        "found",
        "fresh",
        "granted",
        "group",
        "held",
        "id",
        "ids",
        "klass",
        "known",
        "known_tokens",
        "loads",
        "order",
        "owner",
        "pending",
        "preemptions",
        "restore",
        "root",
        "saved",
        "slot",
        "sources",
        "space",
        "status",
        "story",
        "table",
        "trim_epoch",
        "until",
        "whole",
    )

    def __init__(
        self, seq: int, slot: int, space: Namespace, klass: PriorityClass, group: int, order: int
    ) -> None:
        self.id = seq
        self.slot = slot
        self.space = space
        self.root = space.root
        self.klass = klass
        self.group = group
        self.whole = False
        self.fresh = False
        """See `kvpager.types.Admit`."""
        self.owner = 0
        """See `kvpager.types.Admit`."""
        self.order = order
        """Serial number of the admission."""
        self.ids = 1
        """Sequence ids of the backend it accounts for: itself, and forks still to come."""
        self.status = Status.RUNNING
        self.pending: Free | Preempt | None = None
        """What happens as soon as no step and no load is in flight."""
        self.loads: dict[int, list[Attach]] = {}
        """Transfers it waits for, each with the `Attach` that is due when it has ended."""
        self.preemptions = 0
        """How often it has been preempted."""
        self.found = 0
        """Pages at its front that others had computed before it was admitted."""
        self.saved = 0
        """Pages at its front that writing through need not look at again."""
        self.table: npt.NDArray[np.int32] = np.empty(8, dtype=np.int32)
        self.blocks = 0
        """Entries of ``table`` in use."""
        self.chain = bytearray()
        """Digests of its full blocks, those of an admitted prompt included."""
        self.known: Tokens = np.empty(0, dtype=np.int32)
        self.known_tokens = 0
        """Entries of ``known`` in use: an admitted prompt, and all full blocks computed since."""
        self.held: list[Place] = []
        """While swapped: where each of its pages is, in order."""
        self.restore: Restore | None = None
        """While it computes its front and its back is being loaded (`kvpager.restoring`)."""
        self.sources: dict[int, Place] = {}
        """Then: where pages by index can be loaded from, held there until it is decided."""
        self.granted = range(0)
        """Then: the blocks that it may compute now."""
        self.until = -1
        """Then: the position up to which it may compute; -1 without end."""
        self.trim_epoch = -1
        """A truncation the backend hears of when this epoch has retired, -1 for none."""
        self.story: deque[tuple[int, str]] = deque(maxlen=_STORY_LENGTH)

    @property
    def blocks_held(self) -> npt.NDArray[np.int32]:
        """The block table: int32, shape ``(blocks,)``, a view."""
        return self.table[: self.blocks]

    def names(self, index: int) -> tuple[bytes, bytes | None, int]:
        """The digest of its page ``index``, that of the page in front of it, and whose it is."""
        at = index * DIGEST
        before = bytes(self.chain[at - DIGEST : at]) if index else None
        return bytes(self.chain[at : at + DIGEST]), before, self.owner

    def extend_table(self, blocks: Sequence[int]) -> None:
        """Append to the block table."""
        end = self.blocks + len(blocks)
        if end > len(self.table):
            grown = np.empty(max(end, 2 * len(self.table)), dtype=np.int32)
            grown[: self.blocks] = self.table[: self.blocks]
            self.table = grown
        self.table[self.blocks : end] = blocks
        self.blocks = end

    def learn(self, start: int, tokens: Tokens) -> None:
        """Write down the tokens from position ``start`` on, which is at most ``known_tokens``."""
        assert start <= self.known_tokens
        end = start + len(tokens)
        if end > len(self.known):
            grown = np.empty(max(end, 2 * len(self.known)), dtype=np.int32)
            grown[:start] = self.known[:start]
            self.known = grown
        self.known[start:end] = tokens
        self.known_tokens = max(self.known_tokens, end)


@dataclass(slots=True)
class StepRecord:
    """A launched step. Arrays have one entry per sequence of the step."""

    epoch: int
    ids: tuple[int, ...]
    slots: npt.NDArray[np.intp]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    valid: npt.NDArray[np.int64]
    """How many of ``counts`` will count: fewer after a truncation, none after a failure."""


class SequenceTable:
    """All live sequences."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.by_id: dict[int, SequenceState] = {}
        self.runnable: dict[int, int] = {}
        """Slots of those that may take part in a step."""
        self.by_slot: list[SequenceState | None] = []
        self.unsaved: dict[int, SequenceState] = {}
        """Those with full blocks that were not written through, if that is wanted."""
        self.pending: dict[int, SequenceState] = {}
        self.prefilling: dict[int, SequenceState] = {}
        """Those computing tokens that were known at admission."""
        self.swapped: dict[int, SequenceState] = {}
        self.restoring: dict[int, SequenceState] = {}
        """Those whose back is being loaded while they run."""
        self.trimming: dict[int, SequenceState] = {}
        """Those whose backend has still to hear of a truncation (`Trim`)."""
        self.quotas = Quotas()
        self.ids_used = 0
        self.steps: deque[StepRecord] = deque()
        """Launched, not retired."""
        self.launched_epoch = -1
        self.retired_epoch = -1
        self._free_slots: list[int] = []
        self._admissions = 0
        self._serial = 0
        self._dead: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._history: deque[tuple[int, str, StepRecord]] = deque(maxlen=_STEPS_REMEMBERED)
        self._allocate(0)

    def _allocate(self, size: int) -> None:
        self.computed: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.length: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        """Computed and in flight."""
        self.capacity: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        """Tokens its blocks have room for."""
        self.promised: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        """Length up to which `Reserve` has promised room."""
        self.write_block: npt.NDArray[np.int32] = np.full(size, -1, dtype=np.int32)
        """The block in which position ``length`` lies, -1 if it has none yet."""
        self.in_flight: npt.NDArray[np.int32] = np.zeros(size, dtype=np.int32)
        self.last_epoch: npt.NDArray[np.int64] = np.full(size, -1, dtype=np.int64)
        self.resumed: npt.NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)
        """Resumed and without progress since."""
        self.tails: npt.NDArray[np.int32] = np.zeros((size, self.block_tokens), dtype=np.int32)
        """The computed tokens of the last, partial block."""

    def _grow(self) -> None:
        old, size = len(self.by_slot), max(16, 2 * len(self.by_slot))
        kept = {
            name: getattr(self, name)
            for name in (
                "computed",
                "length",
                "capacity",
                "promised",
                "write_block",
                "in_flight",
                "last_epoch",
                "resumed",
                "tails",
            )
        }
        self._allocate(size)
        for name, values in kept.items():
            getattr(self, name)[:old] = values
        self.by_slot += [None] * (size - old)
        self._free_slots += range(size - 1, old - 1, -1)

    # ------------------------------------------------------------------------------- membership

    @property
    def forks_to_come(self) -> int:
        """Forks that admitted requests are still to make (`Admit.width`). Each of them takes a
        block, which no admission may take meanwhile."""
        return self.ids_used - (len(self.by_id) - len(self.swapped))

    def create(self, seq: int, root: bytes, klass: PriorityClass, group: int) -> SequenceState:
        """A new live sequence, running and without blocks."""
        if not self._free_slots:
            self._grow()
        slot = self._free_slots.pop()
        space = self.quotas.join(root)
        state = SequenceState(seq, slot, space, klass, group, self._admissions)
        self._admissions += 1
        self.by_id[seq] = state
        self.by_slot[slot] = state
        for values in (self.computed, self.length, self.capacity, self.promised, self.in_flight):
            values[slot] = 0
        self.write_block[slot] = self.last_epoch[slot] = -1
        self.resumed[slot] = False
        return state

    def remove(self, state: SequenceState) -> None:
        """A sequence that ends; its story is kept for a while."""
        self._dead[state.id] = self.story(state.id)
        if len(self._dead) > _STORIES_OF_THE_DEAD:
            self._dead.popitem(last=False)
        del self.by_id[state.id]
        self.quotas.leave(state.space)
        self.by_slot[state.slot] = None
        self._free_slots.append(state.slot)
        self.runnable.pop(state.id, None)
        for members in (self.pending, self.prefilling, self.swapped, self.trimming):
            members.pop(state.id, None)

    def members(self, state: SequenceState) -> list[SequenceState]:
        """The live sequences of its group, itself first; itself alone without a group."""
        if state.group < 0:
            return [state]
        return [state] + [
            other
            for other in self.by_id.values()
            if other.group == state.group and other is not state
        ]

    def slots_of(self, seqs: tuple[int, ...], event: str) -> npt.NDArray[np.intp]:
        """Slots of sequences that may take part in a step.

        Raises:
            ImpossibleEventError: One of them may not.
        """
        try:
            return np.fromiter(map(self.runnable.__getitem__, seqs), dtype=np.intp, count=len(seqs))
        except KeyError as missing:
            raise self.impossible(
                int(missing.args[0]), f"{event} needs a running sequence"
            ) from None

    def get(self, seq: int, event: str) -> SequenceState:
        """A live sequence that is not about to end.

        Raises:
            ImpossibleEventError: There is none.
        """
        state = self.by_id.get(seq)
        if state is None or state.pending is not None:
            raise self.impossible(seq, f"{event} of a sequence that is not there, or is ending")
        return state

    def impossible(self, seq: int, why: str) -> ImpossibleEventError:
        """The error for an event about ``seq`` that cannot follow what came before."""
        return ImpossibleEventError(f"sequence {seq}: {why}", self.story(seq))

    # ------------------------------------------------------------------------------------ cursor

    def busy(self, state: SequenceState) -> bool:
        """Whether a step or a load of it is in flight."""
        return bool(state.loads) or bool(self.in_flight[state.slot])

    def epoch_of(self, state: SequenceState) -> int:
        """The last step in flight that may touch its blocks, -1 for none."""
        return int(self.last_epoch[state.slot]) if self.in_flight[state.slot] else -1

    def end_prefills(self) -> None:
        """Those that have computed all they were admitted with promise nothing any more."""
        for state in list(self.prefilling.values()):
            if self.computed[state.slot] >= state.known_tokens:
                del self.prefilling[state.id]

    def place_cursor(self, state: SequenceState) -> None:
        """Bring ``capacity`` and ``write_block`` in line with the block table and the length."""
        slot = state.slot
        index = int(self.length[slot]) // self.block_tokens
        room = state.blocks * self.block_tokens
        self.capacity[slot] = room if state.until < 0 else state.until
        self.write_block[slot] = state.table[index] if index < state.blocks else -1

    # ------------------------------------------------------------------------------------- story

    def tell(self, state: SequenceState, what: str) -> None:
        """Add to the sequence's story."""
        self._serial += 1
        state.story.append((self._serial, what))

    def tell_step(self, what: str, record: StepRecord) -> None:
        """Add to the stories of all sequences of a step; O(1)."""
        self._serial += 1
        self._history.append((self._serial, what, record))

    def story(self, seq: int) -> tuple[str, ...]:
        """The last events of a sequence, oldest first; of an ended one too, for a while."""
        state = self.by_id.get(seq)
        if state is None:
            return self._dead.get(seq, ("never admitted, or long ended",))
        events = list(state.story) + list(self._steps_of(seq))
        return tuple(f"#{serial} {what}" for serial, what in sorted(events))

    def _steps_of(self, seq: int) -> Iterator[tuple[int, str]]:
        for serial, what, record in self._history:
            if seq in record.ids:
                i = record.ids.index(seq)
                start, count = int(record.starts[i]), int(record.counts[i])
                yield serial, f"step {record.epoch} {what}: positions {start}..{start + count - 1}"

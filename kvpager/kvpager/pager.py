"""The pager: events in, instructions out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvpager.admission import Admission
from kvpager.adoption import adopt
from kvpager.block_map import block_map
from kvpager.blocks import ACTIVE, FREE, LOADING
from kvpager.cost import CostModel
from kvpager.endings import Endings
from kvpager.errors import ImpossibleEventError
from kvpager.invariants import check
from kvpager.keeping import Keeping
from kvpager.pool import Pool
from kvpager.prefix import DIGEST
from kvpager.pressure import Shrinking
from kvpager.restoring import Restoring
from kvpager.sequences import SequenceTable, Status
from kvpager.steps import Steps
from kvpager.transfers import Transfers
from kvpager.types import (
    Admit,
    Adopt,
    DeferReason,
    Deferred,
    Event,
    Fork,
    Free,
    Instruction,
    Load,
    PageName,
    PagerConfig,
    PagerStats,
    PoolSplit,
    Preempt,
    PreemptMode,
    Pressure,
    Reserve,
    Resume,
    SetQuota,
    StepFailed,
    StepLaunched,
    StepRetired,
    Tier,
    TierMap,
    TierUsage,
    TransferDone,
    TransferFailed,
    Truncate,
)
from kvpager.victims import Victims

_LETTING_GO = (StepRetired, StepFailed, TransferDone, TransferFailed, Preempt, Free, Truncate)
"""Events after which blocks may be movable that were not before."""


class Pager:
    """A paged pool as a deterministic state machine. Not thread-safe.

    Args:
        config: The shape of the pool.

    Raises:
        ValueError: The shape makes no sense.
    """

    def __init__(self, config: PagerConfig) -> None:
        if config.gpu_blocks < 1 or config.block_tokens < 1:
            raise ValueError(f"a pool needs blocks and tokens in them: {config}")
        if min(config.ram_blocks, config.disk_blocks, config.max_sequences) < 0:
            raise ValueError(f"negative size: {config}")
        if not (0 <= config.growth_margin < 1 and 0 <= config.ram_swap_reserve <= 1):
            raise ValueError(f"shares lie between 0 and 1: {config}")
        self.config = config
        self._pool = Pool(config)
        self._seqs = SequenceTable(config.block_tokens)
        self._cost = CostModel()
        self._transfers = Transfers(self._pool, self._seqs)
        self._restoring = Restoring(self._pool, self._seqs, self._transfers, self._cost)
        self._admission = Admission(self._pool, self._seqs, self._transfers, self._restoring)
        self._steps = Steps(self._pool, self._seqs)
        self._keeping = Keeping(self._pool, self._seqs, self._transfers, self._cost)
        self._endings = Endings(self._pool, self._seqs, self._keeping, self._restoring)
        self._shrinking = Shrinking(self._pool, self._seqs)
        self._victims = Victims(self._pool, self._seqs, self._cost)

    # -------------------------------------------------------------------------------- events

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event in.

        Returns:
            What the caller must do now, in this order.

        Raises:
            ImpossibleEventError: The event cannot follow what came before. Nothing has changed.
        """
        out: list[Instruction] = []
        if isinstance(event, Reserve):
            self._steps.reserve(event, out)
        elif isinstance(event, StepLaunched):
            self._steps.launch(event, out)
        elif isinstance(event, StepRetired):
            self._steps.retire(event, out)
            self._afterwards(out)
        elif isinstance(event, StepFailed):
            self._steps.fail(event, out)
            self._afterwards(out)
        elif isinstance(event, (TransferDone, TransferFailed)):
            self._transfers.check(event.transfer)
            ok = isinstance(event, TransferDone)
            transfer = self._transfers.live[event.transfer]
            (self._transfers.done if ok else self._transfers.failed)(event.transfer, out)
            if isinstance(transfer.instruction, Load):
                self._restoring.load_ended(transfer, out, ok=ok)
            if ok:
                self._afterwards(out)
            else:
                # Nothing is copied in background in answer to a failure: it might fail for ever.
                self._endings.carry_out_idle(out)
        elif isinstance(event, Admit):
            self._check_admit(event)
            self._admission.admit(event, out)
        elif isinstance(event, Resume):
            self._resume(event, out)
        elif isinstance(event, Fork):
            self._endings.fork(event, out)
        elif isinstance(event, Truncate):
            self._endings.truncate(event, out)
        elif isinstance(event, Preempt):
            self._endings.preempt(event, out)
        elif isinstance(event, Free):
            self._endings.free(event, out)
            if self.config.disk_persists:
                self._keeping.write_back(out)
        elif isinstance(event, Pressure):
            self._pressure(event, out)
        elif isinstance(event, Adopt):
            adopt(self._pool, event)
        else:
            self._set_quota(event)
        if self._shrinking.waiting and isinstance(event, _LETTING_GO):
            self._shrinking.advance(out)
        return out

    def _check_admit(self, event: Admit) -> None:
        if event.seq in self._seqs.by_id:
            raise self._seqs.impossible(event.seq, "Admit of a sequence that exists already")
        tokens = event.tokens
        if tokens.ndim != 1 or tokens.dtype != np.int32 or not len(tokens):
            raise self._seqs.impossible(
                event.seq,
                f"Admit needs int32 tokens of shape (n,), not {tokens.dtype} {tokens.shape}",
            )
        if len(event.root) != DIGEST or event.width < 1 or not 0 <= event.owner < 1 << 63:
            raise self._seqs.impossible(
                event.seq, "Admit needs a root of 32 bytes, a width >= 1 and an owner of 63 bits"
            )

    def _resume(self, event: Resume, out: list[Instruction]) -> None:
        state = self._seqs.get(event.seq, "Resume")
        if state.status is not Status.SWAPPED:
            raise self._seqs.impossible(event.seq, "Resume of a sequence that was not preempted")
        members = self._seqs.members(state)
        ending = sum(isinstance(member.pending, Preempt) for member in members)
        if ending:
            out.append(Deferred(event.seq, DeferReason.TRANSFER, ending, 0))
            return
        swapped = [member for member in members if member.status is Status.SWAPPED]
        self._admission.resume(event.seq, swapped, out)

    def _pressure(self, event: Pressure, out: list[Instruction]) -> None:
        if not 0 <= event.gpu_blocks <= self.config.gpu_blocks:
            raise ImpossibleEventError(
                f"Pressure of {event.gpu_blocks} blocks, the pool has {self.config.gpu_blocks}"
            )
        self._shrinking.resize(event.gpu_blocks, out)

    def _set_quota(self, event: SetQuota) -> None:
        floor, ceiling = event.floor_blocks, event.ceiling_blocks
        if len(event.root) != DIGEST or floor < 0 or ceiling < 0 or 0 < ceiling < floor:
            raise ImpossibleEventError(f"no quota: {event}")
        self._seqs.quotas.set(event.root, floor, ceiling)

    def _afterwards(self, out: list[Instruction]) -> None:
        """What had to wait for a step or a transfer."""
        if self._seqs.restoring:
            self._restoring.step_over(out)
        self._endings.carry_out_idle(out)
        if self._seqs.unsaved:
            self._keeping.write_through(out)
        self._keeping.write_back(out)

    def observe(
        self,
        *,
        prefill_tokens_per_s: float | None = None,
        load_tokens_per_s: float | None = None,
        store_tokens_per_s: float | None = None,
        tier: Tier = Tier.RAM,
    ) -> None:
        """Feed measured rates, of ``tier`` where they are of transfers, to the cost model behind
        `PreemptMode.AUTO` and `choose_victim`.

        Raises:
            ValueError: A rate is not positive, or the tier is the first.
        """
        self._cost.observe(
            prefill_tokens_per_s=prefill_tokens_per_s,
            load_tokens_per_s=load_tokens_per_s,
            store_tokens_per_s=store_tokens_per_s,
            tier=tier,
        )

    def rates(self) -> dict[str, float]:
        """What `observe` was told, smoothed, in tokens per second: ``prefill``, and ``ram_load``,
        ``ram_store``, ``disk_load`` and ``disk_store``; those that are known."""
        return self._cost.rates()

    # ------------------------------------------------------------------------------ questions

    def block_table(self, seq: int) -> npt.NDArray[np.int32]:
        """Blocks of a sequence in logical order: int32, read-only, valid until the next event.

        Raises:
            ImpossibleEventError: There is no such sequence.
        """
        state = self._seqs.by_id.get(seq)
        if state is None:
            raise self._seqs.impossible(seq, "has no block table")
        table = state.table[: state.blocks]
        table.flags.writeable = False
        return table

    def computed(self, seq: int) -> int:
        """Tokens of a sequence in the pool, those of steps in flight not counted.

        Of a preempted sequence: how many there were.

        Raises:
            ImpossibleEventError: There is no such sequence.
        """
        return int(self._seqs.computed[self._slot(seq)])

    def length(self, seq: int) -> int:
        """Tokens of a sequence in the pool, those of steps in flight counted.

        Raises:
            ImpossibleEventError: There is no such sequence.
        """
        return int(self._seqs.length[self._slot(seq)])

    def _slot(self, seq: int) -> int:
        state = self._seqs.by_id.get(seq)
        if state is None:
            raise self._seqs.impossible(seq, "is not here")
        return state.slot

    def page_name(self, tier: Tier, slot: int) -> PageName | None:
        """The page that a slot of a lower tier holds or is being filled with; None where it is no
        full page, and no use to anybody but the sequence that was swapped out there."""
        node = self._pool.lower[tier].node[slot]
        if node < 0:
            return None
        index = self._pool.index
        parent = index.parent[node]
        before = index.digest(parent) if parent >= 0 else None
        return PageName(index.digest(node), before, index.owner(node))

    def owned(self) -> dict[int, int]:
        """How many pages on disk each `Admit.owner` has that no sequence holds."""
        return self._pool.disk.owned()

    def story(self, seq: int) -> tuple[str, ...]:
        """The last events of a sequence, oldest first; of an ended one too, for a while."""
        return self._seqs.story(seq)

    def choose_victim(self, candidates: Sequence[int]) -> int | None:
        """Who should be preempted.

        Lowest class first, then the namespace most over its quota, then whoever costs least time
        for each block that becomes free: the cheaper of swap and recompute at the measured rates
        (`observe`), more for each time that it has been preempted; within a factor of two the
        newest admission. A namespace at or below its floor is spared while there is another. Never
        one that has been resumed, or whose group has, and has not computed a token since, so that
        nothing thrashes, nor one that does not run. None if nobody is left.
        """
        return self._victims.choose(candidates)

    @property
    def vacating(self) -> bool:
        """Whether `Shrunk` has still to follow from a `Pressure`."""
        return self._shrinking.waiting

    def excess(self) -> int:
        """Blocks that `Pressure` has taken away, and that can only be vacated if somebody gives
        way: preempt a victim, and ask again. 0 once it suffices to wait for steps and transfers."""
        return self._shrinking.excess()

    def namespace_blocks(self, root: bytes) -> int:
        """Blocks of the first tier that the running sequences of a namespace hold."""
        space = self._seqs.quotas.by_root.get(root)
        return space.used if space is not None else 0

    def validate(self) -> None:
        """Check every invariant of the pool.

        Raises:
            InvariantError: One is broken; it carries the story of a sequence concerned.
        """
        check(self._pool, self._seqs, self._transfers, self._shrinking)

    def stats(self) -> PagerStats:
        """Figures as of now."""
        pool, seqs = self._pool, self._seqs
        free, cached = len(pool.blocks.free), pool.blocks.cached.count
        used = int((pool.blocks.states != FREE).sum()) - cached
        return PagerStats(
            gpu=TierUsage(used + cached + free, used, cached, free),
            ram=pool.ram.usage(),
            disk=pool.disk.usage(),
            split=self._split(),
            sequences_running=len(seqs.by_id) - len(seqs.swapped),
            sequences_swapped=len(seqs.swapped),
            sequence_ids_total=self.config.max_sequences,
            prompt_tokens=self._admission.prompt_tokens,
            hit_tokens=self._admission.hit_tokens,
            stored_pages=self._transfers.stored_pages,
            loaded_pages=self._transfers.loaded_pages,
            restores=self._restoring.begun,
            copied_blocks=self._steps.copied_blocks,
            preemptions_swap=self._endings.preemptions[PreemptMode.SWAP],
            preemptions_recompute=self._endings.preemptions[PreemptMode.RECOMPUTE],
        )

    def block_map(self, most: int) -> dict[Tier, TierMap]:
        """What at most ``most`` blocks of each tier are doing, evenly spread over it.

        It reads arrays, the table of each sequence and each page of one that is swapped out: 0.5 ms
        for 256 sequences over 8,192 + 32,768 blocks, 0.9 with 5,000 pages of theirs swapped out.
        """
        return block_map(self._pool, self._seqs, most)

    def _split(self) -> PoolSplit:
        """The four-way split of the blocks that running sequences hold."""
        pool, seqs, size = self._pool, self._seqs, self.config.block_tokens
        filled = np.zeros(self.config.gpu_blocks, dtype=np.int64)
        reserved = 0
        for state in seqs.by_id.values():
            computed = int(seqs.computed[state.slot])
            if state.status is Status.SWAPPED:
                continue
            full = computed // size
            filled[state.table[:full]] = size
            if computed % size:
                last = state.table[full]
                filled[last] = max(filled[last], computed % size)
            promised = min(
                max(int(seqs.promised[state.slot]), state.known_tokens), state.blocks * size
            )
            reserved += max(0, promised - computed)
        token_state = int(filled.sum())
        states = pool.blocks.states
        held = int(((states == ACTIVE) | (states == LOADING)).sum()) * size
        return PoolSplit(token_state, reserved, max(0, held - token_state - reserved), 0)

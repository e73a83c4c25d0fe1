"""Admit and Resume: what of a sequence is resident, what it needs, and whether there is room."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvpager.blocks import ACTIVE, CACHED, LOADING
from kvpager.pool import Pool
from kvpager.prefix import DIGEST, extend_chain
from kvpager.quotas import Namespace
from kvpager.restoring import Restoring
from kvpager.sequences import SequenceState, SequenceTable, Status
from kvpager.tiers import Place, SlotState
from kvpager.transfers import Transfers
from kvpager.types import (
    Admit,
    Admitted,
    Attach,
    DeferReason,
    Deferred,
    Denied,
    Instruction,
    Page,
    PriorityClass,
    Tier,
)

_TIERS = tuple(Tier)
"""By number: calling the enumeration for each of hundreds of pages takes as long as the rest."""


@dataclass(slots=True)
class Plan:
    """What is resident of a sequence that wants to run. Arrays have shape ``(hits,)``."""

    blocks: npt.NDArray[np.int32]
    """The block that holds each page on the GPU, -1 where it must be loaded."""
    tiers: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int32]
    """The tier and the slot to load it from, where ``blocks`` is -1."""
    nodes: npt.NDArray[np.int32]
    tail: Place | None = None
    """Where the partial page after the full ones is."""
    computed: int = 0
    total: int = 0
    """Blocks it will have."""
    forks: int = 0
    """Sequences it is still to become: each takes a block of its own right after the fork, by
    copying the last one of the prompt or by going on behind it."""
    reason: DeferReason | None = None

    @property
    def attached(self) -> int:
        """Blocks shared with others."""
        return int((self.blocks >= 0).sum())


class Admission:
    """Takes sequences in."""

    def __init__(
        self, pool: Pool, seqs: SequenceTable, transfers: Transfers, restoring: Restoring
    ) -> None:
        self._pool = pool
        self._config = pool.config
        self._seqs = seqs
        self._transfers = transfers
        self._restoring = restoring
        self.prompt_tokens = 0
        self.hit_tokens = 0

    # -------------------------------------------------------------------------------- events

    def admit(self, event: Admit, out: list[Instruction]) -> None:
        """Take in a new sequence, or say why not. Nothing is kept of one that is not admitted."""
        config, size = self._config, self._config.block_tokens
        total = -(-len(event.tokens) // size)
        most = self._seqs.quotas.ceiling(event.root) or config.gpu_blocks
        most = min(most, config.gpu_blocks)
        if total + event.width > most:
            out.append(Denied(event.seq, total + event.width, most))
            return
        if config.max_sequences and event.width > config.max_sequences:
            out.append(Denied(event.seq, event.width, config.max_sequences))
            return
        if self._ids_missing(event.width):
            out.append(self._no_ids(event.seq, event.width))
            return
        chain = bytearray()
        extend_chain(chain, event.root, event.tokens, size)
        most_hits = 0 if event.fresh else (len(event.tokens) - 1) // size
        plan = self._look_up(chain, most_hits, event.klass, None)
        plan.computed = len(plan.blocks) * size
        plan.total = total
        plan.forks = event.width - 1
        space = self._seqs.quotas.by_root.get(event.root, Namespace(event.root))
        refusal = self._refusal(event.seq, plan, space)
        if refusal is not None:
            out.append(refusal)
            return
        state = self._seqs.create(event.seq, event.root, event.klass, event.group)
        state.ids = event.width
        state.whole, state.fresh, state.owner = event.whole, event.fresh, event.owner
        state.chain = chain
        state.learn(0, event.tokens)
        state.found = len(plan.blocks)
        self.prompt_tokens += len(event.tokens)
        self.hit_tokens += plan.computed
        self._enter(state, plan, {}, out)

    def resume(self, event_seq: int, members: list[SequenceState], out: list[Instruction]) -> None:
        """Take in preempted sequences again: all of a group together, or none of them."""
        plans = [self._plan_resume(state) for state in members]
        first = None
        if self._seqs.runnable or members[0].whole:
            # While others run, their blocks will come; then the whole group can come back at once.
            first = self._refusal_group(members, plans)
        if first is None:
            first = self._refusal_resume(members[0], plans[0], together=False)
        if first is not None:
            out.append(first)
            return
        tails: dict[tuple[Place, int], int] = {}
        for state in members:
            # Looked up again, as it may now share what a sibling has begun to load.
            plan = self._plan_resume(state)
            refusal = self._refusal_resume(state, plan, together=state is not members[0])
            if refusal is not None:
                out.append(refusal)
                continue
            self._enter(state, plan, tails, out)
            self._seqs.resumed[state.slot] = True
        assert members[0].id == event_seq

    # ------------------------------------------------------------------------------- look-up

    def _look_up(
        self, chain: bytearray, limit: int, klass: PriorityClass, owner: SequenceState | None
    ) -> Plan:
        """The resident pages at the front of ``chain``, at most ``limit``."""
        pool = self._pool
        nodes = pool.index.find_all(chain, limit)
        known = nodes >= 0
        blocks = np.where(known, pool.index.wheres[Tier.GPU][nodes], -1)
        if not self._config.keep_cached_on_gpu:
            # There a block is shared through a sequence that holds it, and only through one.
            states = pool.blocks.states[blocks]
            held = pool.blocks.refcounts[blocks] > 0
            blocks[~(held & ((states == ACTIVE) | (states == LOADING)))] = -1
        tiers, slots = np.zeros_like(blocks), np.full_like(blocks, -1)
        filling = np.zeros(limit, dtype=np.bool_)
        for tier in reversed(pool.lower.values()):  # the fastest has the last word
            there = np.where(known, pool.index.wheres[tier.tier][nodes], -1)
            states = np.where(there >= 0, tier.states[there], SlotState.FREE)
            ready = states == SlotState.READY
            tiers[ready], slots[ready] = tier.tier, there[ready]
            filling |= states == SlotState.FILLING
        hit = (blocks >= 0) | (slots >= 0)
        hits = int(np.argmin(hit)) if not hit.all() else limit
        plan = Plan(blocks[:hits], tiers[:hits], slots[:hits], nodes[:hits])
        if hits < limit:
            if filling[hits]:
                plan.reason = DeferReason.TRANSFER
            elif self._promised(chain, hits, klass, owner):
                plan.reason = DeferReason.PREFIX_IN_FLIGHT
        return plan

    def _promised(
        self, chain: bytearray, index: int, klass: PriorityClass, owner: SequenceState | None
    ) -> bool:
        """Whether another sequence is about to compute the page at ``index`` of ``chain``.

        One of a lower class does not count: it may not be served for as long as others are, and
        whoever comes first would wait behind whoever comes last (docs/adr/0012).
        """
        where = slice(index * DIGEST, (index + 1) * DIGEST)
        wanted = chain[where]
        size = self._config.block_tokens
        return any(
            other.chain[where] == wanted
            for other in self._seqs.prefilling.values()
            if other is not owner
            and other.klass <= klass
            and other.pending is None
            and self._seqs.computed[other.slot] < (index + 1) * size
        )

    def _plan_resume(self, state: SequenceState) -> Plan:
        size = self._config.block_tokens
        computed = int(self._seqs.computed[state.slot])
        full = computed // size
        # What others have computed of its prompt meanwhile is found too.
        limit = full if state.fresh else max(full, (state.known_tokens - 1) // size)
        plan = self._look_up(state.chain, limit, state.klass, state)
        hits = len(plan.blocks)
        # With room for one token more, so that it makes progress before it can be a victim again.
        total = -(-max(computed + 1, state.known_tokens) // size)
        ceiling = state.space.ceiling or self._config.gpu_blocks
        # That one token more is no reason to go over what the namespace may have.
        held = -(-max(computed, state.known_tokens) // size)
        plan.total = min(total, max(ceiling, held), self._config.gpu_blocks)
        # It may have grown beyond what it asked for, and never fork: that must not keep it out.
        plan.forks = min(state.ids - 1, self._config.gpu_blocks - plan.total)
        plan.computed = hits * size
        if hits == full and full < len(state.held):
            place = state.held[full]
            if place.tier.ready(place.slot):
                plan.tail = place
                plan.computed = computed
            elif place.tier.state[place.slot] == SlotState.FILLING:
                plan.reason = DeferReason.TRANSFER
        return plan

    # ---------------------------------------------------------------------------------- room

    def _ids_missing(self, width: int) -> bool:
        limit = self._config.max_sequences
        return bool(limit) and self._seqs.ids_used + width > limit

    def _no_ids(self, seq: int, width: int) -> Deferred:
        free = self._config.max_sequences - self._seqs.ids_used
        return Deferred(seq, DeferReason.SEQUENCES, width, free)

    def _short(
        self,
        seq: int,
        need: int,
        hits: npt.NDArray[np.int32],
        space: Namespace,
        *,
        margin: bool,
    ) -> Deferred | None:
        """The refusal if there is no room for ``need`` blocks beside ``hits``."""
        arrays = self._pool.blocks
        cached = int((arrays.states[hits] == CACHED).sum())
        free = max(0, arrays.available() - cached - self._seqs.forks_to_come)
        spare = math.ceil(self._config.growth_margin * arrays.limit) if margin else 0
        # First what others cannot help with: whoever is told of blocks has others make way.
        room = space.room()
        wanted = need + int((arrays.refcounts[hits] == 0).sum())
        # A ceiling lowered below what a preempted sequence has must not keep it out for ever.
        if room is not None and wanted > room and space.used:
            return Deferred(seq, DeferReason.QUOTA, wanted, room)
        if need + spare > free:
            return Deferred(seq, DeferReason.BLOCKS, need + spare, free)
        return None

    def _refusal(
        self, seq: int, plan: Plan, space: Namespace, *, margin: bool = True
    ) -> Deferred | None:
        """Why a sequence with this plan cannot run now; None if it can."""
        need = plan.total - plan.attached + plan.forks
        limit = self._pool.blocks.limit
        if plan.total + plan.forks > limit:
            return Deferred(seq, DeferReason.POOL, plan.total + plan.forks, limit)
        if plan.reason is not None:
            return Deferred(seq, plan.reason, need, self._pool.blocks.available())
        found = plan.blocks[plan.blocks >= 0]
        return self._short(seq, need, found, space, margin=margin and self._others_run(seq))

    def _others_run(self, seq: int) -> bool:
        """Whether anybody runs but the sequence's own group, where that is of use only as a
        whole."""
        running = len(self._seqs.by_id) - len(self._seqs.swapped)
        state = self._seqs.by_id.get(seq)
        if state is not None and state.whole:
            members = self._seqs.members(state)
            running -= sum(member.status is not Status.SWAPPED for member in members)
        return running > 0

    def _refusal_resume(
        self, state: SequenceState, plan: Plan, *, together: bool
    ) -> Deferred | None:
        if self._ids_missing(state.ids):
            return self._no_ids(state.id, state.ids)
        # For a group, the margin was asked for once.
        return self._refusal(state.id, plan, state.space, margin=not together)

    def _refusal_group(self, members: list[SequenceState], plans: list[Plan]) -> Deferred | None:
        """Why the group cannot come back as a whole; full pages that siblings share count once."""
        ids = sum(state.ids for state in members)
        if self._ids_missing(ids):
            return self._no_ids(members[0].id, ids)
        first, whole, limit = members[0], members[0].whole, self._pool.blocks.limit
        need = 0
        loads: set[int] = set()
        found: set[int] = set()
        lost: set[bytes] = set()
        for state, plan in zip(members, plans, strict=True):
            if plan.reason is not None:
                return Deferred(first.id, plan.reason, plan.total, 0)
            wanted = set(plan.nodes[plan.blocks < 0].tolist())
            need += plan.total + plan.forks - len(plan.blocks) + len(wanted - loads)
            loads |= wanted
            found.update(plan.blocks[plan.blocks >= 0].tolist())
            if whole:
                # Nor are pages that several have to compute again computed more than once.
                named = range(len(plan.blocks), min(plan.total, len(state.chain) // DIGEST))
                again = {state.names(index)[0] for index in named}
                need -= len(named) - len(again - lost)
                lost |= again
        if need > limit:
            # Never all at once: they come back one by one, or not at all.
            return Deferred(first.id, DeferReason.POOL, need, limit) if whole else None
        hits = np.array(sorted(found), dtype=np.int32)
        margin = not whole or self._others_run(first.id)
        return self._short(first.id, need, hits, first.space, margin=margin)

    # -------------------------------------------------------------------------------- taking

    def _enter(
        self,
        state: SequenceState,
        plan: Plan,
        tails: dict[tuple[Place, int], int],
        out: list[Instruction],
    ) -> None:
        """Carry out a plan that has been found to fit.

        Args:
            state: The sequence, without blocks.
            plan: What is resident of it.
            tails: By place and tokens: partial pages that siblings began to load in this event.
            out: Instructions are appended here.
        """
        seqs, pool, size = self._seqs, self._pool, self._config.block_tokens
        hits, both_ends = len(plan.blocks), self._restoring.worthwhile(plan)
        if both_ends:
            plan.computed, plan.tail = int(np.argmax(plan.blocks < 0)) * size, None
        borrowed, pages = self._map(state, plan, tails, load=not both_ends)
        seqs.ids_used += state.ids
        seqs.computed[state.slot] = seqs.length[state.slot] = plan.computed
        partial = plan.computed % size
        seqs.tails[state.slot, :partial] = state.known[plan.computed - partial : plan.computed]
        seqs.swapped.pop(state.id, None)
        if plan.computed < state.known_tokens:
            seqs.prefilling[state.id] = state
        seqs.promised[state.slot] = plan.computed
        seqs.place_cursor(state)

        self._attach(state, borrowed, max(hits * size, plan.computed), out)
        if both_ends:
            self._restoring.begin(state, plan, out)
        for tier, loaded in pages.items():
            self._transfers.begin_load(state, tier, loaded, out)
        # Pinned by the load now, or found on the GPU: the pages below are merely cached from here.
        for place in reversed(state.held):
            place.tier.unhold(place.slot)
        state.held = []
        pool.shrink_caches()
        waits = bool(state.loads) and not both_ends
        state.status = Status.LOADING if waits else Status.RUNNING
        if not waits:
            seqs.runnable[state.id] = state.slot
        what = f"{plan.computed} of {state.known_tokens}"
        seqs.tell(state, f"admitted, computed {what}, waits for {len(state.loads)} transfers")
        out.append(Admitted(state.id, plan.computed, waits, state.until))

    def _map(
        self,
        state: SequenceState,
        plan: Plan,
        tails: dict[tuple[Place, int], int],
        *,
        load: bool,
    ) -> tuple[list[int], dict[Tier, list[Page]]]:
        """Fill the block table.

        Returns:
            The logical blocks that are shared with others, and the pages to load by tier, none
            without ``load``.
        """
        pool, size = self._pool, self._config.block_tokens
        hits = len(plan.blocks)
        table = np.full(plan.total, -1, dtype=np.int32)
        table[:hits] = plan.blocks
        pool.share(plan.blocks[plan.blocks >= 0], state.space)
        partial = max(0, plan.computed - hits * size)
        shared_tail = tails.get((plan.tail, partial), -1) if plan.tail is not None else -1
        if shared_tail >= 0:
            table[hits] = shared_tail
            pool.share(table[hits : hits + 1], state.space)
        own = table < 0
        loads = np.flatnonzero(own[:hits])
        table[own] = pool.take(int(own.sum()), state.space)
        state.extend_table(table.tolist())
        pages: dict[Tier, list[Page]] = defaultdict(list)
        if not load:
            return np.flatnonzero(~own[:hits]).tolist(), pages
        slots, tiers = plan.slots.tolist(), plan.tiers.tolist()
        for index in loads.tolist():
            pages[_TIERS[tiers[index]]].append(Page(index, int(table[index]), slots[index], size))
        fresh = loads[pool.index.wheres[Tier.GPU][plan.nodes[loads]] < 0]
        pool.index.place_all(plan.nodes[fresh], Tier.GPU, table[fresh])
        pool.blocks.nodes[table[fresh]] = plan.nodes[fresh]
        if plan.tail is not None and shared_tail < 0:
            block = int(table[hits])
            tails[plan.tail, partial] = block
            pages[plan.tail.tier.tier].append(Page(hits, block, plan.tail.slot, partial))

        borrowed = np.flatnonzero(~own)
        return borrowed[borrowed < hits + (shared_tail >= 0)].tolist(), pages

    def _attach(
        self,
        state: SequenceState,
        borrowed: list[int],
        computed: int,
        out: list[Instruction],
    ) -> None:
        """Say which blocks are shared: now, or when the transfer that fills them has ended."""
        size = self._config.block_tokens
        loading = self._pool.loading
        run: list[int] = []
        transfer = first = -1
        for index in [*borrowed, -1]:
            block = int(state.table[index]) if index >= 0 else -1
            of = loading.get(block, -1)
            if run and (index != first + len(run) or of != transfer):
                tokens = min(len(run) * size, computed - first * size)
                attach = Attach(state.id, first, tuple(run), tokens)
                if transfer < 0:
                    out.append(attach)
                else:
                    self._transfers.wait(state, transfer, attach)
                run = []
            if not run:
                first, transfer = index, of
            run.append(block)

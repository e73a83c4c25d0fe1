"""Sequences that compute their front while their back is being loaded (`kvpager.restore`).

Such a sequence is runnable up to ``until``, a grant of missing blocks that it computes. When it has
arrived there it jumps over what has been loaded meanwhile and is given the next grant, until
nothing is missing; it waits only where the next block is on its way. Loads begin at the back, a few
blocks at a time, and stop where the grants have got to. A block whose load fails is granted like
any other that is missing; one whose load is late costs a wait of one transfer at most.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from kvpager.blocks import LOADING
from kvpager.cost import CostModel
from kvpager.pool import Pool
from kvpager.restore import Restore, meeting_point
from kvpager.sequences import SequenceState, SequenceTable, Status
from kvpager.tiers import Place
from kvpager.transfers import Transfer, Transfers
from kvpager.types import Instruction, Load, Page, Runnable, Tier

if TYPE_CHECKING:
    from kvpager.admission import Plan

_LOADS_AHEAD = 2
"""Loads of one sequence in flight, so that the link need not wait for the next one."""
_LOAD_BLOCKS = 16
"""Blocks of a load at most. What is in flight when the pointers meet is waited for."""
_LEAST_GRANT = 2
_LEAST_SHARE = 16
"""Grants halve down to such a part of all that is restored: a step takes time for itself, too. Of
4,000 tokens on a GPU the last five grants were of 2 to 7 blocks, and an agent's return from disk
took 120 ms with them; 112 with none under a 32nd, 108 with none under a 16th.
"""
_MOST_GRANTED = 1 << 30


class Restoring:
    """Carries out two-pointer restores."""

    def __init__(
        self, pool: Pool, seqs: SequenceTable, transfers: Transfers, cost: CostModel
    ) -> None:
        self._pool = pool
        self._seqs = seqs
        self._transfers = transfers
        self._cost = cost
        self._size = pool.config.block_tokens
        self.begun = 0

    def worthwhile(self, plan: Plan) -> bool:
        """Whether computing a part of what is to be loaded saves time, at the measured rates.

        From RAM alone only where computing is as fast as loading: the little that would be saved
        otherwise takes time from everybody else's steps (with the paper's rates, 7 and 31 tokens a
        millisecond, 70 % more was computed again, and requests took 3 % longer). Never where cells
        belong to sequences: there the back of a sequence cannot wait in it for its front.
        """
        missing = plan.blocks < 0
        if not self._pool.config.keep_cached_on_gpu or missing.sum() < _LEAST_GRANT:
            return False
        if (self._pool.blocks.states[plan.blocks[~missing]] == LOADING).any():
            return False  # it has to wait for others anyway
        of = tuple(Tier)
        tiers = [of[tier] for tier in plan.tiers[missing].tolist()]
        if self._share(tiers) == 0:
            return False
        prefill, rates = self._cost.prefill, self._cost.loads
        assert prefill is not None
        return Tier.DISK in tiers or prefill >= rates[Tier.RAM]

    def _share(self, tiers: list[Tier]) -> int:
        """How many of as many blocks should be computed, the others being loaded."""
        prefill, rates = self._cost.prefill, self._cost.loads
        if not tiers or prefill is None or any(tier not in rates for tier in tiers):
            return 0
        seconds = sum(1.0 / rates[tier] for tier in tiers)
        return meeting_point(len(tiers), prefill, len(tiers) / seconds)

    # -------------------------------------------------------------------------------- beginning

    def begin(self, state: SequenceState, plan: Plan, out: list[Instruction]) -> None:
        """``state``, whose block table is complete, is computed up to its first missing block."""
        hits = len(plan.blocks)
        first = plan.computed // self._size
        present = [index for index in range(first, hits) if plan.blocks[index] >= 0]
        state.restore = Restore(first, hits - first, present)
        for index in range(first, hits):
            if plan.blocks[index] < 0:
                place = Place(
                    self._pool.lower[Tier(int(plan.tiers[index]))], int(plan.slots[index])
                )
                place.tier.hold(place.slot)
                state.sources[index] = place
        self._seqs.restoring[state.id] = state
        self.begun += 1
        # The first grant comes first, and leaves something to load.
        self._grant(state, most=len(state.sources) - 1)
        self._load_more(state, out)
        self._seqs.tell(state, f"computes from block {first} while blocks to {hits} are loaded")

    def _tiers(self, state: SequenceState) -> list[Tier]:
        return [place.tier.tier for place in state.sources.values()]

    def _load_more(self, state: SequenceState, out: list[Instruction]) -> None:
        restore = state.restore
        while restore is not None and len(state.loads) < _LOADS_AHEAD:
            to_load = len(state.sources) - self._share(self._tiers(state))
            # Half of what the estimate leaves to loading: the pointers meet where they meet.
            blocks = restore.next_loads(max(1, min(_LOAD_BLOCKS, (to_load + 1) // 2)))
            if not blocks:
                return
            pages: dict[Tier, list[Page]] = defaultdict(list)
            for index in sorted(blocks):
                place = state.sources.get(index)
                if place is None:
                    restore.lost(index)
                else:
                    block = int(state.table[index])
                    pages[place.tier.tier].append(Page(index, block, place.slot, self._size))
            for tier, loads in pages.items():
                self._load(state, tier, loads, out)

    def _load(
        self, state: SequenceState, tier: Tier, pages: list[Page], out: list[Instruction]
    ) -> None:
        pool, index = self._pool, self._pool.index
        for page in pages:
            node = pool.lower[tier].node[page.slot]
            if index.where[Tier.GPU][node] < 0:
                index.place(node, Tier.GPU, page.block)
                pool.blocks.node[page.block] = node
        self._transfers.begin_load(state, tier, pages, out)
        for page in pages:
            self._drop_source(state, page.index)

    def _drop_source(self, state: SequenceState, index: int) -> None:
        place = state.sources.pop(index, None)
        if place is not None:
            place.tier.unhold(place.slot)

    # ------------------------------------------------------------------------------------- going on

    def step_over(self, out: list[Instruction]) -> None:
        """A step has ended: whoever has computed its grant goes on."""
        for state in list(self._seqs.restoring.values()):
            arrived = self._seqs.computed[state.slot] == state.until
            if state.status is Status.RUNNING and arrived and not self._seqs.in_flight[state.slot]:
                assert state.restore is not None
                state.restore.computed(state.granted)
                self._advance(state, out)

    def load_ended(self, transfer: Transfer, out: list[Instruction], *, ok: bool) -> None:
        """A load has ended; a sequence that restores may be waiting for it."""
        load = transfer.instruction
        assert isinstance(load, Load)
        # Not one that was begun for it before it stepped aside, and came back.
        state = transfer.waiters.get(load.seq)
        if state is None or state.restore is None:
            return
        for page in load.pages:
            if ok:
                state.restore.loaded(page.index)
            else:
                state.restore.lost(page.index)
        if state.status is Status.LOADING:
            self._advance(state, out)
        else:
            self._load_more(state, out)

    def _advance(self, state: SequenceState, out: list[Instruction]) -> None:
        """Over what is there, to the next grant; or wait for a block that is on its way."""
        seqs, restore, slot = self._seqs, state.restore, state.slot
        assert restore is not None
        computed = restore.ready * self._size
        if not restore.remaining:
            self._end(state)
        else:
            self._load_more(state, out)
            if not self._grant(state):
                # Where it stands until it can go on: nobody is told of what it could skip.
                state.status = Status.LOADING
                seqs.runnable.pop(state.id, None)
                return
        seqs.computed[slot] = seqs.length[slot] = computed
        seqs.promised[slot] = max(int(seqs.promised[slot]), computed)
        seqs.place_cursor(state)
        seqs.end_prefills()
        state.status = Status.RUNNING
        seqs.runnable[state.id] = slot
        seqs.tell(state, f"restored to {computed}, until {state.until}")
        out.append(Runnable(state.id, computed, state.until))

    def _grant(self, state: SequenceState, most: int = _MOST_GRANTED) -> bool:
        """The next blocks to compute, half of what the estimate leaves to computing; if any."""
        restore = state.restore
        assert restore is not None
        share = self._share(self._tiers(state)) // 2
        least = max(_LEAST_GRANT, restore.count // _LEAST_SHARE)
        granted = restore.next_compute(min(most, max(least, share)))
        if not granted:
            return False
        state.granted, state.until = granted, granted.stop * self._size
        for index in granted:
            self._drop_source(state, index)
        self._pool.shrink_caches()
        self._seqs.place_cursor(state)
        return True

    def _end(self, state: SequenceState) -> None:
        for index in list(state.sources):
            self._drop_source(state, index)
        self._pool.shrink_caches()
        state.restore, state.until = None, -1
        del self._seqs.restoring[state.id]
        self._seqs.place_cursor(state)

    # ------------------------------------------------------------------------------------ giving up

    def abandon(self, state: SequenceState) -> None:
        """Keep the front alone. Loads in flight go on for whoever else wants their pages."""
        if state.restore is None:
            return
        seqs = self._seqs
        for transfer in state.loads:
            del self._transfers.live[transfer].waiters[state.id]
        state.loads.clear()
        end = state.until // self._size
        # No step was allowed to touch what lies behind.
        dropped = state.blocks_held[end:].copy()
        state.blocks = end
        self._end(state)
        self._pool.release(dropped, state.space)
        if state.status is Status.LOADING:
            state.status = Status.RUNNING
            if state.pending is None:
                seqs.runnable[state.id] = state.slot

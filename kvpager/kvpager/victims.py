"""Who is preempted: the least important, then who is most over its quota, then the cheapest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from kvpager.cost import CostModel
from kvpager.pool import Pool
from kvpager.sequences import SequenceState, SequenceTable

_MOST_WEIGHED = 64
"""Candidates whose cost is looked at, newest first."""
_LEAST_S = 1e-9
_USELESS = 1 << 20
"""The burden of a victim that frees nothing, since others hold all its blocks."""


class Victims:
    """Chooses sequences to preempt."""

    def __init__(self, pool: Pool, seqs: SequenceTable, cost: CostModel) -> None:
        self._pool = pool
        self._seqs = seqs
        self._cost = cost
        self._size = pool.config.block_tokens
        self._swappable = any(tier.total for tier in pool.lower.values())

    def choose(self, candidates: Sequence[int]) -> int | None:
        """See `kvpager.Pager.choose_victim`."""
        seqs = self._seqs
        eligible = [seqs.by_id[seq] for seq in candidates if seq in seqs.runnable]
        spared = {
            state.group for state in eligible if state.group >= 0 and seqs.resumed[state.slot]
        }
        eligible = [
            state
            for state in eligible
            if not seqs.resumed[state.slot] and state.group not in spared
        ]
        if not eligible:
            return None
        most = max(map(self._importance, eligible))
        equal = [state for state in eligible if self._importance(state) == most]
        equal.sort(key=lambda state: -state.order)
        return min(equal[:_MOST_WEIGHED], key=self._burdens(equal[:_MOST_WEIGHED])).id

    def _importance(self, state: SequenceState) -> tuple[bool, int, int]:
        """Who comes before whom whatever it costs; the greatest is the victim."""
        if not self._seqs.quotas.active:
            return False, state.klass, 0
        over = state.space.over()
        return over > 0, state.klass, over

    def _burdens(self, equal: list[SequenceState]) -> Callable[[SequenceState], int]:
        """The burden of each of ``equal``, groups looked at once."""
        if self._cost.price(1, 1, swappable=self._swappable) is None:
            return lambda _: 0
        groups: dict[int, list[SequenceState]] = defaultdict(list)
        for state in self._seqs.by_id.values():
            groups[state.group].append(state)
        known: dict[int, int] = {}

        def burden(state: SequenceState) -> int:
            key = state.group if state.group >= 0 else -2 - state.slot
            if key not in known:
                known[key] = self._burden(groups[state.group] if state.group >= 0 else [state])
            return known[key]

        return burden

    def _burden(self, members: list[SequenceState]) -> int:
        """Seconds per block that becomes free, as a power of two: less than a factor of two makes
        no difference, so that among equals the newest goes, and the oldest gets done.

        Each time that it was preempted counts once more: else whoever was swapped out before, and
        has its pages below already, would be the cheapest again and again.
        """
        arrays = self._pool.blocks
        tables = [state.blocks_held for state in members]
        filled = [-(-int(self._seqs.computed[state.slot]) // self._size) for state in members]
        blocks, holders = np.unique(np.concatenate(tables), return_counts=True)
        freed = blocks[arrays.refcounts[blocks] == holders]
        if not len(freed):
            return _USELESS
        full = np.concatenate([table[:n] for table, n in zip(tables, filled, strict=True)])
        lost = freed[np.isin(freed, full)]
        nodes = arrays.nodes[lost]
        below = np.zeros(len(lost), dtype=np.bool_)
        for tier in self._pool.lower:
            below |= (nodes >= 0) & (self._pool.index.wheres[tier][nodes] >= 0)
        to_store = len(lost) - int(below.sum())
        price = self._cost.price(
            len(lost) * self._size, to_store * self._size, swappable=self._swappable
        )
        assert price is not None
        times = 1 + max(state.preemptions for state in members)
        return round(math.log2(max(price * times / len(freed), _LEAST_S)))

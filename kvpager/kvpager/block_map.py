"""What every block of every tier is doing, one byte each, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvpager.blocks import FREE
from kvpager.figures import CellState, TierMap
from kvpager.pool import Pool
from kvpager.sequences import SequenceTable
from kvpager.types import Tier

_Cells = npt.NDArray[np.uint8]


def block_map(pool: Pool, seqs: SequenceTable, most: int) -> dict[Tier, TierMap]:
    """The state of at most ``most`` blocks of each tier, evenly spread."""
    cells = {
        Tier.GPU: _first(pool),
        **{tier: lower.cells() for tier, lower in pool.lower.items()},
    }
    owners = {tier: np.zeros(len(of_tier), dtype=np.uint8) for tier, of_tier in cells.items()}
    _mark(seqs, owners)
    found = {}
    for tier, of_tier in cells.items():
        every = max(1, -(-len(of_tier) // most))
        marked = of_tier | (owners[tier] << TierMap.CLASS_SHIFT)
        found[tier] = TierMap(every, marked[::every].tobytes())
    return found


def _first(pool: Pool) -> _Cells:
    blocks = pool.blocks
    cells = blocks.states[: blocks.total].astype(np.uint8)
    withheld = cells[blocks.limit :]
    withheld[withheld == FREE] = CellState.WITHHELD
    cells[blocks.refcounts[: blocks.total] > 1] |= TierMap.SHARED
    return cells


def _mark(seqs: SequenceTable, owners: Mapping[Tier, _Cells]) -> None:
    """Write into ``owners`` who holds what; the most important comes last, and stays."""
    for state in sorted(seqs.by_id.values(), key=lambda state: state.klass, reverse=True):
        mark = 1 + state.klass
        owners[Tier.GPU][state.blocks_held] = mark
        for place in state.held:
            owners[place.tier.tier][place.slot] = mark

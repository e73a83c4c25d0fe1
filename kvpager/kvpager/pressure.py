"""Shrinking the first tier: blocks beyond its end are moved below it, and said to be gone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpager.blocks import DYING, FREE, LOADING, STORING
from kvpager.pool import Pool
from kvpager.sequences import SequenceState, SequenceTable
from kvpager.types import CopyBlock, Grown, Instruction, Shrunk


class Shrinking:
    """Vacates the blocks from the limit on, as steps and transfers let go of them."""

    def __init__(self, pool: Pool, seqs: SequenceTable) -> None:
        self._pool = pool
        self._seqs = seqs
        self._size = pool.config.block_tokens
        self.waiting = False
        """Whether `Shrunk` has still to be said."""

    def resize(self, gpu_blocks: int, out: list[Instruction]) -> None:
        """From now on only blocks below ``gpu_blocks`` are handed out."""
        if gpu_blocks > self._pool.blocks.limit:
            out.append(Grown(gpu_blocks))
        self._pool.set_limit(gpu_blocks)
        self.waiting = gpu_blocks < self._pool.blocks.total
        self.advance(out)

    def advance(self, out: list[Instruction]) -> None:
        """Move what can be moved now; say so when nothing is left."""
        if not self.waiting:
            return
        arrays = self._pool.blocks
        held = self._beyond()
        held = held[arrays.states[held] != LOADING]  # those follow when they have landed
        room = arrays.available()
        if len(held) and room:
            self._move(held[:room], out)
        if not (arrays.states[arrays.limit : arrays.total] != FREE).any():
            self.waiting = False
            out.append(Shrunk(arrays.limit))

    def excess(self) -> int:
        """Blocks beyond the limit that have no place below it, unless somebody gives way."""
        if not self.waiting:
            return 0
        arrays, limit = self._pool.blocks, self._pool.blocks.limit
        below = arrays.states[:limit]
        # Blocks that steps, stores and sequences about to leave are going to let go of.
        coming = int(((below == DYING) | (below == STORING)).sum())
        leaving = list(self._seqs.pending.values())
        coming += sum(int((state.blocks_held < limit).sum()) for state in leaving)
        staying = len(self._beyond()) - sum(
            int((state.blocks_held >= limit).sum()) for state in leaving
        )
        return max(0, staying - arrays.available() - coming)

    def _beyond(self) -> npt.NDArray[np.intp]:
        """Blocks from the limit on that sequences hold."""
        limit = self._pool.blocks.limit
        return limit + np.flatnonzero(self._pool.blocks.refcounts[limit:] > 0)

    def _move(self, blocks: npt.NDArray[np.intp], out: list[Instruction]) -> None:
        """Copy each of ``blocks`` below the limit, and have every table name the copy.

        Steps in flight still use the old ones, and write them before the copy is made: they are
        carried out in order. So the old ones are let go of when those steps have retired.
        """
        epoch = self._seqs.launched_epoch if self._seqs.steps else -1
        targets = {block: self._pool.relocate(block, epoch) for block in blocks.tolist()}
        for state in self._seqs.by_id.values():
            table = state.blocks_held
            for index in np.flatnonzero(np.isin(table, blocks)).tolist():
                self._remap(state, index, targets[int(table[index])], out)

    def _remap(self, state: SequenceState, index: int, target: int, out: list[Instruction]) -> None:
        source = int(state.table[index])
        # The whole block: other sequences may have more tokens in it than this one.
        out.append(CopyBlock(state.id, index, source, target, self._size))
        state.table[index] = target
        self._seqs.place_cursor(state)
        self._seqs.tell(state, f"moved from block {source} to {target}, the pool shrinks")

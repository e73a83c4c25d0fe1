"""What the simulated backend computes: hashes chained over tokens, and the check of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpager.types import Tokens
from pagedd_daemon.backends.base import Run

Cells = npt.NDArray[np.uint64]

POISON = np.uint64(0xDEAD_BEEF_DEAD_BEEF)
"""What a cell holds that nobody may read."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFF_FFFF_FFFF_FFFF


class ContentError(Exception):
    """A block table does not hold what was computed for its sequence."""


def mix(x: int) -> int:
    """The finaliser of splitmix64: 64 bits to 64 bits."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_all(x: Cells) -> Cells:
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def chain(before: int, tokens: Tokens, start: int) -> Cells:
    """Cells of ``tokens`` at positions ``start`` on, after a cell ``before`` (0 at the beginning).

    A cell is the one before it plus a hash of its own token and position, so that a prompt is one
    cumulative sum and not a loop.
    """
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    hashes = _mix_all(tokens.astype(np.uint64) << np.uint64(32) ^ positions)
    cells: Cells = np.cumsum(hashes, dtype=np.uint64)
    cells += np.uint64(before)
    return cells


def noise(offsets: int, vocab: int) -> npt.NDArray[np.float32]:
    """Fixed values in [0, 4), of which a row of logits is ``vocab`` from one of ``offsets`` on."""
    values = _mix_all(np.arange(offsets + vocab, dtype=np.uint64)) >> np.uint64(40)
    heights: npt.NDArray[np.float32] = values.astype(np.float32) * np.float32(4.0 / 2**24)
    return heights


class Oracle:
    """Remembers every cell of every sequence, and compares them with the pool.

    Cells that came from elsewhere (a shared prefix, a load) are learned when the sequence first
    runs on them. Nothing is forgotten when a sequence is released, so what comes back from a swap
    is compared too; a memory that only grows is fit for tests.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._cells: dict[int, Cells] = {}

    def check(self, run: Run, pool: Cells) -> None:
        """Compare what ``run`` is about to read, and note what it will write.

        Raises:
            ContentError: A cell is another one than was written.
        """
        size = self._block_tokens
        blocks = -(-run.start // size)
        found = pool[run.block_table[:blocks]].reshape(-1)[: run.start]
        known = self._cells.get(run.seq, found)[: run.start]
        wrong = found == POISON
        wrong[: len(known)] |= found[: len(known)] != known
        if wrong.any():
            at = int(wrong.argmax())
            raise ContentError(
                f"sequence {run.seq}, position {at}, block {run.block_table[at // size]}: "
                f"{int(found[at]):#x} where {[hex(x) for x in known[at : at + 1]]} was written"
            )
        written = chain(int(found[-1]) if run.start else 0, run.tokens, run.start)
        self._cells[run.seq] = np.concatenate([found, written])

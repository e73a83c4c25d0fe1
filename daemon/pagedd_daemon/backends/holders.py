"""Which sequence holds which block, for a backend whose sharing goes by sequence and not by block.

llama.cpp has no blocks. To give a sequence blocks that are already in the pool it must name another
sequence that has them, and the positions. This is the book that finds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class _Held:
    blocks: list[int] = field(default_factory=list)
    """The block of each logical index; -1 where none is known."""
    length: int = 0
    """Tokens it has: no position from here on is held."""


class Holders:
    """Block tables of the sequences that hold KV, and the way back from a block to them."""

    def __init__(self, block_tokens: int) -> None:
        self._size = block_tokens
        self._held: dict[int, _Held] = {}
        self._of_block: dict[int, set[int]] = {}

    def length(self, seq: int) -> int:
        """Tokens that ``seq`` holds."""
        held = self._held.get(seq)
        return held.length if held else 0

    def put(self, seq: int, first: int, blocks: Sequence[int], length: int) -> None:
        """``seq`` has ``blocks`` from logical index ``first`` on, and tokens up to ``length``."""
        held = self._held.setdefault(seq, _Held())
        missing = first + len(blocks) - len(held.blocks)
        held.blocks.extend([-1] * missing)
        for index, block in enumerate(blocks, first):
            old = held.blocks[index]
            if old != block:
                self._drop(old, seq)
                held.blocks[index] = block
                self._of_block.setdefault(block, set()).add(seq)
        held.length = max(held.length, length)

    def grow(self, seq: int, table: npt.NDArray[np.int32], length: int) -> None:
        """``seq`` has run up to ``length``; ``table`` is its whole block table."""
        held = self._held.setdefault(seq, _Held())
        known = len(held.blocks)
        if known * self._size < length:
            self.put(seq, known, table[known : -(-length // self._size)].tolist(), length)
        else:
            held.length = max(held.length, length)

    def trim(self, seq: int, length: int) -> None:
        """``seq`` no longer has positions from ``length`` on."""
        held = self._held.get(seq)
        if held is None or held.length <= length:
            return
        keep = -(-length // self._size)
        for block in held.blocks[keep:]:
            self._drop(block, seq)
        del held.blocks[keep:]
        held.length = length

    def release(self, seq: int) -> None:
        """``seq`` has nothing any more."""
        held = self._held.pop(seq, None)
        for block in held.blocks if held else ():
            self._drop(block, seq)

    def find(
        self, seq: int, first: int, blocks: Sequence[int], end: int
    ) -> Iterator[tuple[int, int, int]]:
        """Where ``seq`` can get ``blocks``, logical indices ``first`` on, up to position ``end``.

        Yields:
            ``(holder, start, end)`` in positions, in as few pieces as there are holders.

        Raises:
            LookupError: Nobody holds one of the blocks that far.
        """
        at = 0
        while at < len(blocks):
            best, reach = -1, 0
            for holder in self._of_block.get(blocks[at], ()):
                n = self._common(holder, first + at, blocks[at:], end) if holder != seq else 0
                if n > reach:
                    best, reach = holder, n
            if not reach:
                raise LookupError(f"nobody holds block {blocks[at]} for sequence {seq}")
            start = (first + at) * self._size
            yield best, start, min(start + reach * self._size, end)
            at += reach

    def _common(self, holder: int, first: int, blocks: Sequence[int], end: int) -> int:
        """How many of ``blocks`` the holder has in the same place, whole up to ``end``."""
        held = self._held[holder]
        n = 0
        for mine, wanted in zip(held.blocks[first:], blocks, strict=False):
            if mine != wanted or held.length < min((first + n + 1) * self._size, end):
                break
            n += 1
        return n

    def _drop(self, block: int, seq: int) -> None:
        seqs = self._of_block.get(block)
        if seqs is not None:
            seqs.discard(seq)
            if not seqs:
                del self._of_block[block]

"""Byte ranges of many sizes within one large one: first fit, neighbours joined when given back."""

from __future__ import annotations

from bisect import bisect_left

UNIT = 4096
"""Ranges begin and end at multiples of this: pages of memory, sectors of disks."""


def round_up(size: int) -> int:
    """Bytes that a range of ``size`` takes."""
    return -(-size // UNIT) * UNIT


class Ranges:
    """Which parts of ``size`` bytes are taken.

    First fit keeps what is in use at the low end, and searching some hundred holes costs
    microseconds beside the milliseconds that copying what goes into one takes.
    """

    def __init__(self, size: int) -> None:
        size = size // UNIT * UNIT
        self._starts: list[int] = [0] if size else []
        self._ends: list[int] = [size] if size else []
        self.used = 0
        """Bytes taken."""
        self.high = 0
        """The end of the highest range that was ever taken."""

    def take(self, size: int) -> int:
        """The offset of a free range of ``size`` bytes, or -1."""
        size = round_up(size)
        for i, start in enumerate(self._starts):
            if self._ends[i] - start >= size:
                self._carve(i, start, start + size)
                return start
        return -1

    def reserve(self, offset: int, size: int) -> bool:
        """Take this very range; False if a part of it is taken already or lies outside."""
        if offset % UNIT or size <= 0:
            return False
        end = offset + round_up(size)
        i = bisect_left(self._starts, offset + 1) - 1
        if i < 0 or self._ends[i] < end:
            return False
        self._carve(i, offset, end)
        return True

    def give(self, offset: int, size: int) -> None:
        """The range at ``offset`` is free again."""
        end = offset + round_up(size)
        i = bisect_left(self._starts, offset)
        assert i == len(self._starts) or end <= self._starts[i], "given back twice"
        assert not i or self._ends[i - 1] <= offset, "given back twice"
        self.used -= end - offset
        joins_next = i < len(self._starts) and self._starts[i] == end
        joins_last = i > 0 and self._ends[i - 1] == offset
        if joins_next and joins_last:
            self._ends[i - 1] = self._ends[i]
            del self._starts[i], self._ends[i]
        elif joins_next:
            self._starts[i] = offset
        elif joins_last:
            self._ends[i - 1] = end
        else:
            self._starts.insert(i, offset)
            self._ends.insert(i, end)

    def holes(self) -> list[tuple[int, int]]:
        """The free ranges, first and last offset, the latter excluded."""
        return list(zip(self._starts, self._ends, strict=True))

    def _carve(self, i: int, start: int, end: int) -> None:
        """Take ``start`` to ``end`` out of hole ``i``."""
        hole_start, hole_end = self._starts[i], self._ends[i]
        parts = [(a, b) for a, b in ((hole_start, start), (end, hole_end)) if a < b]
        self._starts[i : i + 1] = [a for a, _ in parts]
        self._ends[i : i + 1] = [b for _, b in parts]
        self.used += end - start
        self.high = max(self.high, end)

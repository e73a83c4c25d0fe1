"""Two-pointer restore: recompute from the front while blocks load from the back, until they meet.

With a rate of recomputing ``p`` and of loading ``q`` the two take N / (p + q) for N blocks, half
the time of the better of the two alone at most. A pure planner: it is told what is computed, what
has arrived and what was lost, and says what to compute and what to load next. Blocks can be
recomputed in any order in which everything in front of them is there, so a block that was lost
behind the meeting point costs just itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto


class _State(Enum):
    MISSING = auto()
    LOADING = auto()
    COMPUTING = auto()
    PRESENT = auto()


def meeting_point(blocks: int, compute_per_s: float, load_per_s: float) -> int:
    """The block at which the pointers meet: that many are computed, the rest is loaded.

    Args:
        blocks: Blocks to restore.
        compute_per_s: Blocks recomputed per second, positive.
        load_per_s: Blocks loaded per second, 0 if they cannot be.
    """
    return min(blocks, max(0, round(blocks * compute_per_s / (compute_per_s + load_per_s))))


class Restore:
    """The restoring of blocks ``first .. first + count - 1`` of one sequence, those before present.

    The caller keeps asking `next_loads` and `next_compute` for work as its link and its device have
    room for it, and reports each end. It is over when `remaining` is 0.
    """

    def __init__(self, first: int, count: int, present: Iterable[int] = ()) -> None:
        """Plan to restore ``count`` blocks from ``first`` on, of which ``present`` are there.

        Raises:
            ValueError: One of them is negative.
        """
        if first < 0 or count < 0:
            raise ValueError(f"cannot restore {count} blocks from block {first} on")
        self.first = first
        self.count = count
        self._states = [_State.MISSING] * count
        self._lost: set[int] = set()
        self.remaining = count
        """Blocks that are not there yet."""
        self._front = 0
        self._back = count
        for block in present:
            self._states[block - first] = _State.PRESENT
            self.remaining -= 1

    @property
    def ready(self) -> int:
        """Blocks of the sequence that are there without a gap, from block 0 on."""
        return self.first + self._advance()

    def next_loads(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` further blocks to load, the last of the sequence first.

        Blocks that were lost once are not loaded again.
        """
        chosen: list[int] = []
        while len(chosen) < most and self._back > 0:
            self._back -= 1
            if self._states[self._back] is _State.MISSING and self._back not in self._lost:
                self._states[self._back] = _State.LOADING
                chosen.append(self.first + self._back)
        return tuple(chosen)

    def next_compute(self, most: int) -> range:
        """Up to ``most`` further blocks to compute, consecutive; empty if it must wait.

        It waits only when everything in front is there and the next block is on its way.
        """
        start = self._advance()
        end = start
        while (
            end < len(self._states) and end - start < most and self._states[end] is _State.MISSING
        ):
            self._states[end] = _State.COMPUTING
            end += 1
        return range(self.first + start, self.first + end)

    def computed(self, blocks: range) -> None:
        """These blocks, given out by `next_compute`, are there.

        Raises:
            ValueError: They were not being computed.
        """
        for block in blocks:
            self._arrive(block, _State.COMPUTING)

    def loaded(self, block: int) -> None:
        """This block, given out by `next_loads`, is there.

        Raises:
            ValueError: It was not being loaded.
        """
        self._arrive(block, _State.LOADING)

    def lost(self, block: int) -> None:
        """This block, given out by `next_loads`, is corrupt or late: it will be computed.

        Raises:
            ValueError: It was not being loaded.
        """
        self._expect(block, _State.LOADING)
        self._states[block - self.first] = _State.MISSING
        self._lost.add(block - self.first)

    def _arrive(self, block: int, state: _State) -> None:
        self._expect(block, state)
        self._states[block - self.first] = _State.PRESENT
        self.remaining -= 1

    def _expect(self, block: int, state: _State) -> None:
        at = block - self.first
        if not 0 <= at < len(self._states) or self._states[at] is not state:
            raise ValueError(f"block {block} was not {state.name.lower()}")

    def _advance(self) -> int:
        """Move the front pointer over everything that is there."""
        while self._front < len(self._states) and self._states[self._front] is _State.PRESENT:
            self._front += 1
        return self._front

"""Blocks of the first tier, as flat arrays.

Every attribute is an `array` (fast to touch one at a time) with a NumPy view over the same memory
(fast to touch many at a time). A block costs 39 bytes here, and no Python object.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvpager.types import BlockState

FREE = int(BlockState.FREE)
ACTIVE = int(BlockState.ACTIVE)
CACHED = int(BlockState.CACHED)
STORING = int(BlockState.STORING)
LOADING = int(BlockState.LOADING)
DYING = int(BlockState.DYING)


def zeros(code: str, size: int, value: int = 0) -> array[int]:
    """A flat array of ``size`` times ``value``; never empty, as NumPy views no empty buffer."""
    return array(code, [value]) * max(1, size)


class LruList:
    """An intrusive doubly linked list over ``range(size)``: oldest first, every operation O(1) but
    for `put_back`.

    The sentinel is an element behind those; an element outside the list has no successor (-1).
    """

    __slots__ = ("_last", "_next", "_prev", "_sentinel", "_stamp", "_stamps", "count")

    def __init__(self, size: int, beside: LruList | None = None) -> None:
        """An empty list; ``beside``: another one, of which no element is in this one too: they
        share their links, and one more costs nothing but a sentinel."""
        if beside is None:
            self._prev = zeros("i", size, -1)
            self._next = zeros("i", size, -1)
            self._stamp = zeros("q", size)
            """When each element came, by a count of all that did; kept when it is taken out."""
        else:
            self._prev, self._next, self._stamp = beside._prev, beside._next, beside._stamp
        self._sentinel = len(self._prev)
        self._prev.append(self._sentinel)
        self._next.append(self._sentinel)
        self._stamps = 0
        self._last = self._sentinel
        """The element that was put back last."""
        self.count = 0

    def __contains__(self, item: int) -> bool:
        return self._next[item] >= 0

    def __iter__(self) -> Iterator[int]:
        item = self._next[self._sentinel]
        while item != self._sentinel:
            # Fetched before the yield, so that the loop's body may remove the item.
            following = self._next[item]
            yield item
            item = following

    @property
    def nbytes(self) -> int:
        """Bytes of bookkeeping."""
        links = (len(self._prev) + len(self._next)) * self._prev.itemsize
        return links + len(self._stamp) * self._stamp.itemsize

    def oldest(self) -> int:
        """The oldest element, -1 if there is none."""
        item = self._next[self._sentinel]
        return -1 if item == self._sentinel else item

    def push_newest(self, item: int) -> None:
        """Add at the end that is reclaimed last."""
        self._stamps += 1
        self._stamp[item] = self._stamps
        self._insert(self._prev[self._sentinel], item, self._sentinel)

    def put_back(self, item: int) -> None:
        """Add what was taken out before at its place: behind all that are older.

        Steps over those, from the one that was put back last if that is older: several elements are
        put back fastest oldest first.
        """
        stamps, following, end = self._stamp, self._next, self._sentinel
        stamp, before = stamps[item], self._last
        if before == end or following[before] < 0 or stamps[before] > stamp:
            before = end
        after = following[before]
        while after != end and stamps[after] < stamp:
            before, after = after, following[after]
        self._insert(before, item, after)
        self._last = item

    def remove(self, item: int) -> None:
        """Take out of the list."""
        before, after = self._prev[item], self._next[item]
        assert after >= 0, f"{item} is not in the list"
        self._next[before] = after
        self._prev[after] = before
        self._next[item] = -1
        self.count -= 1

    def _insert(self, before: int, item: int, after: int) -> None:
        assert self._next[item] < 0, f"{item} is in the list already"
        self._prev[item], self._next[item] = before, after
        self._next[before] = item
        self._prev[after] = item
        self.count += 1


class BlockArrays:
    """State of each block, the free stack, the order of cached blocks, and who is dying when."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.limit = total
        """Blocks with an id from here on are being drained (`Pressure`)."""
        self.refcount = zeros("i", total)
        """Running sequences whose table names the block."""
        self.pins = zeros("h", total)
        """Unfinished stores that read the block."""
        self.state = zeros("b", total, FREE)
        self.node = zeros("i", total, -1)
        """The page this block is registered as in the prefix index, -1 for none."""
        self.epoch = zeros("q", total, -1)
        """Last step that may touch the block after a sequence let go of it."""
        self.cached = LruList(total)
        self.free = array("i", range(total - 1, -1, -1))
        self.dying: deque[tuple[int, int]] = deque()
        """(epoch, block); an entry whose block is no longer dying is stale and skipped."""
        self.refcounts: npt.NDArray[np.int32] = np.frombuffer(self.refcount, dtype=np.int32)
        self.all_pins: npt.NDArray[np.int16] = np.frombuffer(self.pins, dtype=np.int16)
        self.states: npt.NDArray[np.int8] = np.frombuffer(self.state, dtype=np.int8)
        self.nodes: npt.NDArray[np.int32] = np.frombuffer(self.node, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of bookkeeping."""
        arrays = (self.refcount, self.pins, self.state, self.node, self.epoch)
        per_block = sum(item.itemsize for item in arrays) + self.free.itemsize
        return per_block * self.total + self.cached.nbytes

    def available(self) -> int:
        """Blocks that could be handed out at once: free ones and cached ones."""
        return len(self.free) + self.cached.count

    def pop_free(self, count: int) -> list[int]:
        """At most ``count`` free blocks; the caller sets their state."""
        count = min(count, len(self.free))
        if not count:
            return []
        taken = self.free[-count:].tolist()
        del self.free[-count:]
        taken.reverse()
        return taken

    def set_limit(self, limit: int) -> None:
        """Hand out only blocks below ``limit``; the caller has dropped the cached ones above."""
        self.limit = limit
        usable = np.flatnonzero(self.states[:limit] == FREE)
        self.free = array("i", usable[::-1].astype(np.int32).tobytes())

"""Buddy allocation (Knowlton 1965): spans of a power of two, split on demand, merged when free."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from kvpager.errors import ImpossibleEventError, InvariantError


@dataclass(frozen=True, slots=True)
class Span:
    """``size`` consecutive slots from ``start`` on; ``size`` is a power of two that divides it."""

    start: int
    size: int


class BuddyAllocator:
    """Hands out spans of a pool of any size.

    A pool that is no power of two starts as its binary digits: 15,728 slots are spans of 8,192,
    4,096, 2,048, 1,024, 256, 64, 32 and 16, each at a multiple of its size. Of the spans that fit,
    the smallest is split, at the lowest address.
    """

    def __init__(self, slots: int) -> None:
        """A pool of ``slots`` slots, all free.

        Raises:
            ValueError: ``slots`` is not positive.
        """
        if slots <= 0:
            raise ValueError(f"a pool needs slots, not {slots}")
        self.slots = slots
        orders = slots.bit_length()
        # Per order a heap of starts and the set of those that are still free: a span that was
        # merged away leaves its entry in the heap, which `_pop` skips.
        self._heaps: list[list[int]] = [[] for _ in range(orders)]
        self._free: list[set[int]] = [set() for _ in range(orders)]
        self._taken: dict[int, int] = {}
        self.free_slots = slots
        start = 0
        for order in reversed(range(orders)):
            if slots >> order & 1:
                self._push(start, order)
                start += 1 << order

    def allocate(self, slots: int) -> Span | None:
        """A span of the least power of two that holds ``slots`` (>= 1), or None."""
        order = (slots - 1).bit_length()
        for larger in range(order, len(self._free)):
            if self._free[larger]:
                break
        else:
            return None
        start = self._pop(larger)
        while larger > order:
            larger -= 1
            self._push(start + (1 << larger), larger)
        self._taken[start] = order
        self.free_slots -= 1 << order
        return Span(start, 1 << order)

    def release(self, span: Span) -> None:
        """Take a span back, and merge it with its buddy as often as that is free too.

        Raises:
            ImpossibleEventError: It is not out.
        """
        order = span.size.bit_length() - 1
        if self._taken.get(span.start) != order:
            raise ImpossibleEventError(f"{span} was not allocated, or was released before")
        del self._taken[span.start]
        self.free_slots += span.size
        start = span.start
        while order < len(self._free) and (start ^ 1 << order) in self._free[order]:
            self._free[order].discard(start ^ 1 << order)
            start &= ~(1 << order)
            order += 1
        self._push(start, order)

    def fits(self, slots: int) -> int:
        """How many spans for ``slots`` each an empty pool holds."""
        order = (slots - 1).bit_length()
        return self.slots >> order

    def spans(self) -> tuple[list[Span], list[Span]]:
        """The spans that are out and those that are free, by address."""
        taken = [Span(start, 1 << order) for start, order in sorted(self._taken.items())]
        free = [Span(s, 1 << order) for order, starts in enumerate(self._free) for s in starts]
        return taken, sorted(free, key=lambda span: span.start)

    def validate(self) -> None:
        """Check that spans tile the pool and that no two free buddies stand side by side.

        Raises:
            InvariantError: They do not.
        """
        taken, free = self.spans()
        at = 0
        for span in sorted([*taken, *free], key=lambda span: span.start):
            if span.start != at or span.start % span.size:
                raise InvariantError(f"{span} overlaps, leaves a hole or is not aligned at {at}")
            at += span.size
        if at != self.slots or sum(span.size for span in free) != self.free_slots:
            raise InvariantError(f"spans cover {at} of {self.slots} slots")
        for span in free:
            if (span.start ^ span.size) in self._free[span.size.bit_length() - 1]:
                raise InvariantError(f"{span} and its buddy are both free and not merged")

    def _push(self, start: int, order: int) -> None:
        self._free[order].add(start)
        heapq.heappush(self._heaps[order], start)

    def _pop(self, order: int) -> int:
        free, heap = self._free[order], self._heaps[order]
        while True:
            start = heapq.heappop(heap)
            if start in free:
                free.discard(start)
                return start

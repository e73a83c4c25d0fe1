"""Pages saved outside the pool, several in one piece.

llama.cpp saves and restores whole sequences, and each time walks over all its cells: page by page
that costs several times what the bytes do. So neighbouring pages are kept together as one *extent*,
and a page's slot points into it. An extent lives as long as a slot points into it, so it may hold
pages that nobody wants any more. It is short for that reason, and whoever stores packs the emptiest
extent again while `Extents.wasteful` names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

EXTENT_PAGES = 16
"""Pages of an extent at most. Storing and loading 1,000 tokens of SmolLM2 take 2.3 and 1.8 ms at 16
pages, 5.1 and 5.0 ms page by page, and no less at 64 (16,640 cells, a shared 2-core machine)."""

Span: TypeAlias = tuple[int, int]
"""Positions from the first to the one before the second."""


@dataclass(slots=True, eq=False)
class Extent:
    """The saved state of some positions of one sequence."""

    data: Bytes
    tokens: int
    """Positions in it."""
    slots: dict[int, Span] = field(default_factory=dict)
    """Slots that point into it, with the positions they stand for."""

    def use(self) -> float:
        """Share of its positions that a slot stands for."""
        return sum(end - start for start, end in self.slots.values()) / self.tokens


class Extents:
    """The RAM tier: slots of pages, backed by extents."""

    def __init__(self, budget_bytes: int) -> None:
        """Beyond ``budget_bytes`` in all, extents are to be packed."""
        self._budget = budget_bytes
        self._of_slot: dict[int, Extent] = {}
        self._extents: set[Extent] = set()
        self.bytes = 0
        """Held now, unwanted pages included."""

    @staticmethod
    def slots_for(budget_bytes: int, page_bytes: int) -> int:
        """Slots that can be served within a budget.

        An eighth is left for pages nobody wants any more: with less, storing would repack extents
        that are nearly full, over and over.
        """
        return budget_bytes * 7 // 8 // page_bytes

    def put(self, extent: Extent, slots: dict[int, Span]) -> None:
        """``slots`` now stand for these positions of ``extent``; what they stood for is gone."""
        for slot in slots:
            self._leave(slot)
        extent.slots.update(slots)
        self._extents.add(extent)
        self.bytes += extent.data.size
        for slot in slots:
            self._of_slot[slot] = extent

    def at(self, slot: int) -> Extent | None:
        """The extent that ``slot`` points into."""
        return self._of_slot.get(slot)

    def wasteful(self) -> Extent | None:
        """The extent with the least use of its bytes, once all together exceed the budget."""
        if self.bytes <= self._budget:
            return None
        return min(self._extents, key=Extent.use, default=None)

    def drop(self, slots: Sequence[int]) -> None:
        """Forget ``slots``."""
        for slot in slots:
            self._leave(slot)

    def clear(self) -> None:
        """Forget everything."""
        self._of_slot.clear()
        self._extents.clear()
        self.bytes = 0

    def _leave(self, slot: int) -> None:
        extent = self._of_slot.pop(slot, None)
        if extent is None:
            return
        del extent.slots[slot]
        if not extent.slots:
            self._extents.remove(extent)
            self.bytes -= extent.data.size

"""What paging is compared with: contiguous KV memory behind the pager's own interface.

The PagedAttention paper (section 6.1) compares with Orca's iteration-level batching in three
variants, which differ in how much they reserve, and with FasterTransformer's static batches. These
classes answer the same events with the same instructions as `kvpager.Pager`, so the same scheduler
drives them; they exist for `benchmarks/paper` and serve nobody.
"""

from __future__ import annotations

from kvpager.baselines.buddy import BuddyAllocator, Span
from kvpager.baselines.contiguous import ContiguousPager, KnownOutput
from kvpager.baselines.reservation import Reservation, exact, longest, next_power_of_two
from kvpager.baselines.static import StaticBatchPager

__all__ = [
    "BuddyAllocator",
    "ContiguousPager",
    "KnownOutput",
    "Reservation",
    "Span",
    "StaticBatchPager",
    "exact",
    "longest",
    "next_power_of_two",
]

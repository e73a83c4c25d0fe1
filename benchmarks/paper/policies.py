"""Who keeps the memory: the pager, or one of the paper's baselines behind the same interface."""

from __future__ import annotations

from typing import TypeAlias

from benchmarks.paper.model import BLOCK_TOKENS, LONGEST, POOL_SLOTS, RAM_SLOTS
from kvpager import Pager
from kvpager.baselines import (
    ContiguousPager,
    KnownOutput,
    StaticBatchPager,
    exact,
    longest,
    next_power_of_two,
)
from kvpager.types import PagerConfig

AnyPager: TypeAlias = Pager | ContiguousPager

ORCA = {"max": longest, "pow2": next_power_of_two, "oracle": exact}
POLICIES = ("paged", "oracle", "pow2", "max", "static")
TITLES = {
    "paged": "paged (this pager)",
    "oracle": "Orca (Oracle)",
    "pow2": "Orca (Pow2)",
    "max": "Orca (Max)",
    "static": "FasterTransformer (static)",
}


def paged(block_tokens: int = BLOCK_TOKENS, *, swap: bool = True, margin: float = 0.01) -> Pager:
    """The real pager over the paper's pool; without ``swap`` it has nowhere to swap to."""
    return Pager(
        PagerConfig(
            gpu_blocks=POOL_SLOTS // block_tokens,
            ram_blocks=RAM_SLOTS // block_tokens if swap else 0,
            block_tokens=block_tokens,
            growth_margin=margin,
        )
    )


def baseline(policy: str, known_output: KnownOutput) -> ContiguousPager:
    """One of the baselines of `POLICIES` over the same memory."""
    if policy == "static":
        return StaticBatchPager(POOL_SLOTS, known_output, LONGEST)
    return ContiguousPager(POOL_SLOTS, ORCA[policy], known_output, LONGEST)

"""What the pager says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierUsage:
    """Blocks of one tier. ``total = used + cached + free``."""

    total: int
    used: int
    """Held by a running or a swapped-out sequence."""
    cached: int
    """Reclaimable at once."""
    free: int


@dataclass(frozen=True, slots=True)
class PoolSplit:
    """The paper's four-way split of the first tier's memory (figure 2), in tokens.

    Paging reserves nothing beyond the block being filled, so ``reserved`` is what `Reserve` has
    promised to steps in flight, ``internal`` the unfilled end of last blocks, and ``external`` 0;
    the contiguous baselines of the paper differ here.
    """

    token_state: int
    reserved: int
    internal: int
    external: int


@dataclass(frozen=True, slots=True)
class PagerStats:
    """A snapshot of the pager, for ``status`` and ``stats``."""

    gpu: TierUsage
    ram: TierUsage
    disk: TierUsage
    split: PoolSplit
    sequences_running: int
    sequences_swapped: int
    sequence_ids_total: int
    prompt_tokens: int
    """Prompt tokens admitted since start."""
    hit_tokens: int
    """Of these, found resident (any tier)."""
    stored_pages: int
    loaded_pages: int
    restores: int
    """Sequences that computed their front while their back was being loaded."""
    copied_blocks: int
    preemptions_swap: int
    preemptions_recompute: int

"""What the pager says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from kvpager.shape import BlockState


class CellState(IntEnum):
    """What a block is doing: `BlockState`, which for a block of a lower tier means the same there,
    and one more."""

    FREE = BlockState.FREE
    HELD = BlockState.ACTIVE
    """By a running sequence; in a lower tier by one that was swapped out."""
    CACHED = BlockState.CACHED
    STORING = BlockState.STORING
    """Nobody holds it, and a copy still names it."""
    LOADING = BlockState.LOADING
    """A copy writes it."""
    DYING = BlockState.DYING
    """Free when the step or the copy that may touch it has ended."""
    WITHHELD = 6
    """Its memory was given back (`kvpager.Pressure`)."""


@dataclass(frozen=True, slots=True)
class TierMap:
    """What the blocks of one tier are doing, for people to look at.

    A cell is one byte: `CellState`, `SHARED` if several sequences hold the block, and from the bit
    `CLASS_SHIFT` on 1 + `kvpager.PriorityClass` of the most important of them, 0 for nobody.
    """

    SHARED: ClassVar[int] = 8
    CLASS_SHIFT: ClassVar[int] = 4

    every: int
    """The cells are those of the blocks 0, ``every``, 2 x ``every``, …"""
    cells: bytes


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

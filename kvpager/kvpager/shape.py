"""The shape of the pool, and the words that events and instructions share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int32]


class Tier(IntEnum):
    """Where a page may be resident, fastest first."""

    GPU = 0
    RAM = 1
    DISK = 2


class BlockState(IntEnum):
    """The life of a block of the first tier.

    ``FREE -> ACTIVE -> CACHED | STORING -> FREE``; ``LOADING -> ACTIVE``; ``DYING`` waits for the
    epoch of the last step that may touch it.
    """

    FREE = 0
    ACTIVE = 1
    CACHED = 2
    STORING = 3
    LOADING = 4
    DYING = 5


class PriorityClass(IntEnum):
    """Who comes first. A lower number is served first and preempted last."""

    INTERACTIVE = 0
    NORMAL = 1
    BACKGROUND = 2


@dataclass(frozen=True, slots=True)
class PagerConfig:
    """The shape of the pool; fixed for the life of a pager."""

    gpu_blocks: int
    """Blocks of the first tier (llama.cpp: cells divided by ``block_tokens``)."""
    ram_blocks: int = 0
    """Pages the RAM tier can hold."""
    disk_blocks: int = 0
    """Pages the disk tier can hold."""
    disk_persists: bool = False
    """Whether the disk outlives this pager: then pages are copied to it as soon as they are cached,
    and not when they are about to be evicted."""
    block_tokens: int = 16
    """Tokens per block: 16, the paper's best (section 7.2)."""
    max_sequences: int = 0
    """Running sequences the backend can name at once, 0 for any number (llama.cpp: 256 ids)."""
    keep_cached_on_gpu: bool = True
    """Whether finished prefixes stay in the first tier until it is needed. False for llama.cpp,
    where cells of finished sequences slow every decode by up to 27 %: they go to RAM at once."""
    write_through: bool = False
    """Whether full blocks of running sequences are kept in RAM too while they run, where whoever
    comes after a crash finds them."""
    growth_margin: float = 0.01
    """Share of the first tier an admission must leave free, so that running sequences can grow."""
    ram_swap_reserve: float = 0.25
    """Share of RAM pages that cached pages may not take, so caching never starves swapping."""

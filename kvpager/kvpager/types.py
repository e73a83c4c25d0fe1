"""The pager's vocabulary: what may happen to it (events) and what it asks for (instructions).

The pager is a deterministic state machine, ``handle(event) -> list[Instruction]``. It copies no
byte, reads no clock and starts no thread. The caller carries out the instructions **in the order
of the list** and reports the transfers among them with `TransferDone` or `TransferFailed`, at any
later time and in any order.

Terms follow the PagedAttention paper (arXiv 2309.06180): a *block* holds the keys and values of
``block_tokens`` consecutive tokens of one sequence, over all layers; a sequence's *block table*
maps logical block indices to blocks. A *page* is one block's content wherever it is resident.

The parts: `kvpager.events` (what may happen), `kvpager.instructions` (what is asked for, and what
is answered), `kvpager.shape` (the pool), `kvpager.figures`. This module is all of them.
"""

from __future__ import annotations

from kvpager.events import (
    Admit,
    Adopt,
    Event,
    Fork,
    Free,
    PageName,
    Preempt,
    PreemptMode,
    Pressure,
    Reserve,
    Resume,
    SetQuota,
    StepFailed,
    StepLaunched,
    StepRetired,
    TransferDone,
    TransferFailed,
    Truncate,
)
from kvpager.figures import (
    CellState,
    PagerStats,
    PoolSplit,
    TierMap,
    TierUsage,
)
from kvpager.instructions import (
    Admitted,
    Attach,
    CopyBlock,
    DeferReason,
    Deferred,
    Denied,
    Grown,
    Instruction,
    Load,
    Move,
    Page,
    Preempted,
    Release,
    Reserved,
    Runnable,
    Shortage,
    Shrunk,
    Spill,
    Store,
    Trim,
)
from kvpager.shape import (
    BlockState,
    PagerConfig,
    PriorityClass,
    Tier,
    Tokens,
)

__all__ = [
    "Admit",
    "Admitted",
    "Adopt",
    "Attach",
    "BlockState",
    "CellState",
    "CopyBlock",
    "DeferReason",
    "Deferred",
    "Denied",
    "Event",
    "Fork",
    "Free",
    "Grown",
    "Instruction",
    "Load",
    "Move",
    "Page",
    "PageName",
    "PagerConfig",
    "PagerStats",
    "PoolSplit",
    "Preempt",
    "PreemptMode",
    "Preempted",
    "Pressure",
    "PriorityClass",
    "Release",
    "Reserve",
    "Reserved",
    "Resume",
    "Runnable",
    "SetQuota",
    "Shortage",
    "Shrunk",
    "Spill",
    "StepFailed",
    "StepLaunched",
    "StepRetired",
    "Store",
    "Tier",
    "TierMap",
    "TierUsage",
    "Tokens",
    "TransferDone",
    "TransferFailed",
    "Trim",
    "Truncate",
]

"""The pager's vocabulary: what may happen to it (events) and what it asks for (instructions).

The pager is a deterministic state machine, ``handle(event) -> list[Instruction]``. It copies no
byte, reads no clock and starts no thread. The caller carries out the instructions **in the order
of the list** and reports the transfers among them with `TransferDone` or `TransferFailed`, at any
later time and in any order.

Terms follow the PagedAttention paper (arXiv 2309.06180): a *block* holds the keys and values of
``block_tokens`` consecutive tokens of one sequence, over all layers; a sequence's *block table*
maps logical block indices to blocks. A *page* is one block's content wherever it is resident.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
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
    block_tokens: int = 16
    """Tokens per block: 16, the paper's best (section 7.2)."""
    max_sequences: int = 0
    """Running sequences the backend can name at once, 0 for any number (llama.cpp: 256 ids)."""
    keep_cached_on_gpu: bool = True
    """Whether finished prefixes stay in the first tier until it is needed. False for llama.cpp,
    where cells of finished sequences slow every decode by up to 27 %: they go to RAM at once."""
    growth_margin: float = 0.01
    """Share of the first tier an admission must leave free, so that running sequences can grow."""
    ram_swap_reserve: float = 0.25
    """Share of RAM pages that cached pages may not take, so caching never starves swapping."""


# ---------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Admit:
    """A new sequence asks to run.

    Answered by exactly one of `Admitted`, `Deferred` (nothing was kept; ask again later) or
    `Denied` (it can never fit).
    """

    seq: int
    """The caller's id of the sequence; never reused."""
    tokens: Tokens
    """The whole prompt, int32, at least one token. The last token is always computed, never taken
    from the cache, since its logits are wanted."""
    root: bytes
    """32 bytes that root the prefix chain: a digest of model, KV dtype, namespace salt and secret.
    Sequences with different roots never share a page."""
    klass: PriorityClass = PriorityClass.NORMAL
    width: int = 1
    """Sequences this request becomes once its prompt is computed (n > 1, beams): counted against
    ``max_sequences`` at admission."""
    group: int = -1
    """Sequences with the same group (>= 0) are preempted and resumed together."""


@dataclass(frozen=True, slots=True)
class Resume:
    """A preempted sequence asks to run again, with its whole group if it has one.

    Answered like `Admit`: `Deferred` for ``seq`` alone if the group cannot come back now, else
    `Admitted` for every preempted member that came back and `Deferred` for each that must ask
    again by itself.
    """

    seq: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Children continue from all of the parent's computed tokens, sharing every block."""

    parent: int
    children: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask for room for the next ``counts[i]`` tokens of ``seqs[i]``, before a step is launched.

    Served in order, each whole or not at all. Answered by `Reserved`, preceded by a `CopyBlock`
    for every shared block that would be written.
    """

    seqs: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepLaunched:
    """The step ``epoch`` (strictly increasing) now computes ``counts[i]`` tokens of ``seqs[i]``."""

    epoch: int
    seqs: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepRetired:
    """The step is over: its tokens are in the pool, and every earlier step has retired too.

    ``tokens[i]`` are the ids that ``seqs[i]`` of the `StepLaunched` had as inputs, shape
    ``(n,)`` with ``1 <= n <= counts[i]``; full blocks are hashed and may be shared from now on.
    With fewer than were launched (a stretch of decode steps that ended early) the other room is
    given back; no later step may be in flight then.
    """

    epoch: int
    tokens: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step wrote nothing that may be used: its sequences are as before `StepLaunched`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Forget every token of ``seq`` from position ``length`` on."""

    seq: int
    length: int


class PreemptMode(Enum):
    """How a victim gives its blocks back."""

    AUTO = "auto"
    """The cheaper of the two by the cost model, swap where there is room."""
    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take ``seq`` (with its group) off the first tier. Answered by `Preempted` for each of them.

    For a sequence with a step or a load in flight the answer comes when that has ended.
    """

    seq: int
    mode: PreemptMode = PreemptMode.AUTO


@dataclass(frozen=True, slots=True)
class Free:
    """``seq`` has ended. Its full blocks become cached pages if ``cache``."""

    seq: int
    cache: bool = True


@dataclass(frozen=True, slots=True)
class TransferDone:
    """The `Store`, `Load` or `Spill` with this id has finished."""

    transfer: int


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The `Store`, `Load` or `Spill` with this id did not happen.

    Nothing may be trusted that it was to write, nor what a `Load` was to read.
    """

    transfer: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """The first tier may from now on use ``gpu_blocks`` blocks (of those it was made with)."""

    gpu_blocks: int


@dataclass(frozen=True, slots=True)
class SetQuota:
    """How many blocks of the first tier the running sequences of one namespace may hold.

    Takes nothing from anyone: a namespace above its new ceiling merely gets no more.
    """

    root: bytes
    """The namespace: `Admit.root` of its sequences."""
    floor_blocks: int = 0
    """It is no victim with this many blocks or fewer, while others above their floor run."""
    ceiling_blocks: int = 0
    """It never gets more blocks than this; 0 for no ceiling."""


Event: TypeAlias = (
    Admit
    | Resume
    | Fork
    | Reserve
    | StepLaunched
    | StepRetired
    | StepFailed
    | Truncate
    | Preempt
    | Free
    | TransferDone
    | TransferFailed
    | Pressure
    | SetQuota
)


# ---------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Admitted:
    """``seq`` has its prompt's blocks, and ``computed`` of its tokens are (or will be) in them.

    With ``loading`` it may not run before `Runnable` names it. Otherwise the next token to compute
    is the one at position ``computed``.
    """

    seq: int
    computed: int
    loading: bool


class DeferReason(Enum):
    """Why an admission must wait."""

    BLOCKS = "blocks"
    QUOTA = "quota"
    """Its namespace is at its ceiling; only blocks of the same namespace help."""
    SEQUENCES = "sequences"
    PREFIX_IN_FLIGHT = "prefix_in_flight"
    """Another sequence is computing this prefix right now: wait rather than do it twice."""
    TRANSFER = "transfer"
    """The pages this sequence needs are still being stored."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """Not now. ``need`` and ``free`` count what ``reason`` names."""

    seq: int
    reason: DeferReason
    need: int
    free: int


@dataclass(frozen=True, slots=True)
class Denied:
    """Never: the sequence needs ``need_blocks`` of a pool of ``total_blocks``.

    Where its namespace has a ceiling that is less, ``total_blocks`` is the ceiling. For a request
    wider than the backend can name sequences, both count sequences.
    """

    seq: int
    need_blocks: int
    total_blocks: int


@dataclass(frozen=True, slots=True)
class Runnable:
    """Every load of ``seq`` has ended: continue at position ``computed``.

    After a failed load ``computed`` may be less than `Admitted` said.
    """

    seq: int
    computed: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """``seq`` could not be given the room it asked for."""

    seq: int
    missing_blocks: int
    reason: DeferReason = DeferReason.BLOCKS
    """``QUOTA`` if its namespace is at its ceiling: then only a victim of that namespace helps."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """The answer to `Reserve`: everyone has room but those in ``short``."""

    short: tuple[Shortage, ...]


@dataclass(frozen=True, slots=True)
class Attach:
    """Logical blocks ``first, first + 1, …`` of ``seq`` are ``blocks``, already held by others.

    A backend with physical block tables has nothing to do. llama.cpp copies sequence membership
    from any sequence that holds the block. ``tokens`` counts the valid tokens over all of them.
    """

    seq: int
    first: int
    blocks: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Copy-on-write: copy ``tokens`` tokens of block ``src`` to ``dst``, logical block ``index`` of
    ``seq`` from now on. llama.cpp, whose cells are shared by token and not by block, need not."""

    seq: int
    index: int
    src: int
    dst: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a transfer between block ``block`` and slot ``slot`` of the lower tier."""

    index: int
    """Logical block index in the sequence: positions ``index * block_tokens`` on."""
    block: int
    slot: int
    tokens: int
    """Valid tokens in it, at most ``block_tokens``."""


@dataclass(frozen=True, slots=True)
class Store:
    """Copy pages from the first tier to ``tier``.

    ``seq`` is a sequence that holds all of them (it may be ending: its `Release` comes later in the
    same list), or -1 where a cached page nobody runs is evicted.
    """

    transfer: int
    seq: int
    tier: Tier
    pages: tuple[Page, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Copy pages from ``tier`` into the first tier, into blocks of ``seq``."""

    transfer: int
    seq: int
    tier: Tier
    pages: tuple[Page, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One page of a transfer between two lower tiers."""

    source: int
    """Slot of the tier it is copied from."""
    target: int
    """Slot of the tier it is copied to."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Spill:
    """Copy pages from one lower tier to the next; reported like a `Store`.

    Asked for only where there is a disk tier. The copies in ``source`` stay valid.
    """

    transfer: int
    source: Tier
    target: Tier
    pages: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Trim:
    """The backend forgets what it holds of ``seq`` from position ``length`` on."""

    seq: int
    length: int


@dataclass(frozen=True, slots=True)
class Release:
    """The backend forgets ``seq``: its sequence id and its membership in blocks."""

    seq: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """``seq`` no longer runs; it needs a `Resume`. ``lost`` of its tokens must be recomputed."""

    seq: int
    mode: PreemptMode
    lost: int


Instruction: TypeAlias = (
    Admitted
    | Deferred
    | Denied
    | Runnable
    | Reserved
    | Attach
    | CopyBlock
    | Store
    | Load
    | Spill
    | Trim
    | Release
    | Preempted
)


# ----------------------------------------------------------------------------------------- figures


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
    copied_blocks: int
    preemptions_swap: int
    preemptions_recompute: int

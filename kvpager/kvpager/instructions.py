"""What the pager asks for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from kvpager.events import PreemptMode
from kvpager.shape import Tier


@dataclass(frozen=True, slots=True)
class Admitted:
    """``seq`` has its prompt's blocks, and ``computed`` of its tokens are (or will be) in them.

    With ``loading`` it may not run before `Runnable` names it. Otherwise the next token to compute
    is the one at position ``computed``.
    """

    seq: int
    computed: int
    loading: bool
    until: int = -1
    """Where this is not -1, tokens from this position on are being loaded meanwhile: the sequence
    computes what lies in front, and goes on when a `Runnable` says where."""


class DeferReason(Enum):
    """Why an admission must wait."""

    BLOCKS = "blocks"
    QUOTA = "quota"
    """Its namespace is at its ceiling; only blocks of the same namespace help."""
    SEQUENCES = "sequences"
    PREFIX_IN_FLIGHT = "prefix_in_flight"
    """Another sequence is computing this prefix right now: wait rather than do it twice."""
    POOL = "pool"
    """It needs more than the pool may use now (`Pressure`): nothing that others give back helps."""
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
    """Every load that ``seq`` waited for has ended: continue at position ``computed``.

    After a failed load ``computed`` may be less than `Admitted` said.
    """

    seq: int
    computed: int
    until: int = -1
    """As in `Admitted`."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """``seq`` could not be given the room it asked for."""

    seq: int
    missing_blocks: int
    reason: DeferReason = DeferReason.BLOCKS
    """``QUOTA`` if its namespace is at its ceiling: then only a victim of that namespace helps.
    ``TRANSFER`` if it asked for more than it was granted (`Admitted.until`)."""


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
    """Copy ``tokens`` tokens of block ``src`` to ``dst``, logical block ``index`` of ``seq`` from
    now on: copy-on-write, or a move out of what `Pressure` takes away. A block that several
    sequences hold is moved once for each of them, to the same ``dst``. In order with steps: behind
    those that were launched before. llama.cpp, whose cells are shared by token and not by block,
    need not copy."""

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
    through: bool = False
    """The sequence runs on (`PagerConfig.write_through`): no block becomes free by it."""


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
class Grown:
    """Blocks below ``gpu_blocks`` may be named from the next instruction on."""

    gpu_blocks: int


@dataclass(frozen=True, slots=True)
class Shrunk:
    """No step or transfer in flight names a block from ``gpu_blocks`` on, and nothing will before a
    `Grown`: their memory can be given back, behind each `CopyBlock` that was asked for before."""

    gpu_blocks: int


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
    | Grown
    | Shrunk
    | Preempted
)

"""What may happen to the pager."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from kvpager.shape import PriorityClass, Tier, Tokens


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
    """Sequences this request becomes once its prompt is computed (n > 1, beams). Counted at
    admission against ``max_sequences``, and with a block for each one more, since every fork is
    about to write a block of its own."""
    group: int = -1
    """Sequences with the same group (>= 0) are preempted and resumed together."""
    whole: bool = False
    """Its group is of use only as a whole (beams: none goes on before all have): after a preemption
    it is `Deferred` until there is room for everybody."""
    owner: int = 0
    """Whose pages they are, in its low 32 bits: room on disk is taken from whoever has most there.
    What stands above them, up to 2^31, the caller may tell pages of one owner apart by."""
    fresh: bool = False
    """Every token of the prompt is to be computed, since the logits after each are wanted: none is
    taken from the cache, and after a preemption none but those that it has computed itself."""


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
    """The first tier may from now on use ``gpu_blocks`` blocks (of those it was made with).

    Where that is more than before, the answer begins with `Grown`. Where it is less than the pager
    was made with, `Shrunk` follows as soon as nothing can name a block from ``gpu_blocks`` on any
    more: cached pages there are dropped at once, and blocks of running sequences are moved
    (`CopyBlock`). While there is no room to move them to (`kvpager.Pager.excess`), the caller has
    to preempt somebody. A further `Pressure` takes the place of one that was not answered yet.
    """

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


@dataclass(frozen=True, slots=True)
class PageName:
    """What a full page is called, whoever computed it and wherever it lies."""

    digest: bytes
    """32 bytes: the SHA-256 chain over all tokens up to its end."""
    before: bytes | None
    """The digest of the page in front of it; None for the first of a chain, and where it is not
    known any more."""
    owner: int = 0
    """`Admit.owner` of whoever computed it."""


@dataclass(frozen=True, slots=True)
class Adopt:
    """These slots of a lower tier already hold these pages, left there by an earlier life.

    They become cached pages; the first one is reclaimed first. A page that the tier has already is
    not taken a second time, and those beyond the cache's share of the tier are let go at once, in
    that order. Nothing is answered.
    """

    tier: Tier
    pages: tuple[tuple[int, PageName], ...]
    """Slot and page, each slot free and named once."""


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
    | Adopt
)

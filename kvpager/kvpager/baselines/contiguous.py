"""One contiguous span per sequence, reserved when it is admitted: how Orca keeps KV memory."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvpager.baselines.buddy import BuddyAllocator, Span
from kvpager.baselines.reservation import Reservation
from kvpager.errors import ImpossibleEventError, InvariantError
from kvpager.types import (
    Admit,
    Admitted,
    CopyBlock,
    DeferReason,
    Deferred,
    Denied,
    Event,
    Fork,
    Free,
    Instruction,
    PagerStats,
    PoolSplit,
    Release,
    Reserve,
    Reserved,
    Shortage,
    StepFailed,
    StepLaunched,
    StepRetired,
    TierUsage,
    Truncate,
)

KnownOutput: TypeAlias = Callable[[Admit], int]
"""The tokens a request will truly generate. What *reserved* and *internal* waste are told apart by,
and what Pow2 and Oracle reserve by."""

_STORY = 16
"""Events kept for error messages."""


@dataclass(slots=True)
class _Held:
    """One sequence and its span. ``reserved`` slots of the span were asked for, ``truth`` of them
    will be used; the rest of the span is the allocator's rounding."""

    span: Span
    reserved: int
    truth: int
    computed: int = 0
    launched: int = 0


class ContiguousPager:
    """Admission and memory of a server that needs contiguous KV (Orca, paper section 6.1).

    Its blocks are single slots: ``block_tokens`` is 1. Nothing is shared, cached, preempted or
    grown: a sequence is admitted once a span for its whole reservation is free, a request of
    several samples once there is one for each, and a fork copies (`CopyBlock` of all its tokens).
    Events that contiguous memory has no answer to raise `ImpossibleEventError`.
    """

    def __init__(
        self, slots: int, reservation: Reservation, known_output: KnownOutput, longest: int = 2048
    ) -> None:
        """An empty pool of ``slots`` slots whose sequences have at most ``longest`` tokens."""
        self._buddy = BuddyAllocator(slots)
        self._reservation = reservation
        self._known_output = known_output
        self._longest = longest
        self._held: dict[int, _Held] = {}
        self._unforked: dict[int, list[_Held]] = {}
        self._steps: deque[StepLaunched] = deque()
        self._slots = np.arange(slots, dtype=np.int32)
        self._story: deque[str] = deque(maxlen=_STORY)
        self._prompt_tokens = 0
        self._copied = 0

    # ------------------------------------------------------------------------------------- events

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event; returns what follows, like `kvpager.Pager.handle`.

        Raises:
            ImpossibleEventError: It cannot follow what came before, or contiguous memory cannot do
                it (preempt, resume, transfers, pressure). The state is unchanged.
        """
        match event:
            case Admit():
                instructions = self._admit(event)
            case Fork():
                instructions = self._fork(event)
            case Reserve():
                instructions = [self._reserve(event)]
            case StepLaunched():
                instructions = self._launched(event)
            case StepRetired() | StepFailed():
                instructions = self._step_over(event)
            case Truncate(seq=seq, length=length):
                held = self._of(seq)
                held.computed = min(held.computed, length)
                instructions = []
            case Free(seq=seq):
                self._of(seq)
                instructions = self._free(seq)
            case _:
                raise self._impossible(f"contiguous memory has no {type(event).__name__}")
        self._story.append(_told(event))
        return instructions

    def _admit(self, event: Admit) -> list[Instruction]:
        if event.seq in self._held:
            raise self._impossible(f"sequence {event.seq} is here already")
        prompt, output = len(event.tokens), self._known_output(event)
        reserved = self._reservation(prompt, output, self._longest)
        if reserved < prompt or self._buddy.fits(reserved) < event.width:
            return [Denied(event.seq, reserved * event.width, self._buddy.slots)]
        if not self._open:
            return [self._deferred(event, reserved)]
        spans: list[Span] = []
        while len(spans) < event.width and (span := self._buddy.allocate(reserved)) is not None:
            spans.append(span)
        if len(spans) < event.width:
            for span in spans:
                self._buddy.release(span)
            return [self._deferred(event, reserved)]
        truth = min(prompt + output, reserved)
        held = [_Held(span, reserved, truth) for span in spans]
        self._held[event.seq] = held[0]
        if len(held) > 1:
            self._unforked[event.seq] = held[1:]
        self._prompt_tokens += prompt
        return [Admitted(event.seq, computed=0, loading=False)]

    @property
    def _open(self) -> bool:
        """Whether newcomers may join now: with iteration-level batching always."""
        return True

    def _deferred(self, event: Admit, reserved: int) -> Deferred:
        need = reserved * event.width
        return Deferred(event.seq, DeferReason.BLOCKS, need, self._buddy.free_slots)

    def _fork(self, event: Fork) -> list[Instruction]:
        parent = self._of(event.parent)
        spare = self._unforked.get(event.parent, [])
        if len(event.children) > len(spare):
            raise self._impossible(
                f"{len(event.children)} children of {event.parent}, room for {len(spare)}"
            )
        copies: list[Instruction] = []
        for child in event.children:
            held = spare.pop(0)
            held.computed = parent.computed
            self._held[child] = held
            self._copied += parent.computed
            copies.append(CopyBlock(child, 0, parent.span.start, held.span.start, parent.computed))
        if not spare:
            self._unforked.pop(event.parent, None)
        return copies

    def _reserve(self, event: Reserve) -> Reserved:
        short: list[Shortage] = []
        for seq, count in zip(event.seqs, event.counts, strict=True):
            held = self._of(seq)
            missing = held.computed + count - held.reserved
            if missing > 0:
                short.append(Shortage(seq, missing))
        return Reserved(tuple(short))

    def _launched(self, event: StepLaunched) -> list[Instruction]:
        for seq, count in zip(event.seqs, event.counts, strict=True):
            held = self._of(seq)
            if held.computed + held.launched + count > held.reserved:
                raise self._impossible(f"step {event.epoch} writes past the span of {seq}")
        for seq, count in zip(event.seqs, event.counts, strict=True):
            self._held[seq].launched += count
        self._steps.append(event)
        return []

    def _step_over(self, event: StepRetired | StepFailed) -> list[Instruction]:
        if not self._steps or self._steps[0].epoch != event.epoch:
            raise self._impossible(f"step {event.epoch} is not the oldest in flight")
        launched = self._steps[0]
        kept = [0] * len(launched.seqs)
        if isinstance(event, StepRetired):
            kept = [len(tokens) for tokens in event.tokens]
            if len(kept) != len(launched.seqs) or any(map(operator.gt, kept, launched.counts)):
                raise self._impossible(f"step {event.epoch} retires more than was launched")
        self._steps.popleft()
        for seq, count, computed in zip(launched.seqs, launched.counts, kept, strict=True):
            # Sequences may have ended meanwhile.
            if (held := self._held.get(seq)) is not None:
                held.launched -= count
                held.computed += computed
        return []

    def _free(self, seq: int) -> list[Instruction]:
        for held in [self._held.pop(seq), *self._unforked.pop(seq, [])]:
            self._buddy.release(held.span)
        return [Release(seq)]

    # ---------------------------------------------------------------------------------- what it is

    def block_table(self, seq: int) -> npt.NDArray[np.int32]:
        """The slots of ``seq`` in order, int32; a view."""
        held = self._of(seq)
        start = held.span.start
        return self._slots[start : start + held.computed + held.launched]

    def choose_victim(self, candidates: Sequence[int]) -> int | None:
        """None: nobody can be paged out, and nobody has to, since all room is reserved."""
        return None

    def observe(self, **measured: float) -> None:
        """Nothing here depends on what things cost."""

    def split(self) -> PoolSplit:
        """The four-way split of what is allocated (paper, figures 2 and 3), in tokens.

        ``reserved`` are slots a running sequence will yet fill, ``internal`` those of its
        reservation that it never will, ``external`` the allocator's rounding to a power of two.
        What is missing to the size of the pool is free.
        """
        held = [*self._held.values(), *(h for spare in self._unforked.values() for h in spare)]
        token_state = sum(h.computed for h in held)
        truth = sum(h.truth for h in held)
        reserved = sum(h.reserved for h in held)
        spans = sum(h.span.size for h in held)
        return PoolSplit(token_state, truth - token_state, reserved - truth, spans - reserved)

    def stats(self) -> PagerStats:
        """A snapshot; one block is one slot."""
        total, free = self._buddy.slots, self._buddy.free_slots
        nothing = TierUsage(0, 0, 0, 0)
        return PagerStats(
            gpu=TierUsage(total, total - free, 0, free),
            ram=nothing,
            disk=nothing,
            split=self.split(),
            sequences_running=len(self._held),
            sequences_swapped=0,
            sequence_ids_total=0,
            prompt_tokens=self._prompt_tokens,
            hit_tokens=0,
            stored_pages=0,
            loaded_pages=0,
            restores=0,
            copied_blocks=self._copied,
            preemptions_swap=0,
            preemptions_recompute=0,
        )

    def validate(self) -> None:
        """Check the allocator, and that every span belongs to exactly one sequence.

        Raises:
            InvariantError: A contradiction.
        """
        self._buddy.validate()
        spans = sorted(span.start for span in self._spans())
        taken = [span.start for span in self._buddy.spans()[0]]
        if spans != taken:
            raise InvariantError(f"sequences hold spans {spans}, the allocator gave {taken}")
        for seq, held in self._held.items():
            if not 0 <= held.computed <= held.computed + held.launched <= held.reserved:
                raise InvariantError(f"sequence {seq} is not within its span: {held}")

    def story(self) -> tuple[str, ...]:
        """The last events, oldest first."""
        return tuple(self._story)

    def _spans(self) -> list[Span]:
        waiting = (held for spare in self._unforked.values() for held in spare)
        return [held.span for held in [*self._held.values(), *waiting]]

    def _of(self, seq: int) -> _Held:
        held = self._held.get(seq)
        if held is None:
            raise self._impossible(f"unknown sequence {seq}")
        return held

    def _impossible(self, why: str) -> ImpossibleEventError:
        return ImpossibleEventError(why, self.story())


def _told(event: Event) -> str:
    if isinstance(event, Admit):
        return f"Admit(seq={event.seq}, tokens={len(event.tokens)}, width={event.width})"
    if isinstance(event, StepRetired):
        return f"StepRetired(epoch={event.epoch})"
    return repr(event)

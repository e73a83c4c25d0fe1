"""The live sequences, and what the pager has decided about them."""

from __future__ import annotations

from kvpager.types import (
    Admitted,
    Event,
    Free,
    Instruction,
    Preempt,
    Preempted,
    PreemptMode,
    Runnable,
)
from pagedd_daemon.engine.pool import Pool
from pagedd_daemon.engine.work import Sequence, SequenceState


class Residents:
    """The sequences that live, each in the state that the pager has it in."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.sequences: dict[int, Sequence] = {}
        """By number, oldest first."""
        self.preempted: list[Sequence] = []
        """Those that are paged out, in the order in which they were."""
        self.evicted: set[int] = set()
        """Paged out since the decodes of this plan got their room."""
        self._held: dict[int, int] = {}
        """Of requests that have ended and whose KV is held: their sequences."""
        self._next_seq = 0
        self.heard = False
        """A transfer has ended that may have kept somebody out, since the caller cleared this."""

    def hold(self, sequence: Sequence) -> None:
        """A sequence that is over keeps its pages in a lower tier until `drop`, as one that is
        paged out does; it never comes back."""
        if sequence.state in (SequenceState.RUNNING, SequenceState.LOADING):
            self.tell(Preempt(sequence.seq, PreemptMode.SWAP))
        self._held[sequence.request.rid] = sequence.seq

    def drop(self, rid: int) -> None:
        """What the request left behind becomes cached pages like any other's."""
        if (seq := self._held.pop(rid, None)) is not None:
            self.tell(Free(seq))

    def take_id(self) -> int:
        """A number that no sequence has had."""
        self._next_seq += 1
        return self._next_seq

    def tell(self, event: Event) -> list[Instruction]:
        """Give the pager an event and take over what it decides; returns its instructions."""
        instructions = self.pool.handle(event)
        self.settle(instructions)
        return instructions

    def hear(self) -> None:
        """Take over what follows from the transfers that have ended."""
        coming, ended = self.pool.room_coming, self.pool.ended
        self.settle(self.pool.settle())
        if self.pool.ended != ended:
            # A block that was merely written through makes room where the copy was all that kept
            # it. While somebody runs, who waits is asked again when that one ends.
            self.heard |= coming or not any(s.runs for s in self.sequences.values())

    def settle(self, instructions: list[Instruction]) -> None:
        """Take over what the pager decided about sequences."""
        for verdict in instructions:
            match verdict:
                case Admitted(seq=seq, computed=computed, loading=loading, until=until):
                    sequence = self.sequences[seq]
                    sequence.computed, sequence.until = computed, until
                    if sequence.state is SequenceState.PREEMPTED:
                        self.preempted.remove(sequence)
                    sequence.state = SequenceState.LOADING if loading else SequenceState.RUNNING
                case Runnable(seq=seq, computed=computed, until=until) if seq in self.sequences:
                    sequence = self.sequences[seq]
                    sequence.computed, sequence.until = computed, until
                    sequence.state = SequenceState.RUNNING
                case Preempted(seq=seq) if seq in self.sequences:
                    sequence = self.sequences[seq]
                    sequence.state, sequence.until = SequenceState.PREEMPTED, -1
                    self.preempted.append(sequence)
                    self.evicted.add(seq)
                case _:
                    pass

"""Static, request-level batches: how FasterTransformer is driven (paper, section 6.1)."""

from __future__ import annotations

from dataclasses import replace

from kvpager.baselines.buddy import Span
from kvpager.baselines.contiguous import ContiguousPager, KnownOutput
from kvpager.baselines.reservation import longest
from kvpager.types import Event, Instruction, PoolSplit, Release, StepLaunched


class StaticBatchPager(ContiguousPager):
    """Reserves the longest sequence for each, and keeps a batch together from start to end.

    Newcomers may join until the first step of the batch; from then on they wait until all of it
    has ended, and the memory of those that end early stays taken until then.
    """

    def __init__(self, slots: int, known_output: KnownOutput, longest_sequence: int = 2048) -> None:
        """An empty pool of ``slots``; a sequence has at most ``longest_sequence`` tokens."""
        super().__init__(slots, longest, known_output, longest_sequence)
        self._closed = False
        self._ended: list[Span] = []

    @property
    def batch_width(self) -> int:
        """Sequences every step of this batch computes: ended ones too, as padding."""
        return len(self._held) + len(self._ended)

    def split(self) -> PoolSplit:
        """Like `ContiguousPager.split`; what ended sequences keep is ``internal``."""
        split = super().split()
        kept = sum(span.size for span in self._ended)
        return replace(split, internal=split.internal + kept)

    @property
    def _open(self) -> bool:
        return not self._closed

    def handle(self, event: Event) -> list[Instruction]:
        """Like `ContiguousPager.handle`."""
        instructions = super().handle(event)
        if isinstance(event, StepLaunched):
            self._closed = True
        return instructions

    def _free(self, seq: int) -> list[Instruction]:
        held = [self._held.pop(seq), *self._unforked.pop(seq, [])]
        self._ended += [h.span for h in held]
        if not self._held:
            for span in self._ended:
                self._buddy.release(span)
            self._ended.clear()
            self._closed = False
        return [Release(seq)]

    def _spans(self) -> list[Span]:
        return [*super()._spans(), *self._ended]

"""Decode steps of the same sequences that the pager sees as one."""

from __future__ import annotations

from kvpager.types import Tokens
from pagedd_daemon.backends.base import Step
from pagedd_daemon.engine.work import Sequence

STRETCH_STEPS = 16
"""Steps at most: room for so many tokens is reserved ahead, a block for each sequence. What is done
between two stretches takes 450 µs with the cold caches that a step of llama.cpp leaves."""


def steps_ahead(sequences: list[Sequence], context_tokens: int) -> int:
    """Steps until the first of these must end, at most `STRETCH_STEPS`.

    One, where the last token of a prompt is to be computed, whose other samples fork right after,
    and where there are beams, which may all fork.
    """
    if any(s.generated == 0 or s.request.beams is not None for s in sequences):
        return 1
    left = (
        min(s.request.stop.max_tokens - s.generated, context_tokens - len(s.tokens))
        for s in sequences
    )
    return min(STRETCH_STEPS, *left)


class Stretch:
    """While nobody comes, goes, or needs room, a decode step decides nothing: the same sequences
    take their next token. So the pager is told once, of several tokens each; whatever happens ends
    the stretch first, with as many tokens as were computed by then. Its steps come one after the
    other, never two in flight.
    """

    def __init__(self, step: Step, sequences: list[Sequence], steps: int) -> None:
        """``step`` is the first one; its runs are reused for the others."""
        self.parts = [(sequence, 1) for sequence in sequences]
        """Who takes part in each of its steps, with how many tokens."""
        self.seconds: list[float] = []
        """What each of its steps took that have retired."""
        self._step = step
        self._sequences = sequences
        self._starts = [sequence.computed for sequence in sequences]
        self._steps = steps

    @property
    def epoch(self) -> int:
        """Of all its steps: the pager knows one."""
        return self._step.epoch

    @property
    def done(self) -> int:
        """Steps that have retired."""
        return len(self.seconds)

    @property
    def left(self) -> int:
        """Steps that have not retired."""
        return self._steps - self.done

    def next_step(self) -> Step:
        """The step in which every sequence computes the token it got last."""
        for run, sequence in zip(self._step.runs, self._sequences, strict=True):
            at = sequence.computed
            run.start = at
            run.tokens = sequence.tokens.view(at, at + 1)
            sequence.computed = at + 1
        return self._step

    def step_done(self, seconds: float) -> bool:
        """One more step has retired, which took ``seconds``; whether it was the last."""
        self.seconds.append(seconds)
        return len(self.seconds) == self._steps

    def tokens(self) -> tuple[Tokens, ...]:
        """What each sequence computed, for `kvpager.types.StepRetired`."""
        return tuple(
            sequence.tokens.view(start, start + self.done)
            for sequence, start in zip(self._sequences, self._starts, strict=True)
        )

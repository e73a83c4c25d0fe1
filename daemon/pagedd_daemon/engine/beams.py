"""Beam search over the candidates that each beam's logits bring: which live on, which have ended.

Nothing here knows of sequences, blocks or steps (`pagedd_daemon.engine.branches` does). Candidates,
scores and ends are those of transformers' ``generate(num_beams=...)``; ties go to the better beam,
then to the lowest id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pagedd_daemon.engine.sampler import Drawn
from pagedd_daemon.params import BeamParams, StopParams


@dataclass(frozen=True, slots=True)
class Node:
    """The last token of a text, and the text before it, which others may share."""

    drawn: Drawn
    before: Node | None


@dataclass(frozen=True, slots=True)
class Beam:
    """A text that is being followed."""

    score: float
    """Sum of the log-probabilities of its tokens."""
    last: Node | None
    """None: nothing generated yet."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text that has ended."""

    score: float
    """See `pagedd_daemon.params.BeamParams.length_penalty`."""
    last: Node | None
    """Its last token but the one that ended it."""
    reason: str
    """``stop``, ``length`` or ``context``."""

    def tokens(self) -> list[Drawn]:
        """Its tokens, the first one first."""
        drawn: list[Drawn] = []
        node = self.last
        while node is not None:
            drawn.append(node.drawn)
            node = node.before
        return drawn[::-1]


@dataclass(frozen=True, slots=True)
class Step:
    """Where a beam of the next step comes from."""

    parent: int
    """Rank of the beam it continues, 0 the best."""
    token: int


class BeamSearch:
    """One search.

    Attributes:
        running: The beams, best first; one without tokens before the first step.
        ended: The texts that have ended, best first, at most as many as beams.
        over: No further step is of use.
    """

    def __init__(
        self, params: BeamParams, stop: StopParams, eog_tokens: Collection[int], logprobs: int
    ) -> None:
        """A search that has not begun.

        Args:
            params: How to search.
            stop: When a text ends.
            eog_tokens: The model's end-of-generation ids.
            logprobs: Most likely tokens to keep beside each token of the texts; -1: not even the
                token's own log-probability.
        """
        self._params = params
        self._stop = stop
        self._logprobs = logprobs
        self._ends = frozenset(eog_tokens) | frozenset(stop.stop_token_ids)
        self._never = frozenset(eog_tokens if stop.ignore_eos else ())
        self.length = 0
        """Tokens of each running beam."""
        self.running = [Beam(0.0, None)]
        self.ended: list[Hypothesis] = []
        self.over = False

    @property
    def width(self) -> int:
        """Beams at most."""
        return self._params.width

    @property
    def candidates(self) -> int:
        """Tokens to look at after each beam, the most likely ones: of these ``width`` may end their
        texts, and as many go on, whatever is left out and ends."""
        return 2 * self._params.width + len(self._ends)

    def advance(self, found: Sequence[Drawn]) -> list[Step]:
        """Take a step.

        Args:
            found: For each running beam its `candidates` (`Drawn.top`).

        Returns:
            What the running beams are from now on, best first; unless the search is over.
        """
        width, penalty = self._params.width, self._params.length_penalty
        hidden = self._ends if self.length < self._stop.min_tokens else self._never
        ranked = sorted(
            (-(beam.score + logprob), rank, token, logprob)
            for rank, (beam, drawn) in enumerate(zip(self.running, found, strict=True))
            for token, logprob in drawn.top
            if token not in hidden
        )
        self.length += 1
        full = self.length >= self._stop.max_tokens
        steps: list[Step] = []
        running: list[Beam] = []
        for place, (negative, rank, token, logprob) in enumerate(ranked):
            ends = token in self._ends
            if place >= width and (len(running) == width or full):
                break
            before = self.running[rank].last
            drawn = self._kept(token, logprob, found[rank])
            if ends or full:
                if place < width:
                    score = -negative / self.length**penalty
                    last = before if ends else Node(drawn, before)
                    self.ended.append(Hypothesis(score, last, "stop" if ends else "length"))
            elif len(running) < width:
                running.append(Beam(-negative, Node(drawn, before)))
                steps.append(Step(rank, token))
        self._keep_best()
        self.over = full or not running or not self._improvable(running[0].score)
        if not self.over:
            self.running = running
        return steps

    def conclude(self) -> None:
        """There is no room to go on: what is running has ended where it is."""
        if not self.over and self.length:
            scale = self.length**self._params.length_penalty
            self.ended += [Hypothesis(b.score / scale, b.last, "context") for b in self.running]
            self._keep_best()
        self.over = True

    def _kept(self, token: int, logprob: float, found: Drawn) -> Drawn:
        if self._logprobs < 0:
            return Drawn(token)
        return Drawn(token, logprob, found.top[: self._logprobs])

    def _keep_best(self) -> None:
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[self._params.width :]

    def _improvable(self, best: float) -> bool:
        """Whether going on may change the texts that have ended, ``best`` being the sum of the best
        beam that runs."""
        params = self._params
        if len(self.ended) < params.width:
            return True
        if params.early_stopping is True:
            return False
        hopeful = params.early_stopping == "never" and params.length_penalty > 0.0
        length = self._stop.max_tokens if hopeful else self.length
        scale: float = length**params.length_penalty
        return best / scale > self.ended[-1].score

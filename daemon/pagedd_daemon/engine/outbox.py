"""What the engine has to say, gathered into one report for as long as that delays nobody."""

from __future__ import annotations

from collections.abc import Callable

from pagedd_daemon import messages as m
from pagedd_daemon.engine.sampler import Drawn

HOLD_S = 0.050
"""The longest a token waits for those after it, where the engine computes on the cores that front
and apps need too. Text then moves at least ten times a second: steps of up to 50 ms go two to a
report, shorter ones more. A report to front and app costs 350 µs of the step it interrupts, 6 % of
a step of SmolLM2 at one stream on 2 cores."""


class Outbox:
    """The report being filled."""

    def __init__(self, hold_s: float) -> None:
        """``hold_s``: how long a token may be held back; 0 says everything at once."""
        self.hold_s = hold_s
        self._report = m.StepReport(0)
        self._open: dict[tuple[int, int], m.Output] = {}
        """What is being said of each sample."""
        self._since = 0.0
        """Time of the oldest token in it."""
        self._urgent = False

    def output(self, rid: int, index: int, drawn: Drawn, now: float, *, first: bool) -> None:
        """A token of a sample, known since ``now``; somebody waits for a ``first`` one."""
        token = drawn.token.to_bytes(4, "little")
        logprobs = None if drawn.logprob is None else [(drawn.logprob, [*drawn.top])]
        held = self._open.get((rid, index))
        if held is None:
            if not self._open:
                self._since = now
            held = self._open[rid, index] = m.Output(rid, index, token, logprobs)
            self._report.outputs.append(held)
        else:
            held.tokens += token
            if held.logprobs is not None and logprobs is not None:
                held.logprobs += logprobs
        self._urgent |= first

    def oldest(self, now: float) -> float:
        """Since when the oldest token that is held back is known: ``now``, if none is."""
        return self._since if self._open else now

    def started(self, rid: int, cached_tokens: int) -> None:
        """A request's prompt begins to be computed."""
        self._report.started.append((rid, cached_tokens))

    def prompt(self, scores: m.PromptScores) -> None:
        """Log-probabilities of a part of a prompt."""
        self._report.prompts.append(scores)
        self._urgent = True

    def ended(self, ended: m.Ended) -> None:
        """A sample is over."""
        self._report.ended.append(ended)
        self._urgent = True

    def closed(self, closed: m.Closed) -> None:
        """A request is over."""
        self._report.closed.append(closed)
        self._urgent = True

    def embedded(self, embedded: m.Embedded) -> None:
        """Vectors are there, or will never be."""
        self._report.embedded.append(embedded)
        self._urgent = True

    def rejected(self, rejected: m.Rejected) -> None:
        """A request has failed."""
        self._report.rejected.append(rejected)
        self._urgent = True

    def due(self, now: float, step_s: float) -> bool:
        """Whether to speak now and not after another step, which takes ``step_s`` seconds."""
        return self._urgent or now + step_s > self._since + self.hold_s

    def say(self, say: Callable[[m.StepReport], None], steps: int) -> None:
        """Send what there is, if anything, and begin anew."""
        report = self._report
        if not (self._urgent or report.outputs or report.started):
            return
        self._report = m.StepReport(0)
        self._open.clear()
        self._urgent = False
        report.steps = steps
        say(report)

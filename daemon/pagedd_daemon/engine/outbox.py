"""What the engine has to say, gathered into one report for as long as that delays nobody."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvpager.types import PriorityClass
from pagedd_daemon import messages as m
from pagedd_daemon.engine.sampler import Drawn

HOLD_S = {
    PriorityClass.INTERACTIVE: 0.050,
    PriorityClass.NORMAL: 0.125,
    PriorityClass.BACKGROUND: 0.250,
}
"""The longest a token waits for those after it, where the engine computes on the cores that front
and apps need too. Text that comes twenty times a second seems to flow, at eight times it is still
read as it comes, and nobody reads along with work in the background. A report to front and app
costs the step it interrupts 350 µs at one stream of SmolLM2 on 2 cores, 6 % of a step, and 1.7 ms
at 16, 3 %."""


AT_ONCE = -math.inf
"""The time until which something may wait that may not."""


class Outbox:
    """The report being filled."""

    def __init__(self) -> None:
        self._report = m.StepReport(0)
        self._open: dict[tuple[int, int], m.Output] = {}
        """What is being said of each sample."""
        self._until = math.inf
        """When it has to be said; infinity: there is nothing to say."""

    def output(self, rid: int, index: int, drawn: Drawn, until: float) -> None:
        """A token of a sample, which may wait ``until`` then; somebody waits for a first one."""
        token = drawn.token.to_bytes(4, "little")
        logprobs = None if drawn.logprob is None else [(drawn.logprob, [*drawn.top])]
        held = self._open.get((rid, index))
        if held is None:
            held = self._open[rid, index] = m.Output(rid, index, token, logprobs)
            self._report.outputs.append(held)
        else:
            held.tokens += token
            if held.logprobs is not None and logprobs is not None:
                held.logprobs += logprobs
        self._until = min(self._until, until)

    def started(self, rid: int, cached_tokens: int) -> None:
        """A request's prompt begins to be computed."""
        self._report.started.append((rid, cached_tokens))
        self._until = AT_ONCE

    def prompt(self, scores: m.PromptScores) -> None:
        """Log-probabilities of a part of a prompt."""
        self._report.prompts.append(scores)
        self._until = AT_ONCE

    def ended(self, ended: m.Ended) -> None:
        """A sample is over."""
        self._report.ended.append(ended)
        self._until = AT_ONCE

    def closed(self, closed: m.Closed) -> None:
        """A request is over."""
        self._report.closed.append(closed)
        self._until = AT_ONCE

    def embedded(self, embedded: m.Embedded) -> None:
        """Vectors are there, or will never be."""
        self._report.embedded.append(embedded)
        self._until = AT_ONCE

    def rejected(self, rejected: m.Rejected) -> None:
        """A request has failed."""
        self._report.rejected.append(rejected)
        self._until = AT_ONCE

    @property
    def until(self) -> float:
        """When what is held back has to be said; infinity, if nothing is."""
        return self._until

    def due(self, now: float, step_s: float) -> bool:
        """Whether to speak now and not after another step, which takes ``step_s`` seconds."""
        return now + step_s > self._until

    def say(self, say: Callable[[m.StepReport], None], steps: int) -> None:
        """Send what there is, if anything, and begin anew."""
        if self._until == math.inf:
            return
        report, self._report = self._report, m.StepReport(0)
        self._open.clear()
        self._until = math.inf
        report.steps = steps
        say(report)

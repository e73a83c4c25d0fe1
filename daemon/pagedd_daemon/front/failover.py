"""What the front does when an engine dies: how often it may, and how live requests go on elsewhere.

The journal of a live request is what the front keeps of it anyway: its prompt, every token that was
received of each sample (those whose text is held back, too), and with their number the position of
the sampler, whose draws depend on nothing but seed, sample and position. A new engine gets each
sample that goes on as a request of its own, prompt and tokens together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.messages import Closed, Submit

if TYPE_CHECKING:
    from array import array

POISON = 3
"""Engines that may die while they have a request, before it counts as the cause."""

WINDOW_S = 60.0
"""Deaths of engines are counted over so many seconds."""


class Journalled(Protocol):
    """One sample, as far as it has come."""

    ids: array[int]
    reason: str | None


def resumed(submit: Submit, samples: Sequence[Journalled]) -> Iterator[Submit]:
    """What a new engine is told of a request: ``submit`` as it was sent first, without rids.

    A request none of whose tokens was seen begins anew; else each sample that has not ended goes on
    behind its own tokens.
    """
    if not any(sample.ids or sample.reason for sample in samples):
        yield submit
        return
    for index, sample in enumerate(samples):
        if sample.reason is None:
            known = submit.prompt + pack_ids(sample.ids)
            yield replace(
                submit,
                n=1,
                index=index,
                prompt=known,
                generated=len(sample.ids),
                prompt_logprobs=-1,  # they were told before the first token was
            )


def accounted(
    prompt_tokens: int,
    cached_tokens: int,
    samples: Sequence[Journalled],
    times: tuple[float, float, float, float],
) -> Closed:
    """The last word on a request that several engines have worked on, which none of them has.

    ``times``: when it was submitted, begun, had its first token, and ended; the clock's seconds, 0
    for what never happened.
    """
    submitted, begun, first, end = times
    begun = begun or end
    first = first or begun
    return Closed(
        rid=0,
        prompt_tokens=prompt_tokens,
        cached_tokens=max(0, cached_tokens),
        generated_tokens=sum(len(sample.ids) for sample in samples),
        queue_ms=(begun - submitted) * 1e3,
        prompt_ms=(first - begun) * 1e3,
        generation_ms=(end - first) * 1e3,
        ttft_ms=(first - submitted) * 1e3,
    )


class Next(Enum):
    """What follows the death of an engine."""

    REPLACE = "replace"
    FALL_BACK = "fall back"
    """Replace it by one that computes in another way, if there is one."""


class Deaths:
    """Counts engines that died although nobody stopped them."""

    def __init__(self, at_most: int) -> None:
        """At the ``at_most``-th death within `WINDOW_S` another engine of the kind is no use."""
        self._at_most = at_most
        self._times: deque[float] = deque(maxlen=at_most)
        self.total = 0

    def another(self, now: float) -> Next:
        """One more has died."""
        self.total += 1
        self._times.append(now)
        if len(self._times) == self._at_most and now - self._times[0] <= WINDOW_S:
            self._times.clear()
            return Next.FALL_BACK
        return Next.REPLACE

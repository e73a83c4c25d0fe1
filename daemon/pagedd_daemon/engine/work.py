"""Requests and sequences as the engine keeps them while they live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from kvpager.types import PriorityClass, Tokens
from pagedd_daemon.engine.fairness import Flow
from pagedd_daemon.engine.grammar import Matcher
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import SamplingParams, StopParams

if TYPE_CHECKING:
    from pagedd_daemon.engine.branches import BeamGroup


class SequenceState(Enum):
    """Where a sequence stands. Waiting requests have no sequence yet."""

    LOADING = "loading"
    """Its pages are on their way into the first tier."""
    RUNNING = "running"
    LEAVING = "leaving"
    """To be paged out once the step in flight that it takes part in is over."""
    PREEMPTED = "preempted"
    """Paged out; it holds nothing of the first tier."""
    ENDED = "ended"
    """Over; a step in flight may still compute for it, in vain."""


class TokenBuffer:
    """Token ids that grow at the end: int32, doubling, sliced without copies."""

    __slots__ = ("_data", "length")

    def __init__(self, tokens: Tokens, room: int) -> None:
        """A copy of ``tokens``, with room for more."""
        self._data = np.empty(max(len(tokens) + room, 16), dtype=np.int32)
        self._data[: len(tokens)] = tokens
        self.length = len(tokens)

    def __len__(self) -> int:
        return self.length

    def append(self, token: int) -> None:
        """Add one id."""
        if self.length == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self.length] = token
        self.length += 1

    def view(self, start: int, stop: int) -> Tokens:
        """Ids ``start`` to ``stop``, shape ``(stop - start,)``; valid until the next append."""
        assert 0 <= start <= stop <= self.length
        return self._data[start:stop]


@dataclass(slots=True, eq=False)
class Request:
    """One request of an app: a prompt and the samples drawn from it."""

    rid: int
    app: str
    klass: PriorityClass
    root: bytes
    prompt: Tokens
    """What was asked, shape ``(n,)``."""
    samples: int
    sampling: SamplingParams
    stop: StopParams
    submitted_s: float
    """Monotonic, like every other ``_s`` here."""
    resumed: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    """What an engine before this one has drawn for its only sample (`Submit.generated`)."""
    first_index: int = 0
    """Index of its first sample."""
    owner: int = 0
    """Whose pages it leaves, as in `pagedd_daemon.messages.Submit`."""
    hold: bool = False
    """Its KV is held in a lower tier when it has ended."""
    constrained: bool = False
    """Its output must match a grammar."""
    matcher: Matcher | None = None
    """At the start of its grammar, once that is compiled."""
    beams: BeamGroup | None = None
    """It searches: its sequences are beams, numbered as they come, and ``samples`` is 1."""
    prompt_logprobs: int = -1
    """As in `pagedd_daemon.messages.Submit`."""
    scored: int = 1
    """Then: the position of the prompt whose log-probability is to be said next."""
    paused: bool = False
    outgrown: bool = False
    """Paged out, and nothing that others give back helps it (the pool is too small just now, or its
    namespace has all it may have): nobody waits for its return."""
    started_s: float = 0.0
    """When its first step was planned; 0 before."""
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    cached_tokens: int = 0
    generated_tokens: int = 0
    """Over all its samples that have ended."""
    open_samples: set[int] = field(default_factory=set)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    """Live sequences by sample index."""
    flow: Flow | None = None
    """Its app and class, once the scheduler has asked whose it is."""
    bypassed: int = 0
    """Requests of its class that came in past it while it lacked room."""
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.prompt)

    @property
    def width(self) -> int:
        """Sequences it becomes once its prompt is computed."""
        return self.samples if self.beams is None else self.beams.search.width

    @property
    def known(self) -> Tokens:
        """All tokens it begins with: what was asked, and what was drawn before."""
        return np.concatenate((self.prompt, self.resumed)) if len(self.resumed) else self.prompt


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample's tokens: the prompt, then what was drawn.

    ``computed`` of them are in the pool, or will be when the steps in flight are over; the others
    wait to be a step's input. While decoding that is exactly the last one, which may not even be
    drawn yet: then a step in flight is ``drawing`` it.

    The properties are asked several times per sequence and step, for up to 256 of them: they are
    written to call nothing.
    """

    seq: int
    request: Request
    index: int
    sampler: Sampler
    tokens: TokenBuffer
    computed: int = 0
    drawing: int = 0
    """Steps in flight that draw a token for it."""
    state: SequenceState = SequenceState.RUNNING
    until: int = -1
    """Tokens from this position on are being loaded while those before it are computed; -1: none
    (`kvpager.types.Admitted.until`)."""
    charged: int = 0
    """Prompt tokens its app was charged for, cached ones before them included."""
    stepped: int = 0
    """Epoch of the last step it was in."""

    @property
    def computable(self) -> int:
        """Known tokens that may be computed now."""
        return (self.tokens.length if self.until < 0 else self.until) - self.computed

    @property
    def pending(self) -> int:
        """Tokens that no step has had as input yet; at least 1 while it lives, but for a beam whose
        search waits for other beams."""
        return self.tokens.length + self.drawing - self.computed

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return self.tokens.length - self.request.prompt_tokens

    @property
    def runs(self) -> bool:
        """Whether it may take part in a step."""
        request = self.request
        if self.state is not SequenceState.RUNNING or request.paused:
            return False
        if not self.drawing:
            return True
        if request.beams is not None:
            return False  # what becomes of it is known when its candidates are
        generated = self.tokens.length - request.prompt_tokens
        if generated + self.drawing >= request.stop.max_tokens:
            return False
        return generated > 0 or request.samples == 1

    @property
    def will_fork(self) -> bool:
        """Whether the other samples of its request fork from it when the step in flight is over."""
        return self.drawing > 0 and self.generated == 0 and self.request.samples > 1

    @property
    def removable(self) -> bool:
        """Whether it may be paged out now."""
        return self.state is SequenceState.RUNNING and not self.will_fork

    @property
    def decodes(self) -> bool:
        """Whether its next step is to compute the token that was drawn last."""
        if self.tokens.length + self.drawing - self.computed != 1 or self.until >= 0:
            return False
        return self.runs


class WaitingQueue:
    """Requests that have not begun: by class and app, in order of arrival within an app."""

    def __init__(self) -> None:
        self._lines: dict[tuple[PriorityClass, str], dict[int, Request]] = {}
        """Requests by their number; dictionaries keep the order of arrival."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """Class by class, app by app; the queue may change meanwhile."""
        for key in sorted(self._lines, key=lambda key: key[0]):
            yield from tuple(self._lines.get(key, {}).values())

    def lines(self) -> Iterator[tuple[Request, ...]]:
        """The requests of each app in each class, oldest first."""
        for line in tuple(self._lines.values()):
            yield tuple(line.values())

    def heads(self) -> Iterator[Request]:
        """Of each app in each class, the oldest request whose client reads."""
        for line in self._lines.values():
            head = next((request for request in line.values() if not request.paused), None)
            if head is not None:
                yield head

    def add(self, request: Request) -> None:
        """Behind those of its app and class."""
        self._lines.setdefault((request.klass, request.app), {})[request.rid] = request
        self._length += 1

    def remove(self, request: Request) -> bool:
        """Take it out; False if it is not waiting."""
        key = (request.klass, request.app)
        line = self._lines.get(key, {})
        if line.pop(request.rid, None) is None:
            return False
        self._length -= 1
        if not line:
            del self._lines[key]
        return True

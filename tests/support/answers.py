"""An engine over any backend, driven without processes: requests in, whole answers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Backend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.params import BeamParams, SamplingParams, StopParams

SALT = bytes(32)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request."""

    prompt: Sequence[int]
    n: int = 1
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    stop: StopParams = field(default_factory=lambda: StopParams(max_tokens=16, ignore_eos=True))
    beams: BeamParams | None = None
    regex: str = ""
    klass: int = 1
    prompt_logprobs: int = -1

    def message(self, rid: int, app: str) -> m.Submit:
        """The request as the front sends it."""
        return m.Submit(
            rid=rid,
            app=app,
            klass=self.klass,
            root=SALT,
            prompt=np.asarray(self.prompt, "<i4").tobytes(),
            n=self.n,
            sampling=asdict(self.sampling),
            stop=asdict(self.stop),
            grammar_kind="regex" if self.regex else "",
            grammar=self.regex,
            beams={} if self.beams is None else asdict(self.beams),
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(slots=True)
class Text:
    """One sample, or one text of a search."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    reason: str = ""
    score: float | None = None


@dataclass(slots=True)
class Answer:
    """What the engine said to a request."""

    texts: list[Text]
    prompt: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """Of each token of the prompt but the first."""
    closed: m.Closed | None = None
    rejected: m.Rejected | None = None

    @property
    def tokens(self) -> list[list[int]]:
        """Of every text."""
        return [text.tokens for text in self.texts]


class Asking:
    """Gives requests to an engine and collects what comes of them."""

    def __init__(self, backend: Backend, grammars: Grammars | None = None) -> None:
        self.backend = backend
        self.engine = Engine(backend, time.monotonic, grammars)
        self.answers: dict[int, Answer] = {}
        self.most_blocks = 0
        """Blocks of the first tier that running sequences held at the same time, at most."""

    def ask(self, ask: Ask, app: str = "app") -> int:
        """Submit a request; its number."""
        rid = len(self.answers) + 1
        self.answers[rid] = Answer([Text() for _ in range(ask.n)])
        self.engine.handle(ask.message(rid, app))
        return rid

    def step(self, *, single: bool = False) -> None:
        """One turn of the engine's loop; a ``single`` step at most, as if a message waited."""
        self.engine.step(self._said, lambda: single)
        self.most_blocks = max(self.most_blocks, self.blocks)

    @property
    def blocks(self) -> int:
        """Blocks of the first tier that running sequences hold now."""
        return self.engine._pool.pager.stats().gpu.used

    def run(self, until: Callable[[], bool] | None = None, most_s: float = 120.0) -> None:
        """Until everything is over, or ``until`` is so, which is asked after every step.

        Raises:
            TimeoutError: That takes too long.
        """
        end = time.monotonic() + most_s
        single = until is not None
        self.step(single=single)
        while self.engine.has_work and not (until and until()):
            if time.monotonic() > end:
                raise TimeoutError(f"requests did not end: {self.answers}")
            self.step(single=single)

    def all(self, asks: Sequence[Ask]) -> list[Answer]:
        """Submit these at once and run; their answers."""
        rids = [self.ask(ask, f"app{at % 3}") for at, ask in enumerate(asks)]
        self.run()
        return [self.answers[rid] for rid in rids]

    def _said(self, report: m.StepReport) -> None:
        for scores in report.prompts:
            told = self.answers[scores.rid].prompt
            assert scores.start == len(told) + 1, "a position was left out, or told twice"
            told += scores.logprobs
        for output in report.outputs:
            text = self.answers[output.rid].texts[output.index]
            text.tokens += np.frombuffer(output.tokens, "<i4").tolist()
            text.logprobs += output.logprobs or []
        for ended in report.ended:
            text = self.answers[ended.rid].texts[ended.index]
            text.reason, text.score = ended.reason, ended.score
        for closed in report.closed:
            self.answers[closed.rid].closed = closed
        for rejected in report.rejected:
            self.answers[rejected.rid].rejected = rejected

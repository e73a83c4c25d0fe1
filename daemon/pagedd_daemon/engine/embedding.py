"""Vectors of texts: pieces of work between the steps, a text at a time.

They take part in the turns between apps: their tokens are charged like those of prompts, and the
app that is owed most goes first. Beside requests that run, a piece is short, and the next one
waits for as long as it took, or nine times as long beside more important ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpager.types import PriorityClass, Tokens
from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Capabilities, Embedder, StepFaultError
from pagedd_daemon.engine.fairness import Flow
from pagedd_daemon.engine.pace import ATTENTIVE_TARGET_S, PREFILL_TARGET_S
from pagedd_daemon.engine.turns import Turns

MOST_TOKENS = 128
"""Of one piece: more would not be faster, and `LlamaEmbedder` keeps so many rows of logits."""
_LEAST_TOKENS = 16
_BESIDE_MORE_IMPORTANT = 9.0


@dataclass(slots=True)
class _Job:
    """A request."""

    rid: int
    app: str
    flow: Flow
    inputs: list[Tokens]
    normalize: bool
    done: int = 0
    """Tokens of the first of the inputs that are computed."""
    total: npt.NDArray[np.float64] | None = None
    """Sum of their hidden states."""
    vectors: list[npt.NDArray[np.float32]] = field(default_factory=list)


class Embeddings:
    """The requests for vectors that are not over."""

    def __init__(
        self,
        embedder: Embedder | None,
        caps: Capabilities,
        turns: Turns,
        clock: Callable[[], float],
        reply: Callable[[m.Embedded], None],
        left: Callable[[str], None],
    ) -> None:
        """``reply`` hears what came out, ``left`` of the app of each request that is over."""
        self._embedder = embedder
        self._caps = caps
        self._turns = turns
        self._clock = clock
        self._reply = reply
        self._left = left
        self._jobs: dict[int, _Job] = {}
        self._open: _Job | None = None
        """Whose text the embedder holds."""
        self._token_s = 0.0
        """Of the last piece, by token."""
        self._next_s = 0.0
        """When the next piece may be computed beside others' work."""
        self.pieces = 0
        """Computed since start."""

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return bool(self._jobs)

    def add(self, message: m.Embed) -> None:
        """A request, whose app is known."""
        flow = Flow(PriorityClass(message.klass), self._turns.policy(message.app).id)
        inputs = [np.frombuffer(ids, dtype="<i4").astype(np.int32) for ids in message.inputs]
        job = _Job(message.rid, message.app, flow, inputs, message.normalize)
        self._jobs[job.rid] = job
        longest, context = max(map(len, inputs)), self._caps.context_tokens
        if self._embedder is None:
            why = f"the backend {self._caps.name} computes no embeddings"
            self._fail(job, "E_NO_EMBEDDING", why, {"backend": self._caps.name})
        elif longest > context:
            why = f"a text has {longest} tokens, the context {context}"
            details: dict[str, Any] = {"prompt_tokens": longest, "context_tokens": context}
            self._fail(job, "E_TOO_LONG", why, details)

    def cancel(self, rid: int) -> None:
        """Nobody waits for it any more."""
        job = self._jobs.get(rid)
        if job is not None:
            self._over(job)

    def advance(self, beside: PriorityClass | None) -> bool:
        """Compute the next piece, if it is time for one; whether it was.

        Args:
            beside: The most important class that has other work.
        """
        now = self._clock()
        if self._embedder is None or not self._jobs:
            return False
        if beside is not None and now < self._next_s:
            return False
        job = self._turn()
        text = job.inputs[0]
        piece = text[job.done : job.done + self._budget(beside)]
        try:
            if not job.done:
                self._open = job
                self._embedder.begin(len(text))
            added = self._embedder.add(job.done, piece)
        except StepFaultError as fault:
            self._fail(job, "E_ENGINE", f"a text could not be computed: {fault}", {})
            return True
        self._turns.fair.charge(job.flow, len(piece), now)
        job.total = added if job.total is None else job.total + added
        job.done += len(piece)
        self.pieces += 1
        took = self._clock() - now
        self._token_s = took / len(piece)
        behind = beside is not None and beside < job.flow.klass
        self._next_s = now + took * (1 + (_BESIDE_MORE_IMPORTANT if behind else 1))
        if job.done == len(text):
            self._text_done(job)
        return True

    def _turn(self) -> _Job:
        """Whose piece is next: a text that was begun is finished first."""
        if self._open is not None and self._open.done:
            return self._open
        first = self._turns.fair.order({job.flow for job in self._jobs.values()})[0]
        return next(job for job in self._jobs.values() if job.flow == first)

    def _budget(self, beside: PriorityClass | None) -> int:
        """Tokens of the next piece."""
        if not self._token_s:
            return _LEAST_TOKENS
        target = PREFILL_TARGET_S if beside is None else ATTENTIVE_TARGET_S
        return int(min(max(target / self._token_s, _LEAST_TOKENS), MOST_TOKENS))

    def _text_done(self, job: _Job) -> None:
        assert job.total is not None
        mean = job.total / job.done
        if not np.isfinite(mean).all():
            self._fail(job, "E_ENGINE", "the model's output is not a number (NaN)", {})
            return
        if job.normalize:
            mean = mean / max(float(np.linalg.norm(mean)), 1e-30)
        job.vectors.append(mean.astype("<f4"))
        del job.inputs[0]
        job.done, job.total = 0, None
        if not job.inputs:
            vectors = b"".join(vector.tobytes() for vector in job.vectors)
            self._reply(m.Embedded(job.rid, len(mean), vectors))
            self._over(job)

    def _fail(self, job: _Job, code: str, why: str, details: dict[str, Any]) -> None:
        self._reply(m.Embedded(job.rid, 0, b"", code, why, details))
        self._over(job)

    def _over(self, job: _Job) -> None:
        del self._jobs[job.rid]
        if self._open is job:
            self._open = None
        if not self._jobs and self._embedder is not None:
            self._embedder.rest()
        self._left(job.app)

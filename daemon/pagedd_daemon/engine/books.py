"""The engine's books: the requests that are alive, whose they are, and how each ends.

What a step does to them is in `pagedd_daemon.engine.core`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

import numpy as np

from kvpager.types import PriorityClass, SetQuota
from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.engine.branches import search_for
from pagedd_daemon.engine.fairness import AppId
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.engine.outbox import AT_ONCE, Outbox
from pagedd_daemon.engine.pool import Pool
from pagedd_daemon.engine.scheduler import Scheduler
from pagedd_daemon.engine.snapshot import Totals
from pagedd_daemon.engine.turns import AppPolicy
from pagedd_daemon.engine.work import Request
from pagedd_daemon.grammars import GrammarError
from pagedd_daemon.params import BeamParams, SamplingParams, StopParams


class Books:
    """Every request from its message to its last word."""

    def __init__(
        self,
        caps: Capabilities,
        pool: Pool,
        scheduler: Scheduler,
        outbox: Outbox,
        clock: Callable[[], float],
        grammars: Grammars | None,
    ) -> None:
        """``grammars`` is None where no request may be constrained."""
        self._caps = caps
        self._pool = pool
        self._scheduler = scheduler
        self._outbox = outbox
        self._clock = clock
        self._grammars = grammars
        self.requests: dict[int, Request] = {}
        """Those that have not ended, by their number."""
        self.totals = Totals()
        self._live: Counter[str] = Counter()
        """Requests by app."""
        self._quotas: dict[str, bytes] = {}
        """Root of each app whose namespace has a quota."""

    def came(self, app: str) -> None:
        """The app has one request more."""
        self._live[app] += 1

    def submit(self, message: m.Submit) -> None:
        """Take a request: it is queued, or ended where it has nothing to wait for."""
        request = self._made_of(message)
        self.requests[request.rid] = request
        self.came(request.app)
        context = self._caps.context_tokens
        if message.generated and (over := _over(request, context)):
            self.end_sample(request, message.index, over)
        elif len(request.prompt) >= context:
            prompt = len(request.prompt)
            why = f"the prompt has {prompt} tokens, the context {context}"
            details: dict[str, object] = {"prompt_tokens": prompt, "context_tokens": context}
            self.reject(request, "E_TOO_LONG", why, details)
        elif message.beams and not self._begin_search(request, BeamParams(**message.beams)):
            return
        elif not request.constrained:
            self._scheduler.add(request)
        elif self._grammars is not None and self._caps.constrains:
            self._grammars.add(request, message.grammar_kind, message.grammar)
        else:
            why = f"the backend {self._caps.name} cannot constrain output"
            self.reject(request, "E_GRAMMAR", why, {"backend": self._caps.name})

    def _made_of(self, message: m.Submit) -> Request:
        known = np.frombuffer(message.prompt, dtype="<i4").astype(np.int32)
        asked = len(known) - message.generated
        stop = {**message.stop, "stop_token_ids": tuple(message.stop["stop_token_ids"])}
        return Request(
            rid=message.rid,
            app=message.app,
            klass=PriorityClass(message.klass),
            root=self.root(message.root),
            prompt=known[:asked],
            resumed=known[asked:],
            first_index=message.index,
            samples=1 if message.beams else message.n,
            sampling=SamplingParams(**message.sampling),
            stop=StopParams(**stop),
            submitted_s=self._clock(),
            open_samples=set(range(message.index, message.index + message.n)),
            constrained=bool(message.grammar_kind),
            prompt_logprobs=message.prompt_logprobs,
            owner=message.owner,
            hold=message.hold,
        )

    def _begin_search(self, request: Request, beams: BeamParams) -> bool:
        """Give a request its beam search; False if it is refused for its width."""
        request.beams = search_for(request, beams, self._caps)
        least, vocabulary = request.beams.search.candidates, self._caps.vocab_size
        if least <= vocabulary:
            return True
        width = request.width
        why = f"{width} beams look at {least} tokens, the vocabulary has {vocabulary}"
        details = {"field": "beam_width", "value": width, "vocab_size": vocabulary}
        self.reject(request, "E_FIELD", why, details)
        return False

    def take_grammars(self) -> None:
        """Queue the requests whose grammars have been compiled."""
        if self._grammars is None:
            return
        for request, made in self._grammars.compiled():
            if request.rid not in self.requests:
                continue  # cancelled meanwhile
            if isinstance(made, GrammarError):
                self.reject(request, "E_GRAMMAR", str(made), {})
                continue
            for token in request.resumed.tolist():
                made.accept(token)
            request.matcher = made
            if made.complete:
                self.end_sample(request, request.first_index, "stop")
            else:
                self._scheduler.add(request)

    def root(self, salt: bytes) -> bytes:
        """What the prefix chain of a namespace starts from: pages of another model, KV type or
        namespace can never be taken for one's own."""
        digest = hashlib.sha256(self._caps.model_digest)
        digest.update(self._caps.kv_dtype.encode())
        digest.update(salt)
        return digest.digest()

    def end_sample(
        self, request: Request, index: int, reason: str, keep: int | None = None
    ) -> None:
        """One sample is over, with its first ``keep`` generated tokens (all of them if None)."""
        if request.beams is not None:
            self._scheduler.branches.end(request.beams)
        sequence = request.sequences.pop(index, None)
        if sequence is not None:
            generated = sequence.generated if keep is None else min(keep, sequence.generated)
            request.generated_tokens += max(0, generated - len(request.resumed))
            hold = request.hold and reason != "cancelled"
            self._scheduler.end(sequence, keep_tokens=len(request.prompt) + generated, hold=hold)
        request.open_samples.discard(index)
        self._outbox.ended(m.Ended(request.rid, index, reason))
        if not request.open_samples:
            self._close(request)

    def end_search(self, request: Request) -> None:
        """A beam search is over: say what it has found."""
        if request.rid not in self.requests:
            return
        assert request.beams is not None
        search = request.beams.search
        search.conclude()
        self._scheduler.branches.end(request.beams)
        for index in sorted(request.open_samples):
            if index >= len(search.ended):  # fewer tokens may follow than there are beams
                self._outbox.ended(m.Ended(request.rid, index, "stop"))
                continue
            text = search.ended[index]
            for one in text.tokens():
                request.generated_tokens += 1
                self._outbox.output(request.rid, index, one, AT_ONCE)
            self._outbox.ended(m.Ended(request.rid, index, text.reason, text.score))
        request.open_samples.clear()
        self._close(request)

    def _close(self, request: Request) -> None:
        self._scheduler.withdraw(request)
        self._forget(request)
        self.totals.end(request)
        self._outbox.closed(_closed(request))

    def reject(
        self,
        request: Request,
        code: str,
        message: str,
        details: dict[str, object],
        *,
        cache: bool = True,
    ) -> None:
        """End a request with an error; nothing follows for it. Unless ``cache``, nobody finds what
        it computed."""
        self._scheduler.withdraw(request)
        if request.beams is not None:
            self._scheduler.branches.end(request.beams, cache=cache)
        for sequence in list(request.sequences.values()):
            self._scheduler.end(sequence, cache=cache)
        request.sequences.clear()
        self._forget(request)
        self._outbox.rejected(m.Rejected(request.rid, code, message, details))

    def _forget(self, request: Request) -> None:
        del self.requests[request.rid]
        self.left(request.app)

    def left(self, app: str) -> None:
        """The app has one request less."""
        self._live[app] -= 1
        if not self._live[app]:
            del self._live[app]
            self._scheduler.turns.forget(app)
            root = self._quotas.pop(app, None)
            if root is not None and root not in self._quotas.values():
                self._pool.handle(SetQuota(root))

    def tell_app(self, app: m.App) -> None:
        """Take over what is set for an app: its weight, its limits, its quota."""
        block, root = self._caps.block_tokens, self.root(app.root)
        floor, ceiling = -(-app.kv_floor_tokens // block), app.kv_ceiling_tokens // block
        policy = AppPolicy(AppId(app.uid, app.scope, app.name), app.weight, app.max_running, floor)
        self._scheduler.turns.tell(app.key, policy)
        if floor or ceiling or app.key in self._quotas:
            self._quotas[app.key] = root
            self._pool.handle(SetQuota(root, floor, ceiling))
        self._scheduler.wake()


def _over(request: Request, context_tokens: int) -> str:
    """Why a resumed sample has nothing more to draw: its engine died before it could say so."""
    if len(request.resumed) >= request.stop.max_tokens:
        return "length"
    if request.prompt_tokens + len(request.resumed) >= context_tokens:
        return "context"
    return ""


def _closed(request: Request) -> m.Closed:
    end = request.last_token_s
    started = request.started_s or end
    first = request.first_token_s or started
    return m.Closed(
        rid=request.rid,
        prompt_tokens=len(request.prompt),
        cached_tokens=request.cached_tokens,
        generated_tokens=request.generated_tokens,
        queue_ms=max(0.0, started - request.submitted_s) * 1e3,
        prompt_ms=max(0.0, first - started) * 1e3,
        generation_ms=max(0.0, end - first) * 1e3,
        ttft_ms=max(0.0, first - request.submitted_s) * 1e3,
    )

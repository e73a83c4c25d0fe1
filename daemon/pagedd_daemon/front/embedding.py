"""Requests for vectors: from the engine's queue back to their clients.

They are short and have no stream: what an engine that died has not said is asked of the next one
again, once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pagedd_daemon import messages as m
from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.apps import Apps, Standing
from pagedd_daemon.front.calls import Call
from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.model_ports import wire_error
from pagedd_daemon.front.models import Model
from pagedd_daemon.front.ports import Connection, Transport
from pagedd_daemon.front.requests import Embed


class Embedding(Call):
    """A request for vectors."""

    def __init__(
        self, transport: Transport, connection: Connection, request: Embed, account: Account
    ) -> None:
        super().__init__(transport, connection, request)
        self.account = account
        account.live += 1


@dataclass(slots=True, eq=False)
class _Job:
    call: Embedding
    standing: Standing
    model: Model
    message: m.Embed
    tokens: int
    tries: int = 0


class Embeddings:
    """Those the engine has, or the one after it will have."""

    def __init__(
        self,
        apps: Apps,
        result: Callable[[Call, dict[str, Any]], None],
        fail: Callable[[Call, WireError], None],
    ) -> None:
        """``result`` and ``fail`` end a request; `drop` must follow."""
        self._apps = apps
        self._result = result
        self._fail = fail
        self._jobs: dict[Embedding, _Job] = {}
        self._by_rid: dict[int, _Job] = {}
        self._last_rid = 0

    @property
    def running(self) -> bool:
        """Whether there are any."""
        return bool(self._jobs)

    def submit(
        self,
        call: Embedding,
        model: Model,
        inputs: Sequence[array[int]],
        *,
        normalize: bool,
    ) -> None:
        """Have the model's engine work on it."""
        standing = self._apps.stand(call.account, call.connection.priority, 1)
        packed = [pack_ids(ids) for ids in inputs]
        message = m.Embed(0, standing.app.key, standing.klass, packed, normalize)
        job = _Job(call, standing, model, message, sum(map(len, inputs)))
        self._jobs[call] = job
        self._send(job)

    def report(self, embedded: Iterable[m.Embedded]) -> None:
        """What the engine says."""
        for one in embedded:
            job = self._by_rid.get(one.rid)
            if job is None:
                continue  # cancelled meanwhile
            del self._by_rid[one.rid]
            if one.code:
                self._fail(job.call, wire_error(one.code, one.message, one.details))
                continue
            job.call.account.prompt_tokens += job.tokens
            told = {
                "embeddings": one.vectors,
                "dimensions": one.dimensions,
                "prompt_tokens": job.tokens,
                "model": job.model.entry.name,
            }
            self._result(job.call, told)

    def drop(self, call: Embedding) -> None:
        """The request is over, whoever ended it. Once."""
        call.account.live -= 1
        job = self._jobs.pop(call, None)
        if job is None:
            return
        self._apps.leave(call.account, job.standing)
        for rid, other in list(self._by_rid.items()):
            if other is job:
                del self._by_rid[rid]
                job.model.engine.send(m.Cancel(rid))

    def lost(self, how: str) -> None:
        """The engine died."""
        self._by_rid.clear()
        for job in list(self._jobs.values()):
            if job.tries > 1:
                self._fail(job.call, WireError("E_ENGINE", f"the engine ended with {how}"))

    def revive(self) -> None:
        """Another engine has taken its place."""
        for job in self._jobs.values():
            self._send(job)

    def give_up(self, error: WireError) -> None:
        """There will be no other engine."""
        for job in list(self._jobs.values()):
            self._fail(job.call, error)

    def _send(self, job: _Job) -> None:
        if job.model.down:
            return
        job.tries += 1
        self._last_rid -= 1
        self._by_rid[self._last_rid] = job
        job.model.engine.send(job.standing.app)
        message = job.message
        job.model.engine.send(
            m.Embed(self._last_rid, message.app, message.klass, message.inputs, message.normalize)
        )

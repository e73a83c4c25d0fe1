"""Conversations whose token ids the daemon keeps.

A reply tokenised again often gives other ids than it was generated with (8 of 20 replies of 80
tokens on SmolLM2), and from the first other id on its KV is not found. So a session keeps the ids
it prompted with and the ids it got, and each turn tokenises only what the template adds.
"""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pagedd_daemon.front import requests as r
from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.errors import WireError, limit_error
from pagedd_daemon.front.limits import Limits
from pagedd_daemon.front.model_ports import Clock, Conversation, Rendered, Timer
from pagedd_daemon.front.models import Model
from pagedd_daemon.front.pins import Pins
from pagedd_daemon.front.tally import Tally

TTL_S = 24 * 3600.0
"""Seconds a session lives after it was last used, unless its app says otherwise: an agent that was
left alone for the night finds its conversations. One of 4,000 tokens takes 32 KB here."""
_MOST_EXPIRED = 256
"""Expired sessions of a connection that are still known by name."""


@dataclass(frozen=True, slots=True)
class History:
    """A conversation after some turn. Never changed, so a fork shares it."""

    messages: tuple[Mapping[str, Any], ...]
    text: str = ""
    """As the template wrote it, replies as they were generated; ``""`` before the first turn."""
    ids: array[int] = field(default_factory=lambda: array("i"))
    """Of ``text``; empty before the first turn."""
    model: str | None = None
    """Whose vocabulary the ids are of."""


@dataclass(slots=True, eq=False)
class Session:
    """One conversation of one connection."""

    id: str
    history: History
    tools: list[dict[str, Any]]
    args: dict[str, Any]
    ttl_s: float = TTL_S
    turns: int = 0
    rewrites: int = 0
    """Turns in which the template rewrote earlier text, so that all of it was tokenised again."""
    turn: Turn | None = None
    """The one that runs."""
    kept: History | None = None
    """How the conversation would go on with the last reply, which does not count until it is
    committed."""
    timer: Timer | None = None
    """Until it expires."""

    def commit(self) -> None:
        """The last reply counts: its very token ids, which no tokenising would bring back.

        Raises:
            WireError: ``E_BUSY``: it is not over. ``E_COMMIT``: there is none that does not count
                already.
        """
        if self.turn is not None:
            raise WireError("E_BUSY", "the session has a turn running", details={"limit": 1})
        if self.kept is None:
            raise WireError("E_COMMIT", "the session has no reply that does not count already")
        self.history, self.kept = self.kept, None
        self.turns += 1


class Turn:
    """One turn of a session. It counts if it ends well, or once its reply is committed."""

    def __init__(self, session: Session, request: r.SessionSay) -> None:
        """Begin the turn.

        Raises:
            WireError: ``E_BUSY``: the session has a turn running.
        """
        if session.turn is not None:
            raise WireError("E_BUSY", "the session has a turn running", details={"limit": 1})
        session.turn = self
        session.kept = None
        self.session = session
        self._commits = request.commit
        said = {"role": request.role, "content": request.content}
        self._messages = (*session.history.messages, said)
        self._rendered: Rendered | None = None
        self._prompt = array("i")
        self._model = ""

    async def prompt(self, model: Model) -> array[int]:
        """The ids of the whole conversation up to where the reply begins.

        Raises:
            WireError: The template refused it, or the helper failed.
        """
        history = self.session.history
        known = history.text if history.model == model.entry.name and history.text else None
        conversation = Conversation(self._messages, self.session.tools, self.session.args)
        self._rendered = rendered = await model.text.chat(conversation, known)
        self._model = model.entry.name
        continued = known is not None and not rendered.rewritten
        self._prompt = history.ids + rendered.ids if continued else rendered.ids
        return self._prompt

    def over(self, well: bool, text: str, ids: array[int]) -> None:
        """The turn is over; ``text`` and ``ids`` are the reply's, whole if ``well``."""
        session, rendered = self.session, self._rendered
        session.turn = None
        if rendered is None or not (well or ids):
            return
        session.rewrites += rendered.rewritten
        session.kept = History(
            messages=(*self._messages, {"role": "assistant", "content": text}),
            text=rendered.text + text,
            ids=self._prompt + ids,
            model=self._model,
        )
        if well and self._commits:
            session.commit()


class Sessions:
    """The sessions of one connection."""

    def __init__(
        self,
        limits: Limits,
        clock: Clock,
        account: Account,
        pins: Pins,
        everybodys: Tally,
    ) -> None:
        """``everybodys``: the open sessions of all connections, counted."""
        self._limits = limits
        self._everybodys = everybodys
        self._clock = clock
        self._account = account
        self._pins = pins
        self._sessions: dict[str, Session] = {}
        self._expired: dict[str, float] = {}
        """Time to live of those that have expired, the first one first."""

    def answer(self, request: r.SessionRequest) -> dict[str, Any]:
        """The result of a verb that opens, changes or ends a session.

        Raises:
            WireError: ``E_SESSION``, ``E_EXPIRED``, ``E_LIMIT``, ``E_BUSY``, ``E_COMMIT``.
        """
        if isinstance(request, r.SessionOpen):
            return {"session": self._open(request)}
        session = self.get(request.session)
        if isinstance(request, r.SessionFork):
            return {"session": self._fork(session)}
        if isinstance(request, r.SessionCommit):
            session.commit()
            return {"turns": session.turns, "tokens": len(session.history.ids)}
        if isinstance(request, r.SessionPin):
            if request.pinned:
                self._pins.pin(session, self._account)
            elif request.pinned is not None:
                self._pins.unpin(session)
            return self._pins.described(session)
        pinned = session in self._pins
        self._end(session)
        return {"turns": session.turns, "rewrites": session.rewrites, "pinned": pinned}

    def get(self, session_id: str) -> Session:
        """The session; its time to live begins anew.

        Raises:
            WireError: ``E_SESSION``, ``E_EXPIRED``.
        """
        session = self._sessions.get(session_id)
        if session is not None:
            self._touch(session)
            return session
        if (ttl_s := self._expired.get(session_id)) is not None:
            raise WireError(
                "E_EXPIRED",
                f"the session was not used for {ttl_s:g} s",
                details={"ttl_s": ttl_s},
            )
        raise WireError("E_SESSION", "there is no such session on this connection")

    def close(self) -> None:
        """The connection is gone."""
        for session in list(self._sessions.values()):
            self._end(session)

    def _open(self, request: r.SessionOpen) -> str:
        system = [{"role": "system", "content": request.system}] if request.system else []
        history = History(messages=(*system, *request.messages))
        ttl_s = TTL_S if request.ttl is None else request.ttl
        return self._add(Session("", history, request.tools, request.template_args, ttl_s))

    def _fork(self, session: Session) -> str:
        """A turn that runs, or a reply that was not committed, is not part of the history."""
        fresh = replace(session, turns=0, rewrites=0, turn=None, kept=None, timer=None)
        return self._add(fresh)

    def _add(self, session: Session) -> str:
        uid = self._account.uid
        for count, name, most in (
            (len(self._sessions), "sessions_per_connection", self._limits.sessions_per_connection),
            (self._everybodys.total, "sessions_total", self._limits.sessions_total),
            (self._everybodys.of(uid), "sessions_per_user", self._limits.sessions_per_user),
        ):
            if count >= most:
                raise limit_error(name, count + 1, most)
        session.id = secrets.token_hex(8)
        self._sessions[session.id] = session
        self._everybodys.add(uid, 1)
        self._touch(session)
        return session.id

    def _touch(self, session: Session) -> None:
        if session.timer is not None:
            session.timer.cancel()
            session.timer = None
        if math.isfinite(session.ttl_s):
            session.timer = self._clock.call_later(session.ttl_s, lambda: self._expire(session))

    def _expire(self, session: Session) -> None:
        if session.turn is not None:  # it is in use
            self._touch(session)
            return
        self._end(session)
        self._expired[session.id] = session.ttl_s
        if len(self._expired) > _MOST_EXPIRED:
            del self._expired[next(iter(self._expired))]

    def _end(self, session: Session) -> None:
        """The one way in which a session is over."""
        if session.timer is not None:
            session.timer.cancel()
            session.timer = None
        del self._sessions[session.id]
        self._everybodys.add(self._account.uid, -1)
        self._pins.unpin(session)

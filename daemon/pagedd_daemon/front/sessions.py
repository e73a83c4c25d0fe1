"""Conversations whose token ids the daemon keeps.

A reply tokenised again often gives other ids than it was generated with (8 of 20 replies of 80
tokens on SmolLM2), and from the first other id on its KV is not found. So a session keeps the ids
it prompted with and the ids it got, and each turn tokenises only what the template adds.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pagedd_daemon.front.errors import WireError, limit_error
from pagedd_daemon.front.model_ports import Conversation, Rendered
from pagedd_daemon.front.models import Model
from pagedd_daemon.front.requests import SessionOpen, SessionSay


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
    turns: int = 0
    rewrites: int = 0
    """Turns in which the template rewrote earlier text, so that all of it was tokenised again."""
    turn: Turn | None = None
    """The one that runs."""


class Turn:
    """One turn of a session, which counts only if it ends well."""

    def __init__(self, session: Session, request: SessionSay) -> None:
        """Begin the turn.

        Raises:
            WireError: ``E_BUSY``: the session has a turn running.
        """
        if session.turn is not None:
            raise WireError("E_BUSY", "the session has a turn running", details={"limit": 1})
        session.turn = self
        self._session = session
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
        history = self._session.history
        known = history.text if history.model == model.entry.name and history.text else None
        conversation = Conversation(self._messages, self._session.tools, self._session.args)
        self._rendered = rendered = await model.text.chat(conversation, known)
        self._model = model.entry.name
        continued = known is not None and not rendered.rewritten
        self._prompt = history.ids + rendered.ids if continued else rendered.ids
        return self._prompt

    def over(self, well: bool, text: str, ids: array[int]) -> None:
        """The turn is over; ``text`` and ``ids`` are the reply's. If not ``well``, it never was."""
        session, rendered = self._session, self._rendered
        session.turn = None
        if not well or rendered is None:
            return
        session.rewrites += rendered.rewritten
        session.turns += 1
        session.history = History(
            messages=(*self._messages, {"role": "assistant", "content": text}),
            text=rendered.text + text,
            ids=self._prompt + ids,
            model=self._model,
        )


class Sessions:
    """The sessions of one connection."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._sessions: dict[str, Session] = {}

    def open(self, request: SessionOpen) -> str:
        """A new session; its id.

        Raises:
            WireError: ``E_LIMIT``.
        """
        system = [{"role": "system", "content": request.system}] if request.system else []
        history = History(messages=(*system, *request.messages))
        return self._add(Session("", history, request.tools, request.template_args))

    def fork(self, session_id: str) -> str:
        """A second session with the same history; its id.

        A turn that runs is not part of the history yet.

        Raises:
            WireError: ``E_SESSION``, ``E_LIMIT``.
        """
        return self._add(replace(self.get(session_id), turn=None, turns=0, rewrites=0))

    def close(self, session_id: str) -> Session:
        """Forget a session.

        Raises:
            WireError: ``E_SESSION``.
        """
        session = self.get(session_id)
        del self._sessions[session_id]
        return session

    def get(self, session_id: str) -> Session:
        """The session.

        Raises:
            WireError: ``E_SESSION``.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise WireError("E_SESSION", "there is no such session on this connection")
        return session

    def _add(self, session: Session) -> str:
        if len(self._sessions) >= self._at_most:
            count = len(self._sessions) + 1
            raise limit_error("sessions_per_connection", count, self._at_most)
        session.id = secrets.token_hex(8)
        self._sessions[session.id] = session
        return session.id

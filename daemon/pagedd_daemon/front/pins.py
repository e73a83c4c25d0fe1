"""Sessions whose KV stays while nobody speaks: how much that may be, and what the engine holds.

What a turn leaves behind is held by the engine as a sequence that is paged out and never resumed,
until the next turn leaves more behind, or the session is unpinned, closed or expired. It lives no
longer than the engine: after a model was unloaded the next turn computes and holds it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagedd_daemon.front.errors import WireError
from pagedd_daemon.messages import Drop

if TYPE_CHECKING:
    from pagedd_daemon.front.accounts import Account
    from pagedd_daemon.front.apps import Apps
    from pagedd_daemon.front.models import Model, Models
    from pagedd_daemon.front.sessions import Session
    from pagedd_daemon.front.streams import Streams

PINNED_SHARE = 0.5
"""Of the RAM tier: what all pinned sessions together may hold. The rest is for swapping, which
keeps running requests alive, and for what is merely cached."""


@dataclass(slots=True)
class _Pinned:
    """What is kept of a pinned session."""

    account: Account
    held: tuple[Model, int] | None = None
    """The engine's model, and the request whose end left the KV behind."""


class Pins:
    """All pinned sessions of the daemon."""

    def __init__(
        self, models: Models, apps: Apps, streams: Streams, user_share: float = 1.0
    ) -> None:
        """None is pinned yet. ``user_share``: of what all may hold, what one user may."""
        self._user_share = user_share
        self._models = models
        self._apps = apps
        self._streams = streams
        self._pinned: dict[Session, _Pinned] = {}

    def __contains__(self, session: Session) -> bool:
        return session in self._pinned

    def pin(self, session: Session, account: Account) -> None:
        """Hold the session's KV from now on; what was evicted of it is computed again.

        Raises:
            WireError: ``E_LIMIT``: that would be more than pinned sessions may hold.
        """
        if session in self._pinned:
            return
        self._pinned[session] = pinned = _Pinned(account)
        try:
            self._check(account)
        except WireError:
            del self._pinned[session]
            raise
        model = self._models.current
        history = session.history
        here = model is not None and not model.down and history.model == model.entry.name
        if model is not None and here and history.ids:
            pinned.held = model, self._streams.hold(account, model, history.ids)

    def unpin(self, session: Session) -> None:
        """What the session holds becomes cached pages like any other's."""
        pinned = self._pinned.pop(session, None)
        if pinned is not None:
            self._drop(pinned)

    def turn_over(self, session: Session, model: Model, rid: int, *, well: bool) -> None:
        """A turn whose request ``rid`` was to leave its KV behind is over. One that brings pinned
        sessions above what they may hold is pinned no longer."""
        pinned = self._pinned.get(session)
        if pinned is None or not well:
            _let_go(model, rid)
            return
        self._drop(pinned)
        pinned.held = model, rid
        try:
            self._check(pinned.account)
        except WireError:
            self.unpin(session)

    def gone(self, model: Model) -> None:
        """The engine of ``model`` has ended."""
        for pinned in self._pinned.values():
            if pinned.held is not None and pinned.held[0] is model:
                pinned.held = None

    def described(self, session: Session) -> dict[str, Any]:
        """Whether it is pinned, its tokens, and the most that a user's pinned sessions may have."""
        tokens, most = len(session.history.ids), self._most(self._user_share)
        return {"pinned": session in self, "tokens": tokens, "max_tokens": most}

    def _drop(self, pinned: _Pinned) -> None:
        if pinned.held is not None:
            _let_go(*pinned.held)
            pinned.held = None

    def _most(self, share: float = 1.0) -> int | None:
        """What that share of all users may hold; None while no model is loaded: its tokens are of
        unknown size."""
        model = self._models.current
        return None if model is None else int(share * PINNED_SHARE * model.ready.ram_tokens)

    def _check(self, account: Account) -> None:
        held = {s: len(s.history.ids) for s in self._pinned}
        own = sum(n for s, n in held.items() if self._pinned[s].account is account)
        users = sum(n for s, n in held.items() if self._pinned[s].account.uid == account.uid)
        ceiling = getattr(self._apps.settings(account), "kv_ceiling", 0)
        for limit, tokens, most in (
            ("pinned_tokens", sum(held.values()), self._most()),
            ("pinned_tokens", users, self._most(self._user_share)),
            ("kv_ceiling", own, ceiling or None),
        ):
            if most is not None and (tokens > most or most == 0):
                raise WireError(
                    "E_LIMIT",
                    f"pinned sessions would hold {tokens} tokens, the limit is {most}",
                    details={"limit": limit, "value": tokens, "max": most},
                )


def _let_go(model: Model, rid: int) -> None:
    if not model.down:
        model.engine.send(Drop(rid))

"""Requests of connections: who has which live, and what finished ones were answered with."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.journal import Journal, Remembered
from pagedd_daemon.front.limits import Limits
from pagedd_daemon.front.model_ports import Timer
from pagedd_daemon.front.models import Lease
from pagedd_daemon.front.ports import Connection, Event, Transport
from pagedd_daemon.front.requests import Cancel, Generation, Request
from pagedd_daemon.front.sessions import Sessions
from pagedd_daemon.front.tally import Tally

FORESEEN = 1024
"""Cancelled requests of a connection that may still come: more than can wait in its queues."""


class Call:
    """One request of a connection, and the events it was answered with."""

    def __init__(self, transport: Transport, connection: Connection, request: Request) -> None:
        self.connection = connection
        self.id = request.id
        self.request = request
        self.size = _size(request)
        """Bytes of its texts and token ids."""
        self.journal = Journal(self.id)
        self.over = False
        """Its last event was sent, or its client has gone."""
        self.lease: Lease | None = None
        """On the model it needs."""
        self._transport = transport
        self._seq = 0

    def emit(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Send the next event, and keep it for a resend."""
        event = {"id": self.id, "seq": self._seq, "type": kind, **fields}
        self._seq += 1
        self.journal.append(event)
        self._transport.send(self.connection, event)

    def emit_error(self, error: WireError) -> None:
        """Send the event that ends the request with an error."""
        event = error.as_event(self.id, self._seq)
        self._seq += 1
        self.journal.append(event)
        self._transport.send(self.connection, event)


@dataclass(frozen=True, slots=True)
class Answered:
    """What is kept of a request that is over."""

    digest: bytes
    journal: Journal


@dataclass(slots=True, eq=False)
class Peer:
    """What the service keeps of a connection."""

    connection: Connection
    account: Account
    sessions: Sessions
    live: dict[str, Call] = field(default_factory=dict)
    answered: dict[str, Answered] = field(default_factory=dict)
    """Over and remembered for a resend, oldest first."""
    slow: Timer | None = None
    """Runs while the client does not read."""
    foreseen: dict[str, None] = field(default_factory=dict)
    """Ids that were cancelled and are not known, oldest first: a cancel takes another socket than
    its request, and may be there before it."""

    def foresee(self, id: str) -> None:
        """End the request of this id when it comes, unless it was here before."""
        if id not in self.live and id not in self.answered:
            self.foreseen[id] = None
            if len(self.foreseen) > FORESEEN:
                del self.foreseen[next(iter(self.foreseen))]


class Calls:
    """Every request that is live or remembered."""

    def __init__(self, limits: Limits, send: Callable[[Connection, Event], None]) -> None:
        """``send`` is where events sent again go."""
        self._limits = limits
        self._send = send
        self._remembered = Remembered(limits.remembered_bytes, limits.remembered_bytes_per_user)
        self._live = Tally()
        self._asked_bytes = Tally()
        """Of all live requests."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.peers: dict[Connection, Peer] = {}

    async def idle(self) -> None:
        """Wait until no request is live."""
        await self._idle.wait()

    def live(self) -> list[Call]:
        """Of all connections."""
        return [call for peer in self.peers.values() for call in peer.live.values()]

    def meant(self, uid: int, request: Cancel, connection: Connection | None) -> list[Peer]:
        """Whose requests a cancel means: those of ``connection``, which its token names, or of an
        app, or of all apps, of the user who asks."""
        if request.token is not None:
            return [peer for peer in self.peers.values() if peer.connection is connection]
        return [
            peer
            for peer in self.peers.values()
            if peer.connection.uid == uid and (request.all or peer.connection.app == request.app)
        ]

    def admit(self, peer: Peer, request: Request) -> None:
        """Check that one more request may come in.

        Raises:
            WireError: ``E_BUSY``.
        """
        uid = peer.connection.uid
        for live, limit in (
            (len(peer.live), "requests_per_connection"),
            (self._live.total, "requests_total"),
            (self._live.of(uid), "requests_per_user"),
        ):
            at_most = getattr(self._limits, limit)
            if live >= at_most:
                raise WireError(
                    "E_BUSY",
                    f"{live} requests are live, the limit is {at_most}",
                    details={"limit": limit, "value": live, "max": at_most},
                )
        size = _size(request)
        for asked, limit in (
            (self._asked_bytes.total + size, "request_bytes_total"),
            (self._asked_bytes.of(uid) + size, "request_bytes_per_user"),
        ):
            at_most = getattr(self._limits, limit)
            if asked > at_most:
                raise WireError(
                    "E_BUSY",
                    f"the texts of live requests would have {asked} bytes, the limit is {at_most}",
                    details={"limit": limit, "value": asked, "max": at_most},
                )

    def answered_before(self, peer: Peer, request: Request) -> bool:
        """Whether the request is a resend. If so, what it was answered with is sent again.

        Raises:
            WireError: ``E_DUPLICATE``: it is another request. ``E_LIMIT``: it was too long ago.
        """
        live, answered = peer.live.get(request.id), peer.answered.get(request.id)
        if live is not None:
            digest, journal = _digest(live.request), live.journal
        elif answered is not None:
            digest, journal = answered.digest, answered.journal
        else:
            return False
        if digest != _digest(request):
            raise WireError("E_DUPLICATE", "this id is in use by a different request")
        if journal.forgotten:
            raise WireError(
                "E_LIMIT",
                "the answer to this request is no longer remembered",
                details={"limit": "remembered_bytes", "max": self._limits.remembered_bytes},
            )
        for event in journal.since(request.after if isinstance(request, Generation) else -1):
            self._send(peer.connection, event)
        return True

    def add(self, peer: Peer, call: Call) -> None:
        """A request begins."""
        peer.live[call.id] = call
        self._live.add(call.connection.uid, 1)
        self._asked_bytes.add(call.connection.uid, call.size)
        self._idle.clear()

    def over(self, call: Call) -> None:
        """A request is over: remember its events for a while."""
        self._live.add(call.connection.uid, -1)
        self._asked_bytes.add(call.connection.uid, -call.size)
        if not self._live.total:
            self._idle.set()
        peer = self.peers.get(call.connection)
        if peer is None:
            return
        del peer.live[call.id]
        peer.answered[call.id] = Answered(_digest(call.request), call.journal)
        self._remembered.add(call.journal, call.connection.uid)
        if len(peer.answered) > self._limits.remembered_requests:
            oldest = peer.answered.pop(next(iter(peer.answered)))
            self._remembered.forget(oldest.journal)

    def forget(self, peer: Peer) -> None:
        """The connection is gone."""
        del self.peers[peer.connection]
        for answered in peer.answered.values():
            self._remembered.forget(answered.journal)


def _size(request: Request) -> int:
    """Characters and bytes of all texts and token ids in it."""
    return sum(_sizes(getattr(request, name)) for name in type(request).model_fields)


def _sizes(value: object) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_sizes, value.values()))
    return sum(map(_sizes, value)) if isinstance(value, (list, tuple)) else 0


def _digest(request: Request) -> bytes:
    """Names everything the request asks, but for which of its events were received already."""
    asked = [request.verb, request.model_dump(exclude={"after"})]
    packed: bytes = msgpack.packb(asked)
    return hashlib.blake2b(packed, digest_size=16).digest()

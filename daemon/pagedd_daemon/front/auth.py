"""Who may connect: ZeroMQ's authentication protocol (ZAP, RFC 27), answered in the event loop.

Over ``ipc://`` libzmq puts the kernel's credentials of the peer (SO_PEERCRED) into the address
frame, ``localhost:uid:gid:pid``. They come back as ``User-Id`` on every frame of the connection.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from pagedd_daemon.front.zmqloop import Watched, monitor, monitor_events

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"pagedd"
OVERFLOW_UID = 65534
"""In a user namespace every user from outside appears as this one: it names nobody."""


class AuthenticationBroken(Exception):  # noqa: N818
    """A connection that must be refused was let in: the daemon must not run."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The peer, as the kernel knows it."""

    uid: int
    gid: int
    pid: int

    @classmethod
    def parse(cls, text: str) -> Credentials:
        """From ``uid:gid:pid``.

        Raises:
            ValueError: It is something else.
        """
        uid, gid, pid = (int(part) for part in text.split(":"))
        return cls(uid, gid, pid)

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}:{self.pid}"


class Authenticator:
    """Decides on each connection. Per-user mode: the daemon's own user alone."""

    def __init__(self, uid: int | None = None) -> None:
        self.uid = os.geteuid() if uid is None else uid
        self.refused_pids: set[int] = set()
        """Refused whatever their user: what the self-test uses."""
        self.refusals = 0

    def answer(self, request: Sequence[bytes]) -> list[bytes]:
        """The reply to a ZAP request: version, request id, status, text, user id, metadata."""
        request_id = request[1] if len(request) > 1 else b""
        if len(request) < 6 or request[0] != b"1.0":
            return self._refuse(request_id, b"500", b"not a ZAP 1.0 request")
        domain, address, mechanism = request[2], request[3], request[5]
        if domain != DOMAIN or mechanism != b"NULL":
            return self._refuse(request_id, b"400", b"unknown domain or mechanism")
        host, _, rest = address.decode("ascii", "replace").partition(":")
        try:
            peer = Credentials.parse(rest)
        except ValueError:
            return self._refuse(request_id, b"400", b"no credentials")
        if host != "localhost" or not self.allows(peer):
            return self._refuse(request_id, b"400", b"not this user's daemon")
        return [b"1.0", request_id, b"200", b"OK", str(peer).encode(), b""]

    def allows(self, peer: Credentials) -> bool:
        """Whether this peer may connect."""
        return (
            peer.uid == self.uid and peer.uid != OVERFLOW_UID and peer.pid not in self.refused_pids
        )

    def _refuse(self, request_id: bytes, status: bytes, text: bytes) -> list[bytes]:
        self.refusals += 1
        return [b"1.0", request_id, status, text, b"", b""]


def protect(sock: zmq.Socket[bytes], handshake_ms: int) -> None:
    """Makes a server socket ask the handler, and refuse everybody while there is none.

    Without a domain libzmq does not ask at all, and without enforcing it takes a missing handler
    for consent.
    """
    sock.set(zmq.ZAP_DOMAIN, DOMAIN)
    sock.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
    sock.set(zmq.HANDSHAKE_IVL, handshake_ms)


async def self_test(authenticator: Authenticator, endpoint: str, timeout_s: float) -> None:
    """Connects to ``endpoint`` as a peer that must be refused.

    The forbidden peer is this very process, refused by its pid for as long as the test runs: it
    goes the whole way of a foreign user, and needs no second user.

    Raises:
        AuthenticationBroken: It was let in, or nothing was decided in time.
    """
    loop = asyncio.get_running_loop()
    verdict: asyncio.Future[int] = loop.create_future()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.DEALER)
    events = monitor(
        context,
        sock,
        zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    )

    def heard() -> None:
        for event, _, _ in monitor_events(events):
            if not verdict.done():
                verdict.set_result(event)

    watched = Watched(loop, events, heard)
    authenticator.refused_pids.add(os.getpid())
    try:
        sock.connect(endpoint)
        event = await asyncio.wait_for(verdict, timeout_s)
    except asyncio.TimeoutError:
        raise AuthenticationBroken(
            f"the authentication handler decided nothing within {timeout_s:g} s"
        ) from None
    finally:
        authenticator.refused_pids.discard(os.getpid())
        watched.close()
        sock.disable_monitor()
        events.close(linger=0)
        sock.close(linger=0)
        context.term()
    if event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        raise AuthenticationBroken("a forbidden peer was let in; refusing to run")

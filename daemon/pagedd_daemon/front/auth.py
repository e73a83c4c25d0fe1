"""Who may connect: ZeroMQ's authentication protocol (ZAP, RFC 27), answered in the event loop.

Over ``ipc://`` libzmq puts the kernel's credentials of the peer (SO_PEERCRED) into the address
frame, ``localhost:uid:gid:pid``. They come back as ``User-Id`` on every frame of the connection.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from pagedd_daemon.front.access import Access
from pagedd_daemon.front.zmqloop import Watched, monitor, monitor_events

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"pagedd"
_SO_PEERGROUPS = 59
"""asm-generic/socket.h, Linux 4.13; Python has no name for it."""
_SOME_GROUPS = 64


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
    """Decides on each connection."""

    def __init__(
        self,
        access: Access | None = None,
        crowded: Callable[[int], bool] = lambda uid: False,
    ) -> None:
        """``access``: whom the daemon serves; None: its own user alone. ``crowded``: whether a user
        has so many connections that there is no room for another one."""
        self._access = access or Access()
        self._crowded = crowded
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
            return self._refuse(request_id, b"400", b"not a user of this daemon")
        if self._crowded(peer.uid):
            return self._refuse(request_id, b"300", b"too many connections of this user")
        return [b"1.0", request_id, b"200", b"OK", str(peer).encode(), b""]

    def allows(self, peer: Credentials) -> bool:
        """Whether this peer may connect."""
        return self._access.admits(peer.uid) and peer.pid not in self.refused_pids

    def _refuse(self, request_id: bytes, status: bytes, text: bytes) -> list[bytes]:
        self.refusals += 1
        return [b"1.0", request_id, status, text, b"", b""]


def peer_uid(connection_fd: int) -> int | None:
    """The user at the other end of a connection that stays libzmq's; None if it has ended."""
    try:
        with socket.socket(fileno=os.dup(connection_fd)) as sock:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    _, uid, _ = struct.unpack("3i", raw)
    return int(uid)


def peer_groups(connection_fd: int) -> frozenset[int]:
    """The groups that the peer had beside its own when it connected; none if it has ended.

    `socket.getsockopt` gives at most 1,024 bytes, and directories of users may have more groups.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_uint(4 * _SOME_GROUPS)
    while True:
        found = (ctypes.c_uint32 * (size.value // 4))()
        before = size.value
        if not libc.getsockopt(
            connection_fd, socket.SOL_SOCKET, _SO_PEERGROUPS, found, ctypes.byref(size)
        ):
            return frozenset(found[: size.value // 4])
        if size.value <= before:  # any error but ERANGE, which says how large it must be
            return frozenset()


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

"""A ROUTER socket as the transport needs it: authenticated, bounded, and never waited for."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

import zmq

from pagedd_daemon.front import wire
from pagedd_daemon.front.auth import Credentials, protect
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import Limits
from pagedd_daemon.front.listener import Listening
from pagedd_daemon.front.ports import Event
from pagedd_daemon.front.zmqloop import Watched, monitor, monitor_events

log = logging.getLogger(__name__)

_BATCH = 64
"""Messages taken from one socket before the loop may do something else."""
_QUEUE = 8
"""Messages libzmq holds for one client in either direction. Small, because they count in no budget
of ours; a client that keeps up never fills it."""


class Router:
    """One ROUTER on one of our listening sockets. Every call is the event loop's."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        loop: asyncio.AbstractEventLoop,
        listening: Listening,
        limits: Limits,
        *,
        message: Callable[[bytes, Credentials, list[zmq.Frame]], None],
        events: Callable[[list[tuple[int, int]]], None],
        signalled: Callable[[], None] | None = None,
    ) -> None:
        """Makes the socket; `bind` lets clients in.

        Args:
            context: All sockets of the daemon share it.
            loop: Of this thread.
            listening: Stays the caller's.
            limits: What a message may take.
            message: Called with routing id, user and frames of each message.
            events: Called with what libzmq says of its connections: ``EVENT_ACCEPTED`` and
                ``EVENT_DISCONNECTED``, each with the connection's descriptor.
            signalled: Called when there may be room to send again.
        """
        self._listening = listening
        self._limits = limits
        self._message = message
        self._events = events
        self._bound = False
        self._sock = sock = context.socket(zmq.ROUTER)
        protect(sock, limits.handshake_ms)
        sock.set(zmq.ROUTER_MANDATORY, 1)
        sock.set(zmq.SNDHWM, _QUEUE)
        sock.set(zmq.RCVHWM, _QUEUE)
        sock.set(zmq.MAXMSGSIZE, limits.frame_bytes)
        sock.set(zmq.LINGER, 0)
        sock.set(zmq.HEARTBEAT_IVL, limits.heartbeat_ms)
        sock.set(zmq.HEARTBEAT_TIMEOUT, limits.silence_ms)
        self._monitor = monitor(context, sock, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._watched_monitor = Watched(loop, self._monitor, self.drain_monitor)
        self._watched = Watched(loop, sock, self._receive, signalled)

    def bind(self) -> None:
        """Lets libzmq accept. It closes the descriptor it is given, hence the copy."""
        self._sock.set(zmq.USE_FD, os.dup(self._listening.sock.fileno()))
        self._sock.bind(self._listening.endpoint)
        self._bound = True
        self._watched.check()

    def unbind(self) -> None:
        """Stops accepting; the kernel goes on queueing."""
        if self._bound:
            self._bound = False
            self._sock.unbind(self._listening.endpoint)
            self._watched.check()

    def address(self, route: bytes) -> None:
        """Starts a message; `body` must follow at once.

        Raises:
            zmq.Again: This peer's queue is full.
            zmq.ZMQError: There is no such peer (any more).
        """
        self._sock.send(route, zmq.DONTWAIT | zmq.SNDMORE)

    def body(self, body: bytes) -> None:
        """Ends a message: whether there is room was decided by its first frame.

        `check` must follow when the sending is over.
        """
        self._sock.send(body, zmq.DONTWAIT)

    def answer(self, route: bytes, event: Event) -> None:
        """Sends an event outside any stream: who is gone or never reads misses its own answer."""
        packed = wire.encode([event])
        try:
            self.address(route)
            self.body(packed)
        except zmq.ZMQError as error:
            log.debug("an answer was dropped: %s", error)
        self.check()

    def check(self) -> None:
        """Looks whether messages came while the socket was used otherwise."""
        self._watched.check()

    def drain_monitor(self) -> None:
        """Handles what libzmq said of its connections so far."""
        events = monitor_events(self._monitor)
        if events:
            self._events(events)
        self._watched_monitor.check()

    def close(self, linger_ms: int) -> None:
        """Closes the socket; libzmq goes on sending what it holds for ``linger_ms``."""
        self._watched.close()
        self._watched_monitor.close()
        self._sock.disable_monitor()
        self._monitor.close(linger=0)
        self._sock.close(linger=linger_ms)

    def _receive(self) -> None:
        for _ in range(_BATCH):
            try:
                frames = self._take()
            except zmq.Again:
                return
            route = frames[0].bytes
            try:
                peer = Credentials.parse(str(frames[-1].get("User-Id")))
            except (ValueError, zmq.ZMQError):
                # Cannot happen behind our handler; without a user there is nobody to serve.
                log.error("a message without credentials was dropped")
                continue
            self._message(route, peer, frames[1:])

    def _take(self) -> list[zmq.Frame]:
        """One message, with no more of its frames kept than may be used.

        libzmq limits the size of a frame but not their number; those beyond the limit are freed as
        they are read. One more than allowed is kept, so that `decode` sees that there are too many.
        """
        frames = [self._sock.recv(zmq.DONTWAIT, copy=False)]
        while frames[-1].more:
            frame = self._sock.recv(zmq.DONTWAIT, copy=False)
            if len(frames) <= self._limits.frames + 1:
                frames.append(frame)
            elif not frame.more:
                break
        return frames


def refuse_identity(route: bytes) -> None:
    """Refuses a peer that chose its own identity, which could be another's: libzmq's are 5 bytes
    that begin with 0.

    ZAP does not show it (its identity frame is the server's own), so the first message is the first
    place to see it. An identity forged to look like libzmq's would have to be guessed from 2^32, is
    turned away while it is in use, and opens nothing: requests are cancelled by token.

    Raises:
        WireError: ``E_HELLO``.
    """
    if len(route) != 5 or route[0] != 0:
        raise WireError("E_HELLO", "a connection must not set a ZeroMQ identity")

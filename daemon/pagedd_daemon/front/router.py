"""A ROUTER socket as the transport needs it: authenticated, bounded, and never waited for."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from pagedd_daemon.front import wire
from pagedd_daemon.front.auth import Credentials, peer_uid, protect
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import Limits
from pagedd_daemon.front.listener import SocketPathError
from pagedd_daemon.front.ports import Event
from pagedd_daemon.front.tally import Tally
from pagedd_daemon.front.zmqloop import Watched, monitor, monitor_events

log = logging.getLogger(__name__)

_BATCH = 64
"""Messages taken from one socket before the loop may do something else."""
_QUEUE = 8
"""Messages libzmq holds for one client in either direction. Small, because they count in no budget
of ours; a client that keeps up never fills it."""
_REAP_S = 1.0
"""How long libzmq may take from `accept` to telling of it, with a wide margin."""


@dataclass(slots=True)
class _Batch:
    """A listening socket that libzmq has, with the clients that were in its queue."""

    endpoint: str
    fd: int
    empty_since: float | None = None
    """Since when its queue is seen to be empty; nobody can enter it any more."""


class Router:
    """One ROUTER behind one path. Every call is the event loop's.

    Clients arrive at a listening socket that libzmq does not know, and come in a batch at a time
    (`pagedd_daemon.front.listener` says why). The listening socket of each batch stays until the
    last connection that came over it has ended, since libzmq would end it with it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        loop: asyncio.AbstractEventLoop,
        listen: Callable[[], socket.socket],
        limits: Limits,
        *,
        message: Callable[[bytes, Credentials, list[zmq.Frame]], None],
        has_room: Callable[[], bool],
        changed: Callable[[list[int]], None],
        signalled: Callable[[], None] | None = None,
        count_users: bool = False,
    ) -> None:
        """Makes the socket and lets clients in.

        Args:
            context: All sockets of the daemon share it.
            loop: Of this thread.
            listen: Puts a new listening socket at the path.
            limits: What a message may take.
            has_room: Whether one more batch of clients may come in.
            message: Called with routing id, user and frames of each message.
            changed: Called when connections came or went, with the descriptors of those that went.
            signalled: Called when there may be room to send again.
            count_users: Whether `opened` is asked for.

        Raises:
            SocketPathError: Something that is not ours lies at the path.
        """
        self._listen = listen
        self._limits = limits
        self._message = message
        self._changed = changed
        self._has_room = has_room
        self._loop = loop
        self._batches: list[_Batch] = []
        self._reap_timer: asyncio.TimerHandle | None = None
        self._connections: dict[int, str] = {}
        """Descriptor of each connection -> endpoint it came over."""
        self._count_users = count_users
        self._users: dict[int, int] = {}
        """Descriptor -> user, where they are counted."""
        self._opened = Tally()
        self._held = False
        # First, since it can fail, and an open ZeroMQ socket would keep its context from ending.
        self._arrivals = listen()
        """Listens at the path."""
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
        loop.add_reader(self._arrivals, self._arrived)

    @property
    def held(self) -> bool:
        """Whether clients wait for room; `reconsider` looks again."""
        return self._held

    @property
    def unsettled(self) -> int:
        """Batches of which clients may still come in."""
        unsettled = {batch.fd: batch for batch in self._batches if batch.empty_since is None}
        if unsettled:
            poller = select.poll()
            for fd in unsettled:
                poller.register(fd, select.POLLIN)
            waiting = {fd for fd, _ in poller.poll(0)}
            for fd in unsettled.keys() - waiting:
                unsettled.pop(fd).empty_since = self._loop.time()
        return len(unsettled)

    def reconsider(self) -> None:
        """Lets those in who wait, if there is room now."""
        if self._held and self._has_room():
            self._held = False
            self._loop.add_reader(self._arrivals, self._arrived)

    def _arrived(self) -> None:
        """Somebody waits at the path."""
        try:
            following = self._listen() if self._has_room() else None
        except SocketPathError as error:
            log.error("no client can be let in: %s", error)
            following = None
        self._loop.remove_reader(self._arrivals)
        if following is None:
            self._held = True
            self._changed([])
            return
        endpoint = f"ipc://{self._arrivals.getsockname()}"
        # libzmq closes the descriptor it is given when it is done with it.
        fd = self._arrivals.detach()
        self._batches.append(_Batch(endpoint, fd))
        self._sock.set(zmq.USE_FD, fd)
        self._sock.bind(endpoint)
        self._arrivals = following
        self._loop.add_reader(following, self._arrived)
        self._watched.check()

    def is_connected(self, fd: int) -> bool:
        """Whether the connection with this descriptor has not ended, as far as libzmq has said."""
        self.drain_monitor()
        return fd in self._connections

    def opened(self, uid: int) -> int:
        """Connections of this user, whether they have said anything or not."""
        self.drain_monitor()
        return self._opened.of(uid)

    def address(self, route: bytes) -> None:
        """Starts a message; `body` must follow at once.

        Raises:
            zmq.Again: This peer's queue is full.
            zmq.ZMQError: There is no such peer (any more).
        """
        try:
            self._sock.send(route, zmq.DONTWAIT | zmq.SNDMORE)
        except zmq.Again:
            # A send looks at what peers have taken at most once a millisecond (libzmq's
            # max_command_delay): on a busy machine one in 40 series of quick questions found a
            # queue full that was empty. To ask for the events looks in any case.
            self._sock.get(zmq.EVENTS)
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
        gone: list[int] = []
        for event, fd, endpoint in events:
            if event == zmq.EVENT_ACCEPTED:
                self._connections[fd] = endpoint.decode()
                if self._count_users and (uid := peer_uid(fd)) is not None:
                    self._users[fd] = uid
                    self._opened.add(uid, 1)
            elif self._connections.pop(fd, None) is not None:
                gone.append(fd)
                if (uid := self._users.pop(fd, None)) is not None:
                    self._opened.add(uid, -1)
        if gone:
            self._reap_later()
        if events:
            self._changed(gone)
        self._watched_monitor.check()

    def _reap(self) -> None:
        """Takes back the listening sockets of which no connection is left.

        libzmq tells of a connection a moment after it was taken from the queue, hence the delay.
        """
        self._reap_timer = None
        self.drain_monitor()
        used, now = set(self._connections.values()), self._loop.time()
        kept, unused = [], 0
        for batch in self._batches:
            if batch.endpoint in used:
                kept.append(batch)
            elif batch.empty_since is None or now - batch.empty_since < _REAP_S:
                kept.append(batch)
                unused += 1
            else:
                self._sock.unbind(batch.endpoint)
        self._batches = kept
        if self.unsettled or unused:
            self._reap_later()
        self._watched.check()

    def _reap_later(self) -> None:
        if self._reap_timer is None:
            self._reap_timer = self._loop.call_later(_REAP_S, self._reap)

    def close(self, linger_ms: int) -> None:
        """Closes the socket; libzmq goes on sending what it holds for ``linger_ms``."""
        if self._reap_timer is not None:
            self._reap_timer.cancel()
        self._loop.remove_reader(self._arrivals)
        self._arrivals.close()
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

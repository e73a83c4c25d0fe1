"""What waits for clients: events in order, sent as they are taken, within budgets of bytes.

Nothing here ever waits for a client. Events of one turn of the event loop leave as one message per
client, and what a client does not take stays here. Who falls behind is told of to the service,
which pauses its streams; who goes on asking and never reads is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

import zmq

from pagedd_daemon.front import wire
from pagedd_daemon.front.limits import Limits
from pagedd_daemon.front.peers import Peer, Peers
from pagedd_daemon.front.router import Router
from pagedd_daemon.front.tally import Tally

log = logging.getLogger(__name__)

_MESSAGE_BYTES = 64 * 1024
"""Events that waited are joined up to this size."""
_RETRY_S, _RETRY_MOST_S = 0.01, 1.0
"""While a client's queue is full: how soon to try again, doubled each time it is still full."""


class Output:
    """The way out of one socket. Every call is the event loop's."""

    router: Router
    """Set before anything is queued; the two need each other."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        peers: Peers,
        *,
        drop: Callable[[Peer], None],
        lagging: Callable[[Peer, bool], None],
    ) -> None:
        """Nothing waits yet.

        Args:
            loop: Of this thread.
            limits: What may wait for a connection, for a user and for all.
            peers: Everybody for whom something may wait.
            drop: Ends a peer, and calls `forget`.
            lagging: Hears of a peer that has fallen behind, or has caught up.
        """
        self._loop = loop
        self._limits = limits
        self._peers = peers
        self._drop = drop
        self._lagging = lagging
        self._waiting = Tally()
        """Bytes that wait for peers."""
        self._dirty: list[Peer] = []
        self._blocked: dict[Peer, None] = {}
        """Peers whose queue in libzmq is full, longest first."""
        self._retry_timer: asyncio.TimerHandle | None = None
        self._retry_s = _RETRY_S
        self._flush_scheduled = False
        self._drained: asyncio.Event | None = None
        """Set when nothing waits any more, while stopping."""

    def queue(self, peer: Peer, packed: bytes) -> None:
        """An event for a peer; those of one turn of the event loop travel as one message."""
        peer.waiting.append(packed)
        peer.bytes += len(packed)
        self._waiting.add(peer.connection.uid, len(packed))
        if not peer.queued:
            peer.queued = True
            self._dirty.append(peer)
            if not self._flush_scheduled:
                self._flush_scheduled = True
                self._loop.call_soon(self._flush_at_end_of_turn)

    def flush(self) -> None:
        """Sends now what is queued, without waiting for the end of the turn."""
        self._flush_scheduled = False
        dirty, self._dirty = self._dirty, []
        for peer in dirty:
            peer.queued = False
            self.push(peer)
        if self._blocked:
            self.retry()
        self.router.check()

    def forget(self, peer: Peer) -> None:
        """What waits for a peer is for nobody any more."""
        peer.waiting.clear()
        self._waiting.add(peer.connection.uid, -peer.bytes)
        peer.bytes = 0
        self._unblock(peer)

    async def drain(self, timeout_s: float) -> None:
        """Gives clients so long to take what waits for them."""
        self.flush()
        if self._blocked:
            self._drained = asyncio.Event()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._drained.wait(), timeout_s)

    def close(self) -> None:
        """Sends nothing any more."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._blocked.clear()
        self._dirty.clear()

    def _flush_at_end_of_turn(self) -> None:
        if self._flush_scheduled:
            self.flush()

    def push(self, peer: Peer) -> None:
        """Sends what waits for a peer, as far as it takes it."""
        waiting = peer.waiting
        while waiting:
            try:
                self.router.address(peer.route)
            except zmq.Again:
                self._blocked[peer] = None
                self._arm_retry()
                break
            except zmq.ZMQError as error:
                # EHOSTUNREACH: libzmq knows no such peer any more.
                log.debug("connection %d: %s", peer.connection.number, error)
                self._drop(peer)
                break
            count, size = _batch(waiting)
            self.router.body(wire.join_events([waiting.popleft() for _ in range(count)]))
            peer.bytes -= size
            self._waiting.add(peer.connection.uid, -size)
        if not waiting:
            self._unblock(peer)
        if peer.open:
            self._judge(peer)

    def _unblock(self, peer: Peer) -> None:
        self._blocked.pop(peer, None)
        if not self._blocked and self._drained is not None:
            self._drained.set()

    def _judge(self, peer: Peer) -> None:
        """Tells the service when a peer falls behind or has caught up."""
        connection, budget = peer.connection, self._limits.output_bytes_per_connection
        if not connection.lagging and peer.bytes > budget:
            connection.lagging = True
            self._lagging(peer, True)
        elif connection.lagging and peer.bytes < budget // 2:
            connection.lagging = False
            self._lagging(peer, False)
        # Its streams are paused and new requests refused, so only results of requests that were
        # accepted before still come. Beyond this it is one that asks and never reads.
        if peer.open and peer.bytes > budget + 2 * self._limits.frame_bytes:
            log.warning(
                "connection %d (%s) closed: %d bytes wait for it",
                connection.number,
                connection.app,
                peer.bytes,
            )
            self._drop(peer)
        elif (
            self._waiting.total > self._limits.output_bytes_total
            or self._waiting.of(connection.uid) > self._limits.output_bytes_per_user
        ):
            self._relieve()

    def _relieve(self) -> None:
        """Disconnects who has most waiting, of the user for whom most waits: many that do not read
        take more than the front has."""
        uid = self._waiting.most()
        peers = (peer for peer in self._peers.by_route.values() if peer.connection.uid == uid)
        peer = max(peers, key=lambda peer: peer.bytes)
        log.warning(
            "connection %d (%s) closed: %d bytes wait for it, and %d for all",
            peer.connection.number,
            peer.connection.app,
            peer.bytes,
            self._waiting.total,
        )
        self._drop(peer)

    def retry(self) -> None:
        """Tries the peers whose queue was full.

        libzmq signals its descriptor when a peer has room again, and then this is called. But a
        send to another peer may consume that signal, so this is called after each flush as well,
        and by a timer while anybody waits.
        """
        for peer in list(self._blocked):
            before = peer.bytes
            self.push(peer)
            if peer.bytes != before:
                self._retry_s = _RETRY_S

    def _arm_retry(self) -> None:
        if self._retry_timer is None:
            self._retry_timer = self._loop.call_later(self._retry_s, self._retry_on_time)

    def _retry_on_time(self) -> None:
        self._retry_timer = None
        self._retry_s = min(2 * self._retry_s, _RETRY_MOST_S)
        self.retry()
        self.router.check()
        if not self._blocked:
            self._retry_s = _RETRY_S


def _batch(waiting: deque[bytes]) -> tuple[int, int]:
    """How many of the oldest events make one message, at least one, and their bytes."""
    count = size = 0
    for packed in waiting:
        if count and size + len(packed) > _MESSAGE_BYTES:
            break
        count += 1
        size += len(packed)
    return count, size

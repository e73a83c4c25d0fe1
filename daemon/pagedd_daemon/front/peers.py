"""Who is connected and has said hello, by all that a connection is known by."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pagedd_daemon.front.ports import Connection
from pagedd_daemon.front.requests import DataRequest
from pagedd_daemon.front.tally import Tally


@dataclass(slots=True, eq=False)
class Peer:
    """What the transport keeps of a connection."""

    connection: Connection
    route: bytes
    fd: int
    """Descriptor of libzmq's, by which its monitor names the connection."""
    waiting: deque[bytes] = field(default_factory=deque)
    """Packed events, oldest first."""
    bytes: int = 0
    """Of ``waiting``."""
    queued: bool = False
    """It is among those to be flushed."""
    open: bool = True
    hello: str = ""
    """Id of its hello, while it is being looked at what program it is."""
    early: list[DataRequest] = field(default_factory=list)
    """Requests that came meanwhile."""


class Peers:
    """All of them, and the kernel's watch over their processes."""

    def __init__(self, ended: Callable[[Peer], None]) -> None:
        """``ended`` hears, in the event loop, of a peer whose process has ended."""
        self._ended = ended
        self.by_route: dict[bytes, Peer] = {}
        self.by_number: dict[int, Peer] = {}
        self.by_token: dict[bytes, Peer] = {}
        self.by_fd: dict[int, Peer] = {}
        self.users = Tally()
        """How many there are of each user."""
        self._by_pid: dict[int, tuple[int, set[Peer]]] = {}
        """Process -> its pidfd and connections."""

    def add(self, peer: Peer) -> None:
        """One more. If its process has ended already, ``ended`` hears of it at once."""
        connection = peer.connection
        self.by_route[peer.route] = peer
        self.by_number[connection.number] = peer
        self.by_token[connection.token] = peer
        self.by_fd[peer.fd] = peer
        self.users.add(connection.uid, 1)
        self._watch(peer)

    def remove(self, peer: Peer) -> None:
        """One less."""
        connection = peer.connection
        del self.by_route[peer.route]
        del self.by_number[connection.number]
        del self.by_token[connection.token]
        self.by_fd.pop(peer.fd, None)
        self.users.add(connection.uid, -1)
        watched = self._by_pid.get(connection.pid)
        if watched is not None:
            watched[1].discard(peer)
            if not watched[1]:
                self._unwatch(connection.pid)

    def close(self) -> None:
        """Watch nobody any more, and have nobody to send to."""
        self.by_number.clear()
        for pid in list(self._by_pid):
            self._unwatch(pid)

    def _watch(self, peer: Peer) -> None:
        """Has the kernel tell when the peer's process ends.

        Its connection may outlive it: a child that it left behind may have inherited the socket.
        """
        pid = peer.connection.pid
        if pid not in self._by_pid:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._ended(peer)
                return
            except (AttributeError, OSError):
                # An old kernel, or a process we cannot see: the end of the connection must do.
                return
            self._by_pid[pid] = (pidfd, set())
            asyncio.get_running_loop().add_reader(pidfd, self._process_ended, pid)
        self._by_pid[pid][1].add(peer)

    def _process_ended(self, pid: int) -> None:
        for peer in list(self._by_pid[pid][1]):
            self._ended(peer)

    def _unwatch(self, pid: int) -> None:
        pidfd, _ = self._by_pid.pop(pid)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

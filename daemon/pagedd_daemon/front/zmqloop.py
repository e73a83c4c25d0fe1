"""A ZeroMQ socket in an asyncio loop, without the futures of `zmq.asyncio`.

The descriptor of a ZeroMQ socket signals edges of its command queue, not messages: it may become
readable without a message, and may stay silent with messages waiting, since any call on the socket
can consume the signal. So whoever used the socket asks for its events again (`Watched.check`).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import zmq

_MONITOR_EVENT = struct.Struct("=Hi")


class Watched:
    """Calls back in the loop when something happened on a socket."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: zmq.Socket[bytes],
        readable: Callable[[], None],
        signalled: Callable[[], None] | None = None,
    ) -> None:
        """Watches from now on.

        Args:
            loop: The loop of this thread.
            sock: Stays the caller's.
            readable: Called while messages wait; need not take all of them.
            signalled: Called at each signal, message or not: there may be room to send again.
        """
        self._loop = loop
        self._sock = sock
        self._readable = readable
        self._signalled = signalled
        self._scheduled = False
        self._closed = False
        self._fd = _int(sock.get(zmq.FD))
        loop.add_reader(self._fd, self._wake)
        self.check()

    def check(self) -> None:
        """Asks for the events; to be called after any use of the socket outside the callbacks."""
        if not self._closed and not self._scheduled and _int(self._sock.get(zmq.EVENTS)) & 1:
            self._scheduled = True
            self._loop.call_soon(self._wake)

    def close(self) -> None:
        """Stops watching."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)

    def _wake(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        # Asking for the events is also what makes libzmq see the commands behind the signal.
        waiting = _int(self._sock.get(zmq.EVENTS)) & zmq.POLLIN
        if self._signalled is not None:
            self._signalled()
        if waiting:
            self._readable()
        self.check()


def monitor(
    context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes], events: int
) -> zmq.Socket[bytes]:
    """The socket on which events of ``sock`` arrive; read it with `monitor_events`.

    Its queue is unbounded, since libzmq's I/O thread would block on a full one.
    """
    endpoint = f"inproc://monitor-{id(sock):x}"
    sock.monitor(endpoint, events)
    made = context.socket(zmq.PAIR)
    made.set(zmq.LINGER, 0)
    made.set(zmq.RCVHWM, 0)
    made.connect(endpoint)
    return made


def monitor_events(sock: zmq.Socket[bytes]) -> list[tuple[int, int, bytes]]:
    """What waits on a `monitor` socket, as ``(event, value, endpoint)``, oldest first."""
    found: list[tuple[int, int, bytes]] = []
    while True:
        try:
            frames: list[Any] = sock.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return found
        found.append((*_MONITOR_EVENT.unpack(frames[0]), frames[1]))


def _int(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value

"""One ZeroMQ connection to the daemon, and what its monitor says about it.

A `Wire` connects once. libzmq would reconnect silently for ever, to a daemon that knows nothing
of this connection's hello, requests and sessions; so reconnecting is off, and a connection that is
gone is an error at once.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections import deque
from pathlib import Path

import zmq

from pagedd._core import MAX_FRAME_BYTES
from pagedd._errors import AccessDenied, ConnectionFailed, DaemonNotRunning, SessionLost
from pagedd._paths import MAX_SOCKET_PATH_BYTES

LINGER_MS = 500
"""How long a closed socket may go on sending what was sent before (a ``bye``, a cancel)."""

HIGH_WATER_MARK = 1024
"""Messages that wait in libzmq, each way. Beyond, the daemon sees that we do not read."""

RETRY_S = 0.05
"""Pause before connecting again while the daemon's queue of new connections is full."""

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)

_EVENT = struct.Struct("=H")
"""zmq_socket_monitor(3). pyzmq's own parser would import asyncio."""

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    """The process's context. A forked child gets its own: libzmq's threads do not survive fork."""
    pid = os.getpid()
    context = _contexts.get(pid)
    if context is None or context.closed:
        context = _contexts.setdefault(pid, zmq.Context())
    return context


def check_path(path: Path) -> None:
    """Refuses a path that cannot be the daemon's socket, before libzmq retries it for ever.

    Raises:
        DaemonNotRunning: Nothing is there.
        AccessDenied: This user may not look.
        ConnectionFailed: The path is too long, or no socket.
    """
    details = {"socket": str(path)}
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ConnectionFailed(
            f"the socket's path is longer than {MAX_SOCKET_PATH_BYTES} bytes: {path}",
            code="E_HOST",
            retryable=False,
            details=details,
        )
    try:
        mode = path.stat().st_mode
    except PermissionError:
        raise AccessDenied(f"no permission for {path}", details=details) from None
    except OSError:
        raise _not_running(path) from None
    if not stat.S_ISSOCK(mode):
        raise ConnectionFailed(
            f"{path} is not a socket", code="E_HOST", retryable=False, details=details
        )


class Wire:
    """A DEALER socket with its monitor. One thread at a time may use it.

    Raises:
        ConnectionFailed: As `check_path` says.
    """

    def __init__(self, path: Path) -> None:
        check_path(path)
        self.path = path
        self.retry_at: float | None = None
        """When to call `retry` (``time.monotonic``), or None."""
        self._outgoing: deque[bytes] = deque()
        """What libzmq has not taken yet."""
        self._early: list[bytes] | None = []
        """What was sent before the connection stood, to be sent again after a retry; then None."""
        self._denied = False
        self._open()

    def _open(self) -> None:
        self.socket: zmq.Socket[bytes] = _context().socket(zmq.DEALER)
        self.socket.linger = LINGER_MS
        self.socket.sndhwm = self.socket.rcvhwm = HIGH_WATER_MARK
        self.socket.maxmsgsize = MAX_FRAME_BYTES
        self.socket.reconnect_ivl = -1
        # A busy daemon may leave a connection in the kernel's queue; calls have deadlines instead.
        self.socket.handshake_ivl = 0
        self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(_EVENTS)
        self.monitor.linger = 0
        self.socket.connect(f"ipc://{self.path}")

    @property
    def backlog(self) -> bool:
        """Whether `flush` must be called again."""
        return bool(self._outgoing)

    def send(self, frame: bytes) -> None:
        """Send now, or when libzmq takes it."""
        self._outgoing.append(frame)
        self.flush()

    def flush(self) -> None:
        """Hand to libzmq what it takes."""
        while self._outgoing:
            try:
                self.socket.send(self._outgoing[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            sent = self._outgoing.popleft()
            if self._early is not None:
                self._early.append(sent)

    def receive(self) -> bytes | None:
        """The next frame, or None. The daemon sends one frame a message (section 2)."""
        try:
            return self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def check(self) -> ConnectionFailed | None:
        """Reads the monitor. Returns why the connection is of no more use, if it is."""
        while int(self.monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            (happened,) = _EVENT.unpack_from(self.monitor.recv_multipart(zmq.NOBLOCK)[0])
            if happened == zmq.EVENT_CONNECTED:
                self._early = None
            elif happened == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._denied = True
                return self._access_denied()
            elif happened == zmq.EVENT_CLOSED:
                # Only a connect that failed closes the socket without having been connected.
                return self._refused()
            else:
                return self._gone()
        return None

    def retry(self) -> None:
        """Connect once more, after `check` found the daemon's queue of connections full."""
        self.retry_at = None
        unsent = [*(self._early or ()), *self._outgoing]
        self.close()
        self._early, self._outgoing = [], deque(unsent)
        self._open()
        self.flush()

    def close(self) -> None:
        """Give the sockets back."""
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def _refused(self) -> ConnectionFailed | None:
        """Why connecting failed: libzmq does not say, so ask the kernel."""
        try:
            check_path(self.path)
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)
                probe.connect(str(self.path))
        except ConnectionFailed as error:
            return error
        except BlockingIOError:
            pass
        except PermissionError:
            return self._access_denied()
        except OSError:
            return _not_running(self.path)
        self.retry_at = time.monotonic() + RETRY_S
        return None

    def _access_denied(self) -> AccessDenied:
        return AccessDenied(
            f"the daemon at {self.path} does not admit this user (uid {os.getuid()})",
            details={"socket": str(self.path), "uid": os.getuid()},
        )

    def _gone(self) -> ConnectionFailed:
        if self._denied:
            return self._access_denied()
        return SessionLost(
            f"the daemon at {self.path} closed the connection: it ended, or it was sent more than "
            "its limits allow",
            details={"socket": str(self.path)},
        )


def _not_running(path: Path) -> DaemonNotRunning:
    return DaemonNotRunning(
        f"no daemon listens on {path}: start one with 'pagedd serve'",
        details={"socket": str(path)},
    )

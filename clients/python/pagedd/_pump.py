"""Who touches the sockets of a synchronous client, when several threads use it.

There is no background thread. Of the threads that wait for an answer one *pumps*: it alone polls
the sockets and hands events to everybody's calls; the others sleep on a condition. When its own
answer is there it wakes the others and one of them goes on. A thread that only sends does so
itself if nobody pumps, and otherwise leaves the frame in the outbox and rings a pipe. Ownership of
the sockets passes under the mutex, which is the full fence libzmq asks for.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zmq

from pagedd._core import Call, Core
from pagedd._errors import ConnectionFailed, PageddError, ProtocolViolation
from pagedd._wire import RETRY_S, Wire


class Pump:
    """The sockets of one client and the calls that wait for them. Thread-safe."""

    def __init__(self, data: Path | None, control: Path) -> None:
        """Connect to the data socket (None: control only), to ``control`` at its first use."""
        self.core = Core()
        self._pid = os.getpid()
        self._control_path = control
        self._data_wire = None if data is None else Wire(data)
        self._control_wire: Wire | None = None
        self._changed = threading.Condition(threading.Lock())
        self._pumping = False
        self._waiting = 0
        self._closed: PageddError | None = None
        self._outbox: deque[tuple[bool, bytes]] = deque()
        self._orphans: deque[Call] = deque()
        self._bell, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = self._make_poller()

    @property
    def usable(self) -> bool:
        """Whether data calls can be made: connected, not closed, and not in a forked child."""
        return self._data_wire is not None and os.getpid() == self._pid

    def start(self, verb: str, fields: Mapping[str, Any], *, control: bool = False) -> Call:
        """Send a new request.

        Raises:
            ConnectionFailed: The connection is gone, or the client was closed.
            InvalidRequest: It cannot be sent.
        """
        self._check_process()
        with self._changed:
            if self._closed is not None and (not control or self._data_wire is None):
                raise self._closed
            call, frame = self.core.open(verb, fields, control=control)
            self._post(control, frame)
        return call

    def again(self, call: Call) -> None:
        """Ask again for what did not arrive."""
        with self._changed:
            if not call.over:
                self._post(call.control, self.core.again(call))

    def forget(self, call: Call) -> None:
        """Nobody reads the call any more; the daemon need not know."""
        with self._changed:
            self.core.abandon(call)

    def cancel(self, call: Call, *, abandon: bool) -> None:
        """End a stream; ``abandon`` if nobody reads what still comes."""
        if abandon and os.getpid() != self._pid:
            return  # the stream is the parent's
        self._check_process()
        with self._changed:
            if abandon:
                self.core.abandon(call)
            if not call.over and self._closed is None:
                self._post(True, self.core.cancel(call.id))

    def orphan(self, call: Call) -> None:
        """`cancel` from a finaliser: it may run anywhere, even inside this class, so it never
        waits for the mutex; whoever holds it looks after the orphans."""
        if os.getpid() != self._pid:
            return
        self._orphans.append(call)
        if self._changed.acquire(blocking=False):
            try:
                self._bury_orphans()
            finally:
                self._changed.release()

    def wait(self, call: Call, seconds: float) -> bool:
        """Until there is something to read of the call. False: not within this time."""
        self._check_process()
        deadline = time.monotonic() + seconds
        while True:
            with self._changed:
                if call.events or call.over:
                    return True
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                if self._pumping:
                    self._waiting += 1
                    try:
                        self._changed.wait(min(remaining, threading.TIMEOUT_MAX))
                    finally:
                        self._waiting -= 1
                    continue
                self._pumping = True
            try:
                self._pump(call, deadline)
            finally:
                with self._changed:
                    self._pumping = False
                    self._flush()
                    if self._waiting:
                        self._changed.notify_all()

    def close(self, error: PageddError) -> None:
        """Every call is over with this error, the sockets are given back. Not in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._bell < 0:
                return
            self._closed = self._closed or error
            self.core.fail(error)
            while self._pumping:
                self._wake_pump()
                self._waiting += 1
                self._changed.wait()
                self._waiting -= 1
            self._flush()
            for wire in (self._data_wire, self._control_wire):
                if wire is not None:
                    wire.close()
            self._data_wire = self._control_wire = None
            os.close(self._bell)
            os.close(self._ring)
            self._bell = self._ring = -1

    def __del__(self) -> None:
        if getattr(self, "_bell", -1) >= 0:
            os.close(self._bell)
            os.close(self._ring)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise forked()

    # What follows runs with the mutex held.

    def _post(self, control: bool, frame: bytes) -> None:
        self._outbox.append((control, frame))
        if self._pumping:
            self._wake_pump()
        else:
            self._flush()

    def _wake_pump(self) -> None:
        # A full pipe has rung 65,536 times and nobody came yet: once more adds nothing.
        with contextlib.suppress(BlockingIOError):
            os.write(self._ring, b"!")

    def _flush(self) -> None:
        """Send what others left; also the cancels of streams that were dropped."""
        if self._orphans:
            self._bury_orphans()
        while self._outbox:
            control, frame = self._outbox.popleft()
            wire = self._control() if control else self._data_wire
            if wire is not None:
                wire.send(frame)

    def _bury_orphans(self) -> None:
        while self._orphans:
            call = self._orphans.popleft()
            self.core.abandon(call)
            if not call.over and self._closed is None:
                self._post(True, self.core.cancel(call.id))

    def _control(self) -> Wire | None:
        """The control wire, connected now if need be; None, its calls failed, if that fails."""
        if self._control_wire is None:
            try:
                self._control_wire = Wire(self._control_path)
            except ConnectionFailed as error:
                self.core.fail(error, control=True)
                return None
            self._poller = self._make_poller()
        return self._control_wire

    def _lose(self, wire: Wire, error: PageddError) -> None:
        """A connection is of no more use. Without its data connection the client is."""
        wire.close()
        control = wire is self._control_wire
        if control:
            self._control_wire = None
        else:
            self._data_wire = None
            self._closed = error
        self._poller = self._make_poller()
        self.core.fail(error, control=control)

    def _make_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        for wire in (self._data_wire, self._control_wire):
            if wire is not None:
                poller.register(wire.socket, zmq.POLLIN)
                poller.register(wire.monitor, zmq.POLLIN)
        return poller

    # What follows runs in the pumping thread, which alone uses the sockets.

    def _pump(self, call: Call, deadline: float) -> None:
        while not (call.events or call.over):
            now = time.monotonic()
            if now >= deadline:
                return
            until = deadline
            for wire in (self._data_wire, self._control_wire):
                if wire is not None and (wire.backlog or wire.retry_at is not None):
                    self._revive(wire, now)
                    until = min(until, now + RETRY_S)
            # Only here, blocked, without the mutex: others may post meanwhile.
            ready = self._poller.poll(_milliseconds(until - now))
            with self._changed:
                for source, _ in ready:
                    self._serve(source)
                if self._waiting:
                    self._changed.notify_all()

    def _revive(self, wire: Wire, now: float) -> None:
        with self._changed:
            if wire.retry_at is None:
                wire.flush()
            elif now >= wire.retry_at:
                wire.retry()
                self._poller = self._make_poller()

    def _serve(self, source: object) -> None:
        """One of the poller's sources is ready."""
        if source == self._bell:
            os.read(self._bell, 65536)
            self._flush()
            return
        for wire in (self._data_wire, self._control_wire):
            if wire is None:
                continue
            if source is wire.socket:
                self._read(wire)
            elif source is wire.monitor:
                error = wire.check()
                if error is not None:
                    # What arrived before the end is flushed before the monitor speaks.
                    while self._read(wire):
                        pass
                    self._lose(wire, error)

    def _read(self, wire: Wire) -> bool:
        """Take in one frame. False: there was none, or the connection was given up."""
        frame = wire.receive()
        if frame is None:
            return False
        try:
            for _, again in self.core.feed(frame):
                wire.send(again)
        except ProtocolViolation as error:
            self._lose(wire, error)
            return False
        return True


def _milliseconds(seconds: float) -> int:
    return -1 if math.isinf(seconds) else math.ceil(seconds * 1000)


def forked() -> ConnectionFailed:
    """The error of a client that is used in a child process: its sockets are the parent's."""
    return ConnectionFailed(
        "this client was made before a fork: connect again in the child process",
        code="E_FORKED",
        retryable=False,
    )

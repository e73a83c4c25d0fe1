"""The sockets of an asyncio client, on its event loop. `_pump` is the same for threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zmq

from pagedd._core import Call, Core
from pagedd._errors import ConnectionFailed, PageddError, ProtocolViolation
from pagedd._pump import forked
from pagedd._wire import RETRY_S, Wire

FRAMES_PER_TURN = 64
"""Frames taken in before the rest of the event loop gets its turn."""


class _WatchedWire:
    """A `Wire` whose file descriptors the event loop watches.

    A ZeroMQ descriptor is edge-triggered and says no more than "look again" (zmq_getsockopt(3),
    ZMQ_FD); sending may take the edge away too. So after each wake-up and each send, everything is
    read until the socket itself says that it has nothing.
    """

    def __init__(
        self,
        path: Path,
        on_frame: Callable[[bytes], None],
        on_lost: Callable[[PageddError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._wire = Wire(path)
        self._open = True
        self._look_due = False
        self._watch()

    def send(self, frame: bytes) -> None:
        """Send now, or when libzmq takes it."""
        self._wire.send(frame)
        self._look_soon()

    def close(self) -> None:
        """Give the sockets back."""
        if self._open:
            self._open = False
            self._unwatch()
            self._wire.close()

    def _watch(self) -> None:
        self._descriptors = [int(s.get(zmq.FD)) for s in (self._wire.socket, self._wire.monitor)]
        for descriptor in self._descriptors:
            self._loop.add_reader(descriptor, self._look)
        self._look_soon()

    def _unwatch(self) -> None:
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)

    def _look_soon(self) -> None:
        if not self._look_due:
            self._look_due = True
            self._loop.call_soon(self._look_now)

    def _look_now(self) -> None:
        self._look_due = False
        self._look()

    def _look(self) -> None:
        """Take in what there is."""
        # The monitor first: it speaks after the last frame was flushed, so all frames are there.
        error = self._wire.check() if self._open else None
        frames = 0
        while self._open and (frames < FRAMES_PER_TURN or error is not None):
            if not int(self._wire.socket.get(zmq.EVENTS)) & zmq.POLLIN:
                break
            frame = self._wire.receive()
            if frame is not None:
                self._on_frame(frame)
            frames += 1
        else:
            if self._open:
                self._look_soon()
        if not self._open:
            return
        if error is not None:
            self._on_lost(error)
        elif self._wire.retry_at is not None or self._wire.backlog:
            self._loop.call_later(RETRY_S, self._revive)

    def _revive(self) -> None:
        if not self._open:
            return
        if self._wire.retry_at is None:
            self._wire.flush()
            self._look_soon()
        else:
            self._unwatch()
            self._wire.retry()
            self._watch()


class Hub:
    """The sockets of one client and the calls that wait for them. Belongs to the running loop."""

    def __init__(self, data: Path, control: Path) -> None:
        """Connect to the data socket; to the control socket at its first use."""
        self.core = Core()
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._closed: PageddError | None = None
        self._control_path = control
        self._control_wire: _WatchedWire | None = None
        self._data_wire = _WatchedWire(data, self._take_in, self._lose_data)

    @property
    def usable(self) -> bool:
        """Whether data calls can be made."""
        return self._closed is None and os.getpid() == self._pid

    def start(self, verb: str, fields: Mapping[str, Any], *, control: bool = False) -> Call:
        """Send a new request.

        Raises:
            ConnectionFailed: The connection is gone, or the client was closed.
            InvalidRequest: It cannot be sent.
        """
        if os.getpid() != self._pid:
            raise forked()
        if self._closed is not None:
            raise self._closed
        call, frame = self.core.open(verb, fields, control=control)
        self._post(control, frame)
        return call

    def again(self, call: Call) -> None:
        """Ask again for what did not arrive."""
        if not call.over:
            self._post(call.control, self.core.again(call))

    def forget(self, call: Call) -> None:
        """Nobody reads the call any more; the daemon need not know."""
        self.core.abandon(call)

    def cancel(self, call: Call, *, abandon: bool) -> None:
        """End a stream; ``abandon`` if nobody reads what still comes."""
        if abandon:
            self.core.abandon(call)
        if not call.over and self.usable:
            self._post(True, self.core.cancel(call.id))

    def orphan(self, call: Call) -> None:
        """`cancel` from a finaliser, which may run in any thread."""
        if self.usable and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.cancel(call, abandon=True))

    async def wait(self, call: Call, seconds: float) -> bool:
        """Until there is something to read of the call. False: not within this time."""
        if call.ready:
            return True
        woken = self._loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        # Cheaper than asyncio.wait_for, which wraps each wait into more than the wait itself.
        timer = None if seconds == float("inf") else self._loop.call_later(seconds, wake)
        call.waker = wake
        try:
            await woken
        finally:
            call.waker = None
            if timer is not None:
                timer.cancel()
        return call.ready

    def close(self, error: PageddError) -> None:
        """Every call is over with this error, the sockets are given back."""
        self._closed = self._closed or error
        self.core.fail(error)
        if os.getpid() == self._pid:
            self._data_wire.close()
            if self._control_wire is not None:
                self._control_wire.close()

    def _post(self, control: bool, frame: bytes) -> None:
        wire = self._control() if control else self._data_wire
        if wire is not None:
            wire.send(frame)

    def _control(self) -> _WatchedWire | None:
        """The control wire, connected now if need be; None, its calls failed, if that fails."""
        if self._control_wire is None:
            try:
                self._control_wire = _WatchedWire(
                    self._control_path, self._take_in, self._lose_control
                )
            except ConnectionFailed as error:
                self.core.fail(error, control=True)
        return self._control_wire

    def _take_in(self, frame: bytes) -> None:
        try:
            for control, again in self.core.feed(frame):
                self._post(control, again)
        except ProtocolViolation as error:
            self.close(error)

    def _lose_data(self, error: PageddError) -> None:
        self._closed = self._closed or error
        self._data_wire.close()
        self.core.fail(error, control=False)

    def _lose_control(self, error: PageddError) -> None:
        if self._control_wire is not None:
            self._control_wire.close()
            self._control_wire = None
        self.core.fail(error, control=True)

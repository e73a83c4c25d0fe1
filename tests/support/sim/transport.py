"""Sockets in simulated time: messages take a while, may get lost, and wait for who does not read.

Requests and events pass the real decoder, validation and encoder; what `ZmqTransport` decides on
its own (early requests, who falls behind, who is dropped) is decided here by the same rules.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgpack

from pagedd_daemon.front import requests as r
from pagedd_daemon.front import wire
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.identity import Program
from pagedd_daemon.front.limits import Limits
from pagedd_daemon.front.ports import Connection, Event, Service
from tests.support.sim.loop import VirtualLoop

Packed: TypeAlias = bytes
AT_THE_DOOR = "too much waits to be read on this connection"
"""What a client is told whose request does not reach the service."""
_ON_THE_WAY = 3
"""Messages that the sockets take for a client that does not read."""


@dataclass(slots=True, eq=False)
class Line:
    """A client's end of its connection, and the front's."""

    heard: Callable[[list[dict[str, Any]]], None]
    """Takes the events of a message."""
    uid: int
    program: Program
    delay_s: float
    """Of a message, at most, each way and on each socket."""
    lost: float = 0.0
    """Share of messages to the client that do not arrive."""
    reading: bool = True
    connection: Connection | None = None
    hello: str = ""
    """Id of a hello that is not answered yet."""
    open: bool = False
    """The front knows it."""
    early: list[r.DataRequest] = field(default_factory=list)
    waiting: deque[Packed] = field(default_factory=deque)
    bytes: int = 0
    """That wait in the front."""
    unread: deque[Packed] = field(default_factory=deque)
    """Messages in the sockets."""
    last: dict[str, float] = field(
        default_factory=lambda: {"ask": 0.0, "hear": 0.0, "control": 0.0}
    )
    """When the last message of each direction arrives: none overtakes another."""


class SimTransport:
    """Implements `pagedd_daemon.front.ports.Transport`, and is the network before it."""

    def __init__(self, loop: VirtualLoop, dice: random.Random, limits: Limits) -> None:
        self.service: Service
        self._loop = loop
        self._dice = dice
        self._limits = limits
        self._lines: dict[int, Line] = {}
        """By the connection's number."""
        self._numbers = 0
        self._dirty: dict[Line, None] = {}

    # ------------------------------------------------------------------------------ the client's

    def ask(self, line: Line, request: dict[str, Any]) -> None:
        """Send a request on the data socket."""
        data = msgpack.packb({"v": wire.VERSION, **request})
        self._carry(line, "ask", lambda: self._asked(line, data))

    def control(
        self, line: Line, request: dict[str, Any], reply: Callable[[dict[str, Any]], None]
    ) -> None:
        """Send a request on the control socket; it may overtake those on the other."""
        data = msgpack.packb({"v": wire.VERSION, **request})
        self._carry(line, "control", lambda: self._controlled(line, data, reply))

    def hang_up(self, line: Line) -> None:
        """Close the connection, whatever is on its way."""
        line.reading = False
        self._carry(line, "ask", lambda: self._drop(line))

    def read(self, line: Line, reading: bool) -> None:
        """Stop reading, or go on."""
        line.reading = reading
        if reading:
            unread, line.unread = line.unread, deque()
            for data in unread:
                self._deliver(line, data)
            self._push(line)

    # -------------------------------------------------------------------------------- the front's

    def send(self, connection: Connection, event: Event) -> None:
        """See `Transport`."""
        line = self._lines.get(connection.number)
        if line is not None:
            self._queue(line, event)

    def flush(self) -> None:
        """See `Transport`."""
        dirty, self._dirty = self._dirty, {}
        for line in dirty:
            self._push(line)

    def backlog_bytes(self, connection: Connection) -> int:
        """See `Transport`."""
        line = self._lines.get(connection.number)
        return 0 if line is None else line.bytes

    @property
    def connected(self) -> int:
        """Connections that the front knows."""
        return len(self._lines)

    # ---------------------------------------------------------------------------------- both ways

    def _carry(self, line: Line, direction: str, what: Callable[[], None]) -> None:
        at = max(
            line.last.get(direction, 0.0), self._loop.time() + self._dice.random() * line.delay_s
        )
        # Timers of the same moment are in no order, and these must be.
        line.last[direction] = at + 1e-6
        self._loop.call_at(line.last[direction], what)

    def _queue(self, line: Line, event: Event) -> None:
        packed = wire.pack_event(event)
        line.waiting.append(packed)
        line.bytes += len(packed)
        if not self._dirty:
            self._loop.call_soon(self.flush)
        self._dirty[line] = None

    def _push(self, line: Line) -> None:
        while line.waiting and (line.reading or len(line.unread) < _ON_THE_WAY):
            count = min(len(line.waiting), 4 if not line.reading else 64)
            packed = [line.waiting.popleft() for _ in range(count)]
            line.bytes -= sum(map(len, packed))
            data = wire.join_events(packed)
            if line.reading:
                self._deliver(line, data)
            else:
                line.unread.append(data)
        if line.open:
            self._judge(line)

    def _deliver(self, line: Line, data: bytes) -> None:
        if self._dice.random() < line.lost:
            return
        events = msgpack.unpackb(data, strict_map_key=False)["ev"]
        self._carry(line, "hear", lambda: line.heard(events))

    def _judge(self, line: Line) -> None:
        connection, budget = line.connection, self._limits.output_bytes_per_connection
        assert connection is not None
        if not connection.lagging and line.bytes > budget:
            connection.lagging = True
            self.service.lagging(connection, True)
        elif connection.lagging and line.bytes < budget // 2:
            connection.lagging = False
            self.service.lagging(connection, False)
        if line.bytes > budget + 2 * self._limits.frame_bytes:
            self._drop(line)

    # ---------------------------------------------------------------------------------- arrivals

    def _asked(self, line: Line, data: bytes) -> None:
        id = ""
        try:
            request = wire.parse_data(wire.decode([data], self._limits), self._limits)
            id = request.id
            if isinstance(request, r.Hello):
                self._hello(line, request)
            elif line.connection is None or not (line.open or line.hello):
                return  # the connection is gone
            elif isinstance(request, r.Bye):
                self._drop(line)
            elif line.connection.lagging:
                raise WireError("E_SLOW", AT_THE_DOOR)
            elif line.hello:
                line.early.append(request)
            else:
                self.service.request(line.connection, request)
        except WireError as error:
            self._queue(line, error.as_event(id or error.id, 0))

    def _hello(self, line: Line, hello: r.Hello) -> None:
        self._numbers += 1
        token = self._numbers.to_bytes(16, "big")
        line.hello = hello.id
        line.connection = Connection(
            self._numbers, token, line.uid, 1, hello.app, hello.priority, program=line.program
        )
        self._loop.call_later(self._dice.random() * 0.003, self._identified, line)

    def _identified(self, line: Line) -> None:
        connection = line.connection
        assert connection is not None
        if not line.hello:
            return
        id, line.hello = line.hello, ""
        line.open = True
        self._lines[connection.number] = line
        told = self.service.opened(connection)
        fields = {"token": connection.token, **told}
        self._queue(line, {"id": id, "seq": 0, "type": "result", **fields})
        early, line.early = line.early, []
        for request in early:
            self.service.request(connection, request)

    def _drop(self, line: Line) -> None:
        line.hello = ""
        if not line.open:
            return
        line.open = False
        line.waiting.clear()
        line.bytes = 0
        connection = line.connection
        assert connection is not None
        del self._lines[connection.number]
        self.service.closed(connection)

    def _controlled(self, line: Line, data: bytes, reply: Callable[[dict[str, Any]], None]) -> None:
        request = wire.parse_control(wire.decode([data], self._limits), self._limits)
        connection = line.connection if line.open else None

        def answer(event: Event) -> None:
            told = msgpack.unpackb(wire.pack_event(event), strict_map_key=False)
            self._loop.call_later(self._dice.random() * line.delay_s, reply, told)

        self.service.control(line.uid, request, connection, answer)

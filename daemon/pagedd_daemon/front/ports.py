"""Where the transport (sockets) and the service (what requests mean) meet.

The transport authenticates, decodes, validates and delivers; the service answers. Neither knows
more of the other than this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pagedd_daemon.front.identity import UNKNOWN, Program
from pagedd_daemon.front.requests import ControlRequest, DataRequest

Event = Mapping[str, Any]
"""One event of docs/protocol.md, section 2: ``id``, ``seq``, ``type`` and its fields."""


@dataclass(slots=True, eq=False)
class Connection:
    """One connection on the data socket that has said hello."""

    number: int
    """1, 2, … for the life of the daemon; what logs and listings show."""
    token: bytes
    """16 random bytes, secret."""
    uid: int
    """Of the peer, from the kernel."""
    pid: int
    """Of the peer, from the kernel."""
    app: str
    priority: str
    client: str = ""
    program: Program = UNKNOWN
    """Of the peer, from the kernel."""
    lagging: bool = field(default=False)
    """More than the output limit waits for it."""


class Service(Protocol):
    """What the transport calls. All calls come from the event loop's thread and must not block.

    `opened`, `request` and `control` may raise `pagedd_daemon.front.errors.WireError`: it becomes
    the ``error`` event, with ``seq`` 0, that ends the request.
    """

    def opened(self, connection: Connection) -> dict[str, Any]:
        """A hello was accepted. Returns the fields the service adds to its result."""
        ...

    def request(self, connection: Connection, request: DataRequest) -> None:
        """A validated request; answered with `Transport.send`, now or later."""
        ...

    def control(
        self,
        uid: int,
        request: ControlRequest,
        connection: Connection | None,
        reply: Callable[[Event], None],
    ) -> None:
        """A validated control request; ``connection`` is the one its token names, if it has one."""
        ...

    def closed(self, connection: Connection) -> None:
        """The peer said bye, died, or could not be reached. Nothing can be sent to it any more."""
        ...

    def lagging(self, connection: Connection, lagging: bool) -> None:
        """The peer stopped reading (its requests should pause), or reads again."""
        ...


class Transport(Protocol):
    """What the service calls."""

    def send(self, connection: Connection, event: Event) -> None:
        """Queue an event. Events queued in one turn of the event loop travel as one message."""
        ...

    def flush(self) -> None:
        """Send now what is queued, without waiting for the end of the turn."""
        ...

    def backlog_bytes(self, connection: Connection) -> int:
        """Bytes that wait for this peer."""
        ...

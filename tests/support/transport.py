"""A transport in a thread of its own with a service that writes down what it is told."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgpack
import zmq

from pagedd_daemon.front import requests as r
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits
from pagedd_daemon.front.ports import Connection, Event
from pagedd_daemon.front.transport import ZmqTransport

WAIT_MS = 20_000
"""Bounds what never comes; nothing is measured with it."""

_T = TypeVar("_T")


@dataclass
class RecordingService:
    """Answers `models` at once, `generate` with as many chunks as `max_tokens`, nothing else."""

    transport: ZmqTransport | None = None
    connections: list[Connection] = field(default_factory=list)
    requests: list[tuple[Connection, r.DataRequest]] = field(default_factory=list)
    calls: queue.SimpleQueue[tuple[Any, ...]] = field(default_factory=queue.SimpleQueue)
    on_request: Callable[[Connection, r.DataRequest], None] | None = None

    def opened(self, connection: Connection) -> dict[str, Any]:
        self.connections.append(connection)
        return {"server": "test", "model": None, "notice": None}

    def request(self, connection: Connection, request: r.DataRequest) -> None:
        self.requests.append((connection, request))
        if self.on_request is not None:
            self.on_request(connection, request)
        elif isinstance(request, r.Models):
            self.send(connection, {"id": request.id, "seq": 0, "type": "result", "models": []})
        elif isinstance(request, r.Generate):
            for seq in range(request.max_tokens):
                event = {"id": request.id, "seq": seq, "type": "chunk", "text": "x" * 100}
                self.send(connection, event)

    def send(self, connection: Connection, event: Event) -> None:
        assert self.transport is not None
        self.transport.send(connection, event)

    def control(
        self,
        uid: int,
        request: r.ControlRequest,
        connection: Connection | None,
        reply: Callable[[Event], None],
    ) -> None:
        number = connection.number if connection else None
        reply({"id": request.id, "seq": 0, "type": "result", "verb": request.verb, "for": number})

    def closed(self, connection: Connection) -> None:
        self.calls.put(("closed", connection.number))

    def lagging(self, connection: Connection, lagging: bool) -> None:
        self.calls.put(("lagging", connection.number, lagging))

    def next_call(self) -> tuple[Any, ...]:
        return self.calls.get(timeout=WAIT_MS / 1000)


class Served:
    """A running transport; everything that touches it goes through `run` or `call`."""

    def __init__(
        self,
        path: Path,
        limits: Limits = DEFAULT_LIMITS,
        service: RecordingService | None = None,
        access: Access | None = None,
    ) -> None:
        self.path = path
        self.service = service or RecordingService()
        self.transport = ZmqTransport(path, limits, self.service, access=access)
        self.service.transport = self.transport
        self.loop = asyncio.new_event_loop()
        self._stopped = False
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        try:
            self.run(self.transport.start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop(0.0)
        finally:
            self._end()

    def stop(self, flush_s: float) -> None:
        if not self._stopped:
            self._stopped = True
            self.run(self.transport.stop(flush_s))

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_MS / 1000)

    def call(self, work: Callable[..., _T], *arguments: Any) -> _T:
        async def inside() -> _T:
            return work(*arguments)

        return self.run(inside())

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class Client:
    """One socket: raw messages out, events in."""

    def __init__(self, path: Path, name: str = "pagedd.sock", **options: Any) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sock = self.context.socket(zmq.DEALER)
        self.sock.set(zmq.LINGER, 0)
        self.sock.set(zmq.RCVTIMEO, WAIT_MS)
        self.sock.set(zmq.SNDTIMEO, WAIT_MS)
        for option, value in options.items():
            self.sock.set(getattr(zmq, option), value)
        self.sock.connect(f"ipc://{path / name}")
        self._events: list[dict[str, Any]] = []

    def send(self, *frames: bytes) -> None:
        self.sock.send_multipart(frames)

    def ask(self, verb: str, id: str = "q", **fields: Any) -> None:
        self.send(msgpack.packb({"v": 1, "verb": verb, "id": id, **fields}))

    def event(self) -> dict[str, Any]:
        while not self._events:
            message = msgpack.unpackb(self.sock.recv())
            assert message["v"] == 1
            self._events += message["ev"]
        return self._events.pop(0)

    def call(self, verb: str, id: str = "q", **fields: Any) -> dict[str, Any]:
        self.ask(verb, id, **fields)
        return self.event()

    def hello(self, app: str = "test", **fields: Any) -> dict[str, Any]:
        answer = self.call("hello", "h", app=app, **fields)
        assert answer["type"] == "result", answer
        return answer

    def close(self) -> None:
        self.sock.close(0)
        self.context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def connected(path: Path, **options: Any) -> Iterator[Client]:
    """A client that has said hello."""
    with Client(path, **options) as client:
        client.hello()
        yield client


def said(process: subprocess.Popen[bytes]) -> str:
    """The next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()

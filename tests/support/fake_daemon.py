"""A daemon that does what a test tells it: two ROUTER sockets in a thread, and a script.

It speaks just enough of docs/protocol.md for the client's own tests, and it can do what the real
one must not: lose events, send nonsense, die.
"""

from __future__ import annotations

import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack
import zmq

TOKEN = b"0123456789abcdef"
LIMITS = {"frame_bytes": 2**20}

Request = dict[str, Any]
Handler = Callable[["Peer", Request], None]


def ids(*tokens: int) -> bytes:
    """Token ids as the wire has them."""
    return struct.pack(f"<{len(tokens)}i", *tokens)


class Peer:
    """One client, for the handlers: who it is and which request is answered."""

    def __init__(self, router: zmq.Socket[bytes], identity: bytes) -> None:
        self._router = router
        self._identity = identity

    def raw(self, payload: bytes) -> None:
        """Send bytes, whatever they are."""
        self._router.send_multipart([self._identity, payload])

    def events(self, *events: Mapping[str, Any]) -> None:
        """Send events as one message."""
        self.raw(msgpack.packb({"v": 1, "ev": list(events)}))

    def result(self, request: Request, **fields: Any) -> None:
        """Answer with a result."""
        self.events({"id": request["id"], "seq": 0, "type": "result", **fields})

    def error(self, request: Request, code: str, seq: int = 0, **fields: Any) -> None:
        """Answer with an error."""
        error = {"message": f"scripted {code}", "retryable": False, "details": {}} | fields
        self.events({"id": request["id"], "seq": seq, "type": "error", "code": code, **error})


def story(request: Request, *words: str, reason: str = "stop") -> list[dict[str, Any]]:
    """Every event of a stream that says these words."""
    head = {"id": request["id"]}
    events: list[dict[str, Any]] = [
        {"type": "accepted", "prompt_tokens": 3, "seed": 7, "model": "fake"},
        *(
            {"type": "chunk", "index": 0, "text": word, "tokens": ids(number)}
            for number, word in enumerate(words)
        ),
        {
            "type": "done",
            "finish": [{"index": 0, "reason": reason, "text": ""}],
            "usage": {"prompt_tokens": 3, "cached_tokens": 1, "generated_tokens": len(words)},
            "timings": {"queue_ms": 0.5, "prompt_ms": 1, "generation_ms": 2.0, "ttft_ms": 1.5},
        },
    ]
    return [head | {"seq": seq} | event for seq, event in enumerate(events)]


class FakeDaemon:
    """A context manager; `on` sets what a verb is answered with."""

    def __init__(
        self, directory: Path, *, admit: bool = True, listener: socket.socket | None = None
    ) -> None:
        """``listener``: a listening socket to take over as the data socket."""
        self.directory = directory
        self.host = f"unix://{directory / 'pagedd.sock'}"
        self.received: queue.Queue[Request] = queue.Queue()
        self._admit = admit
        self._handlers: dict[str, Handler] = {
            "hello": self._hello,
            "bye": lambda peer, request: peer.result(request),
            "ping": lambda peer, request: peer.result(
                request, pid=1, uptime_s=1.0, state="ready", steps=5
            ),
            "cancel": lambda peer, request: peer.result(request, cancelled=True),
            "generate": lambda peer, request: peer.events(*story(request, "a", "b", "c")),
        }
        self._orders: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._bell, self._ring = os.pipe()
        self._context = zmq.Context()
        self._data = self._bind("pagedd.sock", listener)
        self._control = self._bind("control.sock")
        self._thread = threading.Thread(target=self._serve, name="fake-daemon")

    def on(self, verb: str, handler: Handler) -> None:
        """Answer this verb so. The handler runs in the daemon's thread."""
        self._handlers[verb] = handler

    def do(self, order: Callable[[], None]) -> None:
        """Run something in the daemon's thread: sockets belong to it."""
        self._orders.put(order)
        os.write(self._ring, b"!")

    def expect(self, verb: str) -> Request:
        """The next request of this verb, others skipped. Fails after 10 s."""
        while True:
            request = self.received.get(timeout=10)
            if request["verb"] == verb:
                return request

    def die(self) -> None:
        """Close both sockets, as the kernel does for a process that was killed. May be repeated."""
        if self._thread.is_alive():
            self._orders.put(None)
            os.write(self._ring, b"!")
            self._thread.join()

    def _bind(self, name: str, listener: socket.socket | None = None) -> zmq.Socket[bytes]:
        router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        router.linger = 0
        if not self._admit:
            router.zap_domain = b"pagedd"
        if listener is not None:
            router.use_fd = os.dup(listener.fileno())
        router.bind(f"ipc://{self.directory / name}")
        return router

    def _hello(self, peer: Peer, request: Request) -> None:
        peer.result(
            request, token=TOKEN, server="0.0", pid=1, limits=LIMITS, model=None, notice=None
        )

    def _serve(self) -> None:
        doorman: zmq.Socket[bytes] = self._context.socket(zmq.REP)
        doorman.linger = 0
        doorman.bind("inproc://zeromq.zap.01")
        poller = zmq.Poller()
        for source in (self._data, self._control, doorman, self._bell):
            poller.register(source, zmq.POLLIN)
        try:
            while True:
                for source, _ in poller.poll():
                    if source == self._bell:
                        os.read(self._bell, 1)
                        order = self._orders.get()
                        if order is None:
                            return
                        order()
                    elif source is doorman:
                        version, request_id, *_ = doorman.recv_multipart()
                        doorman.send_multipart([version, request_id, b"400", b"no", b"", b""])
                    else:
                        self._answer(source)
        finally:
            doorman.close()
            self._data.close()
            self._control.close()

    def _answer(self, router: zmq.Socket[bytes]) -> None:
        identity, payload = router.recv_multipart()
        request = msgpack.unpackb(payload, strict_map_key=False)
        self.received.put(request)
        handler = self._handlers.get(request["verb"])
        if handler is not None:
            handler(Peer(router, identity), request)

    def __enter__(self) -> FakeDaemon:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.die()
        self._context.term()
        os.close(self._bell)
        os.close(self._ring)

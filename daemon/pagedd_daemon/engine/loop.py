"""The engine's one thread: read what the front says, run a step, say what came out."""

from __future__ import annotations

import gc
import logging
import os
import select
import socket
import sys
import threading
import time

from pagedd_daemon import messages as m
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.vram import Watch
from pagedd_daemon.link import FrameReader, LinkError, pack, unpack

log = logging.getLogger(__name__)

SNAPSHOT_S = 2.0
"""Between two snapshots while steps run. Whoever looks asks for a fresh one; these are for when an
engine is too busy to answer in time. Four a second cost both processes 0.5 % of decode speed."""
_TRANSFER_WAIT_S = 0.0005
"""Nap when nobody can run before a transfer ends."""
_BLOCKED_WAIT_S = 0.010
"""Nap when nobody can run although nothing is under way: only a message can change that."""
_SAVE_S = 2.0
"""Seconds that the end of an engine waits for copies to a store that persists; the front gives an
engine five in all."""
_RECEIVE_BYTES = 1 << 20
SWITCH_S = 0.0005
"""After which threads that copy or compile get the interpreter from the loop. They want it for
microseconds, and a step waits for them: Python's own 5 ms are as long as the step."""


class Disconnected(Exception):  # noqa: N818
    """The front is gone."""


class FrontLink:
    """The engine's end of the socketpair."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._reader = FrameReader()
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)

    def wake_for(self, other: Watch) -> None:
        """`receive` and `waiting` look for ``other``, too."""
        self._poller.register(other, select.POLLIN)

    def receive(self, timeout_s: float | None) -> list[m.ToEngine]:
        """Messages that are there, waiting for the first at most ``timeout_s`` (None: for ever), or
        for whoever else is looked for.

        Raises:
            Disconnected: The front closed its end or died.
        """
        ready = self._poller.poll(None if timeout_s is None else timeout_s * 1e3)
        if all(descriptor != self._sock.fileno() for descriptor, _ in ready):
            return []
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except ConnectionError as error:
            raise Disconnected from error
        if not data:
            raise Disconnected
        return [self._ours(unpack(body)) for body in self._reader.feed(data)]

    def waiting(self) -> bool:
        """Whether there is something to do beside steps, be it the end of the link."""
        return bool(self._poller.poll(0))

    @staticmethod
    def _ours(message: m.ToEngine | m.ToFront) -> m.ToEngine:
        if not isinstance(message, m.ToEngine):
            raise LinkError(f"{type(message).__name__} is not for the engine")
        return message

    def send(self, message: m.ToFront) -> None:
        """Write one message."""
        try:
            self._sock.sendall(pack(message))
        except (BrokenPipeError, ConnectionError) as error:
            raise Disconnected from error

    def die_with_front(self) -> None:
        """End this process when the front hangs up, even in the middle of a long step or load.

        Polling for no event but the hang-up costs nothing, while the loop would only notice at its
        next read.
        """
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)

        def watch() -> None:
            poller.poll()
            os._exit(70)

        threading.Thread(target=watch, name="lifeline", daemon=True).start()


def run(
    engine: Engine, link: FrontLink, first: list[m.ToEngine], vram: Watch | None = None
) -> None:
    """Serve until `Shutdown` or until the front is gone.

    Args:
        engine: What serves.
        link: To the front.
        first: Messages that came while the model was being loaded.
        vram: Says what size the pool shall have.
    """
    if vram is not None:
        link.wake_for(vram)
    gc.collect()
    gc.freeze()  # 65k objects: a full collection takes 4 ms, none after this
    # A step makes and drops some hundred containers, none in cycles: the default of 700 would have
    # the youngest generation searched every few steps.
    gc.set_threshold(50_000, 20, 50)
    sys.setswitchinterval(SWITCH_S)
    snapshots = _Snapshots(engine, link)
    messages = first
    while True:
        for message in messages:
            if isinstance(message, m.Shutdown):
                _save(engine)
                return
            if isinstance(message, m.AskSnapshot):
                link.send(engine.snapshot(blocks=message.blocks))
            else:
                engine.handle(message)
        size = None if vram is None else vram.wanted()
        if size is not None:
            engine.resize(size)
        stepped = engine.step(link.send, link.waiting)
        idle = not engine.has_work
        snapshots.push(idle, changed=size is not None)
        if idle:
            timeout = None
        elif stepped:
            timeout = 0.0
        else:
            timeout = _TRANSFER_WAIT_S if engine.transfers_in_flight else _BLOCKED_WAIT_S
        messages = link.receive(timeout)


def _save(engine: Engine) -> None:
    """Let what is on its way to a store that persists arrive, for a while."""
    end = time.monotonic() + _SAVE_S
    while engine.saving and time.monotonic() < end:
        engine.settle()
        time.sleep(_TRANSFER_WAIT_S)


class _Snapshots:
    """Pushes the figures every `SNAPSHOT_S` while steps run, once when they end, and when the pool
    has another size."""

    def __init__(self, engine: Engine, link: FrontLink) -> None:
        self._engine = engine
        self._link = link
        self._next = 0.0
        self._idle = False

    def push(self, idle: bool, *, changed: bool) -> None:
        now = time.monotonic()
        if changed or (now >= self._next if not idle else not self._idle):
            self._next = now + SNAPSHOT_S
            self._link.send(self._engine.snapshot())
        self._idle = idle

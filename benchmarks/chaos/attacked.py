"""The whole front in this process, without its sockets: what arrives is handed to it directly.

Transport, choke point, service, sessions, accounts, settings and helper processes are those of the
daemon. The engine is the real one over the simulated backend, in this process too, and everything
that the two say to each other goes through the form it has on their link.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgpack
import zmq

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Backend
from pagedd_daemon.backends.simulated import SimulatedBackend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.front import engine_link, wire
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.auth import Credentials
from pagedd_daemon.front.config import Settings
from pagedd_daemon.front.config_model import ConfigFile
from pagedd_daemon.front.engine_link import EngineListener
from pagedd_daemon.front.helper_pool import HelperPool
from pagedd_daemon.front.limits import DEFAULT_LIMITS
from pagedd_daemon.front.output import Output
from pagedd_daemon.front.ports import Event
from pagedd_daemon.front.router import Router
from pagedd_daemon.front.service import FrontService
from pagedd_daemon.front.source import ModelSource
from pagedd_daemon.front.transport import ZmqTransport
from pagedd_daemon.link import pack, unpack
from pagedd_daemon.models.registry import Registry

_HEAD = 4
"""Bytes of a frame's length on the link."""
_DECODED_EVERY = 61
"""One in so many answers is decoded."""


class LocalEngine:
    """An engine that steps when it is told to. Implements `engine_link.Engine`."""

    def __init__(self, listener: EngineListener) -> None:
        self.pid = os.getpid()
        self._listener = listener
        self._inbox: deque[Any] = deque()
        self._backend: Backend | None = None
        self.core: Engine | None = None
        self._grammars: Grammars | None = None

    def send(self, message: m.ToEngine) -> None:
        """See `engine_link.Engine`."""
        self._inbox.append(unpack(pack(message)[_HEAD:]))

    def _say(self, message: m.ToFront) -> None:
        self._listener.engine_said(self, unpack(pack(message)[_HEAD:]))

    def turn(self) -> None:
        """Take what was said, and run a step: as `pagedd_daemon.engine.loop.run` once around."""
        if not self._inbox and not (self.core is not None and self.core.has_work):
            return
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, m.Configure):
                self._load(message)
            elif isinstance(message, m.AskSnapshot):
                assert self.core is not None
                self._say(self.core.snapshot(blocks=message.blocks))
            elif not isinstance(message, m.Shutdown):
                assert self.core is not None
                self.core.handle(message)
        if self.core is not None:
            self.core.step(self._say)

    def _load(self, configure: m.Configure) -> None:
        self._backend = backend = SimulatedBackend.from_configure(configure)
        caps = backend.capabilities
        self._grammars = Grammars(configure, caps)
        self.core = Engine(backend, time.monotonic, self._grammars, write_through=True)
        pool, eog = caps.gpu_blocks * caps.block_tokens, tuple(sorted(caps.eog_tokens))
        self._say(
            m.Ready(
                *(caps.name, caps.device, caps.vocab_size, caps.context_tokens, pool),
                *(caps.block_tokens, eog, caps.kv_dtype, caps.ram_blocks * caps.block_tokens),
            )
        )

    def kill(self) -> None:
        """See `engine_link.Engine`."""
        self._listener.engine_gone(self, -9)

    async def stop(self, grace_s: float) -> int:
        """See `engine_link.Engine`."""
        if self._grammars is not None:
            self._grammars.close()
        if self._backend is not None:
            self._backend.close()
        return 0


class _Source(ModelSource):
    engine: LocalEngine | None = None

    async def spawn(self, listener: EngineListener) -> engine_link.Engine:
        """An engine in this process, in place of a process."""
        self.engine = LocalEngine(listener)
        return self.engine


class _Frame:
    """A frame as the transport sees it."""

    def __init__(self, data: bytes, fd: int) -> None:
        self.bytes = data
        self._fd = fd

    def __len__(self) -> int:
        return len(self.bytes)

    def get(self, option: int) -> int:
        return self._fd


LIMITS = replace(
    DEFAULT_LIMITS, messages_per_s=10**9, message_burst=10**9, messages_per_s_per_user=10**9
)
"""One process sends all of it, as fast as it can, and all of it is to be looked at."""


class _Wire:
    """Stands where the ROUTER sockets are: takes what is sent, and looks at it."""

    def __init__(self) -> None:
        self.stalled: set[bytes] = set()
        """Routes that take nothing at the moment."""
        self.answers = 0
        self.defects: list[str] = []
        """Answers that say that the daemon has a defect."""
        self.fds: set[int] = set()

    def is_connected(self, fd: int) -> bool:
        return fd in self.fds

    def address(self, route: bytes) -> None:
        if route in self.stalled:
            raise zmq.Again

    def body(self, body: bytes) -> None:
        self.answers += 1
        if b"E_INTERNAL" in body:
            self.defects.append(repr(body[:300]))
        if self.answers % _DECODED_EVERY == 0:
            assert msgpack.unpackb(body)["v"] == 1

    def answer(self, route: bytes, event: Event) -> None:
        self.body(wire.encode([event]))

    def check(self) -> None:
        pass

    def close(self, linger_ms: int) -> None:
        pass


class _Transport(ZmqTransport):
    """The daemon's, over a `_Wire`."""

    def __init__(self, folder: Path, service: FrontService, ends: _Wire) -> None:
        super().__init__(folder, LIMITS, service)
        self._loop = asyncio.get_running_loop()
        self._data = self._control = cast(Router, ends)
        self._output = Output(self._loop, LIMITS, self._peers, drop=self._drop, lagging=self._lags)
        self._output.router = self._data
        self._servers = []

    def hand_over(self, route: bytes, control: bool, frames: list[_Frame]) -> None:
        """As `Router` does with what it received."""
        handle = self._control_message if control else self._data_message
        user = Credentials(os.geteuid(), os.getegid(), os.getpid())
        handle(route, user, cast("list[zmq.Frame]", frames))

    def token(self, route: bytes) -> bytes:
        """Of the connection; 16 zeros where there is none."""
        peer = self._peers.by_route.get(route)
        return bytes(16) if peer is None else peer.connection.token

    def gone(self, fd: int) -> None:
        """As `Router` tells of a connection that has ended."""
        self._data_changed([fd])

    async def end(self) -> None:
        """Let go of what it watches."""
        self._peers.close()
        self._identifying.shutdown()


class _Listener(logging.Handler):
    """Keeps what is logged as an error: in this run nothing may be."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record)[-2000:])


class Front:
    """The front, attacked over some connections, each by its number."""

    def __init__(self, folder: Path, connections: int) -> None:
        self._folder = folder
        self._config = folder / "config.toml"
        self._count = connections
        self.wire = _Wire()
        self.log = _Listener()
        self._routes: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._last = 0

    async def __aenter__(self) -> Front:
        logging.getLogger().addHandler(self.log)
        gc.set_threshold(50_000, 20, 50)  # as the daemon does
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: self.log.heard.append(repr(context))
        )
        models = self._folder / "models"
        models.mkdir()
        (models / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
        self._config.touch()
        settings = Settings(
            self._folder,
            self._config,
            model="simulated",
            backend="simulated",
            kv_tokens=8192,
            ram_bytes=2**22,
            simulated_step_us=0,
        )
        self._pool = HelperPool()
        await self._pool.start()
        self._source = _Source(settings, Registry(models), self._pool)
        self.service = FrontService(
            self._source,
            asyncio.get_running_loop(),
            LIMITS,
            version="0",
            default=await self._source.default(),
            apps=Apps(ConfigFile(), self._config),
            settings=settings,
            on_shutdown=lambda drain: None,
        )
        self.transport = _Transport(self._folder, self.service, self.wire)
        self.service.transport = self.transport
        for number in range(self._count):
            self._routes.append(b"")
            self._sockets.append(socket.socket())
            self.connect(number)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop(0)
        await self.transport.end()
        await self._pool.close()
        for sock in self._sockets:
            sock.close()
        logging.getLogger().removeHandler(self.log)

    def connect(self, number: int) -> None:
        """A new connection in place of that one, which ends without a word."""
        old = self._sockets[number]
        if old.fileno() in self.wire.fds:
            self.wire.fds.discard(old.fileno())
            self.transport.gone(old.fileno())
        old.close()
        self.wire.stalled.discard(self._routes[number])
        self._sockets[number], other = socket.socketpair()
        other.close()
        self.wire.fds.add(self._sockets[number].fileno())
        self._last += 1
        self._routes[number] = b"\0" + self._last.to_bytes(4, "big")

    def hand_over(self, number: int, control: bool, frames: tuple[bytes, ...]) -> None:
        """A message came over a connection."""
        fd = self._sockets[number].fileno()
        made = [_Frame(frame, fd) for frame in frames]
        self.transport.hand_over(self._routes[number], control, made)

    def token(self, number: int) -> bytes:
        """What the connection was told at its hello."""
        return self.transport.token(self._routes[number])

    def stall(self, number: int) -> None:
        """The client of a connection stops reading."""
        self.wire.stalled.add(self._routes[number])

    def read_again(self) -> None:
        """All clients read."""
        self.wire.stalled.clear()

    def turn(self) -> None:
        """The engine runs a step, if there is one."""
        if self._source.engine is not None:
            self._source.engine.turn()

    @property
    def busy(self) -> int:
        """Requests that wait for a helper or a thread."""
        return len(self.service._background.tasks)

    async def over(self) -> None:
        """All connections end, and with them all that was asked.

        Raises:
            AssertionError: Something is left of it.
        """
        for number in range(self._count):
            self.connect(number)
        service, models = self.service, self.service.models
        while self.busy or models.state.value == "loading" or self._works():
            self.turn()
            await asyncio.sleep(0)
        assert not service._calls.peers
        assert not service._calls.live()
        assert service._streams.running == 0
        if models.current is not None:
            assert models.current.leases == 0
            assert self._source.engine is not None
            assert self._source.engine.core is not None
            self._source.engine.core.validate()

    def _works(self) -> bool:
        engine = self._source.engine
        return engine is not None and engine.core is not None and engine.core.has_work

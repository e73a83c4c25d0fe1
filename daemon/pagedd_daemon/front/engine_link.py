"""The front's end of the link to an engine: a socketpair with framed messages, and the process.

Reading goes through ``loop.add_reader`` and one reused buffer: a `StepReport` costs one ``recv``
and one decoding. A StreamReader would add a buffer copy, a future and a task switch per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from pagedd_daemon.link import FrameReader, LinkError, pack, unpack
from pagedd_daemon.messages import Shutdown, ToEngine, ToFront

log = logging.getLogger("pagedd.engine")

Message: TypeAlias = ToEngine | ToFront

_REAP_S = 1.0
"""Seconds between the end of the link and SIGKILL."""

_READ_BYTES = 256 * 1024
"""Bytes read at once; a step's report of 256 streams is about 10 KiB."""


class EngineListener(Protocol):
    """Who hears what an engine says. Calls come from the event loop."""

    def engine_said(self, engine: Engine, message: Message) -> None:
        """A message arrived."""
        ...

    def engine_gone(self, engine: Engine, status: int) -> None:
        """The engine ended although nobody stopped it; ``status`` as of `subprocess.Popen`."""
        ...


class Engine(Protocol):
    """An engine as the front sees it."""

    @property
    def pid(self) -> int:
        """Of the process."""
        ...

    def send(self, message: ToEngine) -> None:
        """Queue a message; dropped without a word when the engine is gone."""
        ...

    def kill(self) -> None:
        """End it as one that is stuck: what follows is what follows its death."""
        ...

    async def stop(self, grace_s: float) -> int:
        """End it: `Shutdown`, and SIGKILL after ``grace_s`` seconds. Returns its exit status."""
        ...


class Channel:
    """Framed messages over a connected stream socket, without ever blocking."""

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[Message], None],
        on_eof: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._on_message = on_message
        self._on_eof = on_eof
        self._frames = FrameReader()
        self._view = memoryview(bytearray(_READ_BYTES))
        self._unsent = bytearray()
        self._open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message) -> None:
        """Write a message now, or keep what the socket does not take until it does."""
        if not self._open:
            return
        data = pack(message)
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the peer is gone: reading meets the end of file and says so
        if sent < len(data):
            self._unsent += memoryview(data)[sent:]
            self._loop.add_writer(self._socket, self._writable)

    def close(self) -> None:
        """Close this end. ``on_eof`` is not called any more. Idempotent."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()

    def _writable(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
            self._loop.remove_writer(self._socket)
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._view)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._ended()
            return
        try:
            for body in self._frames.feed(self._view[:count]):
                self._on_message(unpack(body))
                if not self._open:
                    return
        except LinkError:
            log.exception("the engine sent something that is no message")
            self._ended()

    def _ended(self) -> None:
        if self._open:
            self.close()
            self._on_eof()


class EngineProcess:
    """A spawned engine.

    A fresh interpreter is executed, never a fork that goes on running: the front's sockets and
    locks must not live twice, and CUDA does not survive a fork. The child watches its end of the
    socketpair and exits at end of file, so it cannot outlive the front. It has a session of its
    own, so that Ctrl-C reaches only the front, which drains first.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, sock: socket.socket, listener: EngineListener
    ) -> None:
        self._process = process
        self._listener = listener
        self._stopping = False
        self._reaper: asyncio.Task[None] | None = None
        self._channel = Channel(sock, self._said, self._eof)

    @classmethod
    async def spawn(
        cls,
        listener: EngineListener,
        command: Sequence[str] = ("-m", "pagedd_daemon.engine"),
        inherited: Sequence[int] = (),
    ) -> EngineProcess:
        """Start ``python COMMAND --fd N``.

        Args:
            listener: Who hears what it says.
            command: For the interpreter.
            inherited: Further descriptors that it gets, under the same numbers.

        Raises:
            OSError: The process could not be started.
        """
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                "--fd",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *inherited),
                start_new_session=True,
                cwd="/",  # or modules in the directory the daemon was started in could be imported
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours, listener)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """See `Engine.send`."""
        self._channel.send(message)

    def kill(self) -> None:
        """See `Engine.kill`."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, grace_s: float) -> int:
        """See `Engine.stop`."""
        self._stopping = True
        self._channel.send(Shutdown())
        try:
            return await self._wait(grace_s)
        finally:
            self._channel.close()

    def _said(self, message: Message) -> None:
        self._listener.engine_said(self, message)

    def _eof(self) -> None:
        if not self._stopping:
            self._reaper = asyncio.ensure_future(self._reap())

    async def _reap(self) -> None:
        # Its status comes milliseconds after the end of file. An engine that goes on without its
        # link is of no use to anybody and must not keep its memory.
        self._listener.engine_gone(self, await self._wait(_REAP_S))

    async def _wait(self, grace_s: float) -> int:
        """The exit status, after SIGKILL where the process takes more than ``grace_s`` seconds."""
        try:
            return await asyncio.wait_for(self._process.wait(), grace_s)
        except asyncio.TimeoutError:
            log.warning("engine %d did not end within %g s: killed", self.pid, grace_s)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            return await self._process.wait()

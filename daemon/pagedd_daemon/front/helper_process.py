"""One helper process, and the socket to it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pagedd_daemon.helper.protocol import HelperLimits
from pagedd_daemon.link import FrameReader, LinkError, values

_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT})
"""Signals a process does not get for what it does."""


class HelperError(Exception):
    """A helper's answer is an error.

    Attributes:
        code: ``E_HELPER``, ``E_GRAMMAR``, ``E_TEMPLATE``, ``E_MODEL`` or ``E_NO_TOKENIZER``.
        message: For people.
        details: The figures, as they go on the wire.
    """

    def __init__(self, code: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details or {}


class HelperDiedError(Exception):
    """The process ended before it answered."""

    def __init__(self, returncode: int | None, *, begun: bool = True) -> None:
        super().__init__(_death(returncode))
        self.culprit = begun and returncode is not None and -returncode not in _OUTSIDE
        """The request is to blame: it would end the next process, too."""


class HelperProcess(asyncio.Protocol):
    """One helper process and the socket to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], lost: Callable[[HelperProcess], None]
    ) -> None:
        self.process = process
        self.models: dict[str, bytes] = {}
        """Digests of the models it has open, by source, oldest first."""
        self.alive = True
        self.retire = False
        self._lost = lost
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[list[Any]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ready."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Part of the one answer that is awaited."""
        try:
            for body in self._reader.feed(data):
                answer = values(body)
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(answer)
        except LinkError:
            self.kill()

    def connection_lost(self, _error: Exception | None) -> None:
        """The process has ended, or was killed."""
        self.alive = False
        if self._answer is not None and not self._answer.done():
            self._answer.cancel()
        self._lost(self)

    def kill(self) -> None:
        """End it now; idempotent."""
        self.alive = False
        if self.process.poll() is None:
            self.process.kill()
        if self._transport is not None:
            self._transport.abort()

    async def reap(self) -> int | None:
        """The exit status, for which it waits a second at most."""
        for _ in range(200):
            await asyncio.sleep(0.005)  # in which an aborted transport gives its socket back, too
            status = self.process.poll()
            if status is not None:
                return status
        return None

    async def call(self, body: bytes, seconds: float) -> Any:
        """One request.

        Raises:
            HelperError: The helper's own answer, or none came in time (it is dead then).
            HelperDiedError: The process ended.
        """
        if not self.alive or self._transport is None:
            raise HelperDiedError(await self.reap(), begun=False)
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(body)
        try:
            done, _ = await asyncio.wait((self._answer,), timeout=seconds)
            if not done:
                self.kill()
                raise HelperError(
                    "E_HELPER",
                    f"tokenising or rendering took more than {seconds:.1f} s",
                    {"seconds": seconds},
                )
            if self._answer.cancelled():
                raise HelperDiedError(await self.reap())
            kind, retire, *rest = self._answer.result()
        finally:
            self._answer = None
        self.retire = self.retire or retire
        if kind == "ok":
            return rest[0]
        raise HelperError(*rest)


async def start_helper(
    limits: HelperLimits, lost: Callable[[HelperProcess], None]
) -> HelperProcess:
    """Start a process; it answers once it has started.

    Args:
        limits: For the process.
        lost: Called when its socket closes.

    Raises:
        OSError: No process or socket could be made.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        arguments = ["--fd", str(theirs.fileno()), "--limits", json.dumps(asdict(limits))]
        try:
            # Vfork and exec: about two milliseconds, which is less than a thread for it would cost.
            process = subprocess.Popen(  # noqa: S603, ASYNC220
                [sys.executable, "-m", "pagedd_daemon.helper", *arguments],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",  # or modules in the directory the daemon was started in could be imported
            )
        except OSError:
            ours.close()
            raise
    helper = HelperProcess(process, lost)
    await asyncio.get_running_loop().create_unix_connection(lambda: helper, sock=ours)
    return helper


def _death(returncode: int | None) -> str:
    if returncode is None:
        return "the helper process closed its socket"
    if returncode >= 0:
        return f"the helper process exited with {returncode}"
    return f"the helper process was ended by {signal.Signals(-returncode).name}"

"""What keeps users and processes apart, tried out on this machine: for ``pagedd doctor``.

The daemon refuses to run where the first of these fails; here all are tried without a daemon, in a
folder of their own.
"""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pagedd_daemon.front.auth import AuthenticationBroken
from pagedd_daemon.front.helper_pool import HelperError, HelperPool
from pagedd_daemon.front.limits import DEFAULT_LIMITS
from pagedd_daemon.front.listener import AlreadyRunning, SocketPathError
from pagedd_daemon.front.ports import Connection, Event
from pagedd_daemon.front.requests import ControlRequest, DataRequest
from pagedd_daemon.front.transport import ZmqTransport
from pagedd_daemon.privacy import DEBUGGABLE

_PATIENCE_S = 20.0
_DUMPABLE = (
    "import ctypes, resource; from pagedd_daemon.privacy import keep_private; keep_private(); "
    "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))"
)
"""Prints whether a process of ours may be dumped, and its limits of core files."""


class _Nobody:
    """A service that is never asked: who gets as far as this has been let in."""

    def opened(self, connection: Connection) -> dict[str, Any]:
        raise AssertionError("nobody says hello here")

    def request(self, connection: Connection, request: DataRequest) -> None:
        raise AssertionError("nobody asks here")

    def control(
        self,
        uid: int,
        request: ControlRequest,
        connection: Connection | None,
        reply: Callable[[Event], None],
    ) -> None:
        raise AssertionError("nobody asks here")

    def closed(self, connection: Connection) -> None:
        raise AssertionError("nobody was here")

    def lagging(self, connection: Connection, lagging: bool) -> None:
        raise AssertionError("nobody was here")


def troubles(config: Path) -> Iterator[tuple[str, str]]:
    """What does not hold here, with what to do. Nothing where all holds.

    Args:
        config: The configuration file, which need not exist.
    """
    yield from _refusal()
    yield from _dumps()
    yield from _helpers()
    yield from _writable(config)


def _refusal() -> Iterator[tuple[str, str]]:
    """The daemon's own self-test: on both sockets, a peer that must be refused is."""

    async def start() -> None:
        with tempfile.TemporaryDirectory(prefix="pagedd-") as folder:
            transport = ZmqTransport(Path(folder), DEFAULT_LIMITS, _Nobody())
            await transport.start()
            await transport.stop(0.0)

    try:
        asyncio.run(asyncio.wait_for(start(), _PATIENCE_S))
    except AuthenticationBroken as error:
        yield str(error), "Do not run it on this machine; its libzmq does not ask who connects."
    except (AlreadyRunning, SocketPathError, asyncio.TimeoutError) as error:
        yield f"no socket could be tried: {error}", "Set TMPDIR to a folder that is yours."


def _dumps() -> Iterator[tuple[str, str]]:
    done = subprocess.run(  # noqa: S603 - our own arguments
        [sys.executable, "-c", _DUMPABLE],
        env={name: value for name, value in os.environ.items() if name != DEBUGGABLE},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    if done.stdout.split() != ["0", "0", "0"]:
        said = done.stdout.strip() or done.stderr.strip()[-200:]
        advice = "Prompts may end up in core files; a sandbox here forbids to turn them off."
        yield f"processes can be dumped ({said})", advice


def _helpers() -> Iterator[tuple[str, str]]:
    """What reads others' files is confined as far as the kernel can say."""

    async def look() -> list[str]:
        pool = HelperPool(1)
        try:
            await pool.start()
            await pool.open("simulated")
            return [_status(pid) for pid in pool.pids]
        finally:
            await pool.close()

    try:
        found = asyncio.run(asyncio.wait_for(look(), _PATIENCE_S))
    except (HelperError, OSError, asyncio.TimeoutError) as error:
        yield f"no helper could be started: {error}", "See the message."
        return
    if not all("NoNewPrivs:\t1" in text for text in found):
        advice = "A sandbox here forbids prctl(PR_SET_NO_NEW_PRIVS)."
        yield "helpers could gain rights by what they execute", advice


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text(encoding="ascii")


def _writable(config: Path) -> Iterator[tuple[str, str]]:
    """Who can write the settings decides what apps may do."""
    for path in (config, config.parent):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_uid not in (0, os.geteuid()):
            yield (
                f"{path} belongs to user {found.st_uid}",
                f"Make it yours: chown {os.getuid()} {path}",
            )
        elif stat.S_IMODE(found.st_mode) & 0o022:
            yield f"{path} can be written by others", f"Make it yours alone: chmod go-w {path}"

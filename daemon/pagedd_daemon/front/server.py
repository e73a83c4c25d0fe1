"""The daemon's process: start up, serve until told to stop, drain, shut down.

Exit statuses follow sysexits(3): 0 after SIGTERM or ``shutdown``, 66 for a model that is missing or
broken at the start, 75 where another daemon serves already, 78 for settings that cannot be used,
70 for a defect.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from enum import IntEnum

from pagedd._version import __version__
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.auth import AuthenticationBroken
from pagedd_daemon.front.config import ConfigError, Settings, cuda_device_present, gpu_usable
from pagedd_daemon.front.config_file import ConfigFile, load
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.helper_pool import HelperError, HelperPool
from pagedd_daemon.front.limits import DEFAULT_LIMITS
from pagedd_daemon.front.listener import AlreadyRunning, SocketPathError
from pagedd_daemon.front.service import FrontService
from pagedd_daemon.front.source import ModelSource
from pagedd_daemon.front.transport import ZmqTransport
from pagedd_daemon.models.registry import Registry

log = logging.getLogger("pagedd")

FLUSH_S = 2.0
"""Seconds clients get to take what waits for them after the last request is over."""

FORCED_FLUSH_S = 0.2
"""The same after a second signal."""


class Exit(IntEnum):
    """How the process ends."""

    OK = 0
    NO_INPUT = 66
    DEFECT = 70
    TEMPORARY = 75
    CONFIG = 78


class Server:
    """One daemon."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._pool = HelperPool()

    async def run(self) -> int:
        """Serve until asked to stop. Returns the exit status."""
        with contextlib.ExitStack() as signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._asked_to_stop)
                signals.callback(self._loop.remove_signal_handler, number)
            status = await self._startup()
            if status is Exit.OK:
                await self._stop.wait()
                await self._shutdown()
        return status

    def _asked_to_stop(self, drain: bool = True) -> None:
        """The first time: drain. The second time, or without ``drain``: now."""
        if self._stop.is_set() or not drain:
            self._force.set()
        self._stop.set()

    async def _startup(self) -> Exit:
        settings = self._settings
        source = ModelSource(settings, Registry(), self._pool)
        try:
            config = load(settings.config_file) if settings.config_file else ConfigFile()
        except ConfigError as error:
            return _refuse(Exit.CONFIG, str(error))
        apps = Apps(config, settings.config_file)
        try:
            default = await source.default()
        except WireError as error:
            return _refuse(Exit.NO_INPUT, error.message)
        self._service = FrontService(
            source,
            self._loop,
            DEFAULT_LIMITS,
            version=__version__,
            default=default,
            keep_alive_s=settings.keep_alive_s,
            apps=apps,
            on_shutdown=self._asked_to_stop,
        )
        if settings.backend == "auto" and cuda_device_present() and not gpu_usable():
            self._service.board.notice = (
                "An NVIDIA GPU is present, but not used: pagedd[cuda] is not installed. "
                "Computing on the CPU."
            )
        self._transport = ZmqTransport(settings.socket_dir, DEFAULT_LIMITS, self._service)
        self._service.transport = self._transport
        try:
            await self._transport.start()
        except AlreadyRunning as error:
            return _refuse(Exit.TEMPORARY, str(error))
        except (SocketPathError, AuthenticationBroken) as error:
            return _refuse(Exit.CONFIG, str(error))
        if settings.model is not None:
            self._service.preload()
        try:
            await self._pool.start()
        except HelperError as error:
            await self._transport.stop(0)
            return _refuse(Exit.DEFECT, error.message)
        gc.collect()
        gc.freeze()  # a full collection of what start-up made takes 4 ms; none after this
        gc.set_threshold(50_000, 20, 50)  # tokens make no cycles: no search every 700 of them
        log.info("pagedd %s serves in %s", __version__, settings.socket_dir)
        return Exit.OK

    async def _shutdown(self) -> None:
        """Let live streams end, then end everything."""
        log.info("draining for at most %g s", self._settings.drain_s)
        self._service.drain()
        if not self._force.is_set():
            waits = [asyncio.ensure_future(w) for w in (self._service.idle(), self._force.wait())]
            await asyncio.wait(
                waits, timeout=self._settings.drain_s, return_when=asyncio.FIRST_COMPLETED
            )
            for wait in waits:
                wait.cancel()
        forced = self._force.is_set()
        await self._service.stop(grace_s=0.5 if forced else 5.0)
        await self._transport.stop(FORCED_FLUSH_S if forced else FLUSH_S)
        await self._pool.close()
        log.info("stopped")


def _refuse(status: Exit, reason: str) -> Exit:
    print(f"pagedd: {reason}", file=sys.stderr)
    return status


def main(settings: Settings) -> int:
    """Run the daemon in this process until it ends. Returns the exit status."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )

    async def run() -> int:
        return await Server(settings).run()

    try:
        return asyncio.run(run())
    except Exception:
        log.exception("the daemon ended because of a defect")
        return Exit.DEFECT

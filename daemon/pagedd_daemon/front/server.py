"""The daemon's process: start up, serve until told to stop, drain, shut down.

Exit statuses follow sysexits(3): 0 after SIGTERM or ``shutdown``, 66 for a model that is missing or
broken at the start, 75 where another daemon serves already, 78 for settings that cannot be used,
70 for a defect.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import grp
import logging
import signal
import socket
import sys
from collections.abc import Mapping
from enum import IntEnum

from pagedd._version import __version__
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.activation import inherited
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.auth import AuthenticationBroken
from pagedd_daemon.front.config import (
    ConfigError,
    Settings,
    cuda_device_present,
    disk_place,
    gpu_usable,
)
from pagedd_daemon.front.config_file import load
from pagedd_daemon.front.config_model import ConfigFile
from pagedd_daemon.front.eras import Eras
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.helper_pool import HelperError, HelperPool
from pagedd_daemon.front.limits import DEFAULT_LIMITS, for_several_users
from pagedd_daemon.front.listener import AlreadyRunning, SocketPathError
from pagedd_daemon.front.notify import Notifier
from pagedd_daemon.front.service import FrontService
from pagedd_daemon.front.source import ModelSource
from pagedd_daemon.front.transport import ZmqTransport
from pagedd_daemon.models.registry import Registry
from pagedd_daemon.privacy import keep_private
from pagedd_daemon.private_files import ERAS_NAME, KEY_NAME, secret

log = logging.getLogger("pagedd")

FLUSH_S = 2.0
"""Seconds clients get to take what waits for them after the last request is over."""

FORCED_FLUSH_S = 0.2
"""The same after a second signal."""


_EXTEND_S = 15.0
_LOAD_MOST_S = 1800.0
"""The service manager is asked every so many seconds to wait on, and for so long in all."""


class Exit(IntEnum):
    """How the process ends."""

    OK = 0
    NO_INPUT = 66
    DEFECT = 70
    TEMPORARY = 75
    CONFIG = 78


class Server:
    """One daemon."""

    def __init__(self, settings: Settings, inherited: Mapping[str, socket.socket]) -> None:
        """``inherited``: listening sockets of the service manager's."""
        self._settings = settings
        self._inherited = inherited
        self._manager = Notifier()
        self._extension: asyncio.TimerHandle | None = None
        """Asks the service manager for more time while a model loads."""
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._status = Exit.OK
        """With which it ends once it has served."""
        self._pool = HelperPool()

    async def run(self) -> int:
        """Serve until asked to stop. Returns the exit status."""
        with contextlib.ExitStack() as signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._asked_to_stop)
                signals.callback(self._loop.remove_signal_handler, number)
            status = await self._startup()
            if status is Exit.OK:
                # At a terminal it means that somebody has closed that.
                hung_up = self._asked_to_stop if sys.stderr.isatty() else self._asked_to_reload
                self._loop.add_signal_handler(signal.SIGHUP, hung_up)
                signals.callback(self._loop.remove_signal_handler, signal.SIGHUP)
                self._feed_watchdog()
                await self._stop.wait()
                await self._shutdown()
                status = self._status
        return status

    def _asked_to_stop(self, drain: bool = True) -> None:
        """The first time: drain. The second time, or without ``drain``: now."""
        if self._stop.is_set() or not drain:
            self._force.set()
        self._stop.set()

    def _defeated(self) -> None:
        """Engines die and die: leave it to whoever starts daemons, with a status that says so."""
        log.error("engines die too often: the daemon ends")
        self._status = Exit.DEFECT
        self._asked_to_stop(drain=False)

    def _feed_watchdog(self) -> None:
        """Tell the service manager, well within its patience, that work makes progress."""
        if self._manager.watchdog_s is not None:
            if self._service.watchdog.healthy:
                self._manager.watchdog()
            self._loop.call_later(self._manager.watchdog_s / 3, self._feed_watchdog)

    def _preloaded(self, error: WireError | None) -> None:
        """A request would be served now, or told what is wrong."""
        if self._extension is not None:
            self._extension.cancel()
        self._manager.ready("serving" if error is None else f"serving, but: {error.message}")

    def _ask_for_time(self, left_s: float) -> None:
        """While a model loads, the service manager waits; not for ever, for it may hang."""
        if left_s > 0 and self._manager.heard:
            self._manager.more_time(2 * _EXTEND_S)
            self._extension = self._loop.call_later(
                _EXTEND_S, self._ask_for_time, left_s - _EXTEND_S
            )

    def _asked_to_reload(self) -> None:
        self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        """Read the configuration file again; one that is wrong changes nothing."""
        self._manager.reloading()
        try:
            said = (await self._service.administration.reload()).sentence()
        except ConfigError as error:
            log.error("the settings stay as they were:\n%s", error)
            said = "the configuration file is wrong; the settings stay as they were"
        self._manager.ready(said)

    def _settings_changed(self, settings: Settings) -> None:
        self._settings = self._source.settings = settings
        logging.getLogger().setLevel(settings.log_level.upper())

    async def _startup(self) -> Exit:
        settings = self._settings
        try:
            config = load(settings.config_file) if settings.config_file else ConfigFile()
        except ConfigError as error:
            return _refuse(Exit.CONFIG, str(error))
        try:
            store = disk_place(settings.disk_folder, settings.disk_persist)
            key = secret(store / KEY_NAME) if settings.disk_persist else None
            eras = Eras(store / ERAS_NAME if settings.disk_persist else None)
        except OSError as error:
            return _refuse(Exit.CONFIG, f"the store of prefixes cannot be used: {error}")
        apps = Apps(config, settings.config_file, key, eras)
        source = self._source = ModelSource(settings, Registry(), self._pool, eras)
        try:
            access = _access(settings)
        except ConfigError as error:
            return _refuse(Exit.CONFIG, str(error))
        limits = for_several_users() if access.shared else DEFAULT_LIMITS
        try:
            default = await source.default()
        except WireError as error:
            return _refuse(Exit.NO_INPUT, error.message)
        self._service = FrontService(
            source,
            self._loop,
            limits,
            version=__version__,
            default=default,
            keep_alive_s=settings.keep_alive_s,
            apps=apps,
            settings=settings,
            access=access,
            on_settings=self._settings_changed,
            on_shutdown=self._asked_to_stop,
            on_defeat=self._defeated,
            engine_deaths=settings.engine_deaths,
        )
        if settings.backend == "auto" and cuda_device_present() and not gpu_usable():
            self._service.board.notice = (
                "An NVIDIA GPU is present, but not used: pagedd[cuda] is not installed. "
                "Computing on the CPU."
            )
        self._transport = ZmqTransport(
            settings.socket_dir, limits, self._service, self._inherited, access
        )
        self._service.transport = self._transport
        try:
            await self._transport.start()
        except AlreadyRunning as error:
            return _refuse(Exit.TEMPORARY, str(error))
        except (SocketPathError, AuthenticationBroken) as error:
            return _refuse(Exit.CONFIG, str(error))
        if settings.model is not None:
            self._manager.status(f"loading {settings.model}")
            self._service.preload(self._preloaded)
            self._ask_for_time(_LOAD_MOST_S)
        try:
            await self._pool.start()
        except HelperError as error:
            await self._transport.stop(0)
            return _refuse(Exit.DEFECT, error.message)
        if settings.model is None:
            self._preloaded(None)
        gc.collect()
        gc.freeze()  # a full collection of what start-up made takes 4 ms; none after this
        gc.set_threshold(50_000, 20, 50)  # tokens make no cycles: no search every 700 of them
        whom = ""
        if access.shared:
            whom = f", for group {settings.group}" if settings.group else ", for all users"
        log.info("pagedd %s serves in %s%s", __version__, settings.socket_dir, whom)
        return Exit.OK

    async def _shutdown(self) -> None:
        """Let live streams end, then end everything."""
        self._manager.stopping("draining")
        self._manager.more_time(self._settings.drain_s + 30)
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


def _inherited(settings: Settings) -> Mapping[str, socket.socket]:
    """Sockets the service manager listens at for us.

    Raises:
        ConfigError: They are others than the daemon's.
    """
    found = inherited()
    if found is None:
        return {}
    if found.directory.resolve() != settings.socket_dir.resolve():
        raise ConfigError(
            f"the service manager listens in {found.directory}, the daemon is to serve in "
            f"{settings.socket_dir}: give both the same directory"
        )
    return found.sockets


def _access(settings: Settings) -> Access:
    """Whom to serve.

    Raises:
        ConfigError: There is no such group.
    """
    group: int | None = None
    if settings.group is not None:
        try:
            group = grp.getgrnam(settings.group).gr_gid
        except KeyError:
            raise ConfigError(f"there is no group {settings.group!r} on this machine") from None
    return Access(settings.shared, group)


_ADVICE = {
    Exit.NO_INPUT: "See 'pagedd models' for what there is, or get the default with 'pagedd pull'.",
    Exit.TEMPORARY: "Use that one (see 'pagedd status'), or end it with 'pagedd stop'.",
    Exit.CONFIG: "Correct that, then start it again; 'pagedd doctor' looks at all of it.",
}


def _refuse(status: Exit, reason: str) -> Exit:
    """Say what is wrong and what to do."""
    end = "" if reason.endswith(".") else "."
    print(f"pagedd: {reason}{end} {_ADVICE.get(status, '')}".rstrip(), file=sys.stderr)
    return status


def main(settings: Settings) -> int:
    """Run the daemon in this process until it ends. Returns the exit status."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    keep_private()

    try:
        sockets = _inherited(settings)
    except ConfigError as error:
        return _refuse(Exit.CONFIG, str(error))

    async def run() -> int:
        return await Server(settings, sockets).run()

    try:
        return asyncio.run(run())
    except Exception:
        log.exception("the daemon ended because of a defect")
        return Exit.DEFECT

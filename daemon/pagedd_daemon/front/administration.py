"""What the person at the machine asks of a running daemon beside its status: settings of apps,
reading the file again, and figures that must be read from devices first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from pagedd_daemon.front import requests as r
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.accounts import Accounts
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.config import ConfigError, Settings
from pagedd_daemon.front.energy import Energy
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.metrics import text
from pagedd_daemon.front.model_ports import Clock
from pagedd_daemon.front.models import Models
from pagedd_daemon.front.ports import Event
from pagedd_daemon.front.reload import Changes, reread
from pagedd_daemon.front.status import Board
from pagedd_daemon.owners import split

log = logging.getLogger("pagedd.settings")

AdminRequest = (
    r.AppsList
    | r.AppsShow
    | r.AppsSet
    | r.CacheShow
    | r.CacheClear
    | r.Reload
    | r.Stats
    | r.Metrics
)
Answer = Callable[[dict[str, Any]], None]


class Administration:
    """Answers the control verbs ``apps.*``, ``cache.*``, ``reload``, ``stats`` and ``metrics``."""

    def __init__(
        self,
        apps: Apps,
        accounts: Accounts,
        models: Models,
        board: Board,
        clock: Clock,
        settings: Settings | None = None,
        changed: Callable[[Settings], None] = lambda settings: None,
        access: Access | None = None,
    ) -> None:
        """``changed`` hears of settings that a reload has replaced."""
        self._apps = apps
        self._accounts = accounts
        self._models = models
        self._board = board
        self._clock = clock
        self._settings = settings
        self._settings_changed = changed
        self._access = access or Access()
        self._energy = Energy()
        self._changing = asyncio.Lock()
        """One at a time: each begins with the file as the last left it."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """What is being changed is given up."""
        for task in self._tasks:
            task.cancel()

    def answer(
        self, uid: int, request: AdminRequest, reply: Callable[[Event], None], result: Answer
    ) -> None:
        """Answer a request, now or later.

        Raises:
            WireError: ``E_FORBIDDEN``: another user than the daemon's wants to change something, or
                to see what is of all users. ``E_CONFIG``: there is no store that is kept.
        """
        only = self._access.view(uid)
        if isinstance(request, r.AppsList):
            names = {*self._apps.config.apps, *(row["app"] for row in self._board.apps(only))}
            result({"apps": [self._app(name, only) for name in sorted(names)]})
            return
        if isinstance(request, r.AppsShow):
            result(self._app(request.app, only))
            return
        if isinstance(request, (r.Stats, r.Metrics)):
            blocks = isinstance(request, r.Stats) and request.blocks
            if blocks or isinstance(request, r.Metrics):
                self._access.require(uid, "see what all users do")

            def answer() -> None:
                stats = isinstance(request, r.Stats)
                work = self._stats(blocks, only) if stats else self._metrics()
                self._later(work, request.id, reply, result)

            self._board.fresh(answer, blocks=blocks)
            return
        if isinstance(request, (r.CacheShow, r.CacheClear)):
            if not self._apps.eras.kept:
                raise WireError("E_CONFIG", "this daemon keeps nothing from one run to the next")
            if isinstance(request, r.CacheShow):
                self._board.fresh(lambda: result({"users": self._kept(only)}))
            else:
                self._later(self._clear(uid), request.id, reply, result)
            return
        if not self._access.administers(uid):
            raise WireError("E_FORBIDDEN", "only the daemon's own user changes settings")
        change = self._set_app(request) if isinstance(request, r.AppsSet) else self._reload_map()
        self._later(change, request.id, reply, result)

    async def reload(self) -> Changes:
        """Read the file again; what can hold at once does.

        Raises:
            ConfigError: The file is wrong, and everything is as before.
        """
        if self._settings is None:
            raise ConfigError("the daemon runs without a configuration file")
        async with self._changing:
            changes = await asyncio.to_thread(reread, self._settings, self._apps.config)
            self._settings = changes.settings
            self._apps.config = changes.config
        self._tell_engine()
        self._models.keep_alive(changes.settings.keep_alive_s)
        self._settings_changed(changes.settings)
        log.info("settings read again: %s", changes.sentence())
        return changes

    def _app(self, name: str, only: int | None = None) -> dict[str, Any]:
        """An app's settings, and who is connected under its name; ``only`` of one user."""
        connected = [row for row in self._board.apps(only) if row["app"] == name]
        return {**self._apps.described(name), "connected": connected}

    def _kept(self, only: int | None) -> list[dict[str, int]] | None:
        """Tokens on disk by user, ``only`` of one; None while no model is loaded. What has been
        cleared is nobody's, though it may lie there still."""
        model = self._models.current
        if model is None:
            return None
        rows = []
        for owner, pages in self._board.figures.get("owned", ()):
            uid, era = split(owner)
            if only in (None, uid) and era == self._apps.eras.of(uid):
                rows.append({"uid": uid, "tokens": pages * model.ready.block_tokens})
        return rows

    async def _clear(self, uid: int) -> dict[str, Any]:
        async with self._changing:
            await asyncio.to_thread(self._apps.eras.next, uid)
        self._tell_engine()
        return {}

    async def _stats(self, blocks: bool, only: int | None) -> dict[str, Any]:
        stats = self._board.stats(only)
        if blocks:
            stats["blocks"] = self._board.blocks
        # A meter of the whole machine tells of others' work, too.
        told = only is None and not self._energy.silent
        joules = await asyncio.to_thread(self._energy.read) if told else {}
        return {**stats, "energy_joules": dict(joules)}

    async def _metrics(self) -> dict[str, Any]:
        figures = self._board.metrics()
        return {"text": await asyncio.to_thread(lambda: text(figures, self._energy.read()))}

    async def _reload_map(self) -> dict[str, Any]:
        return (await self.reload()).as_map()

    async def _set_app(self, request: r.AppsSet) -> dict[str, Any]:
        async with self._changing:
            self._apps.config = await asyncio.to_thread(
                self._apps.change, request.app, request.settings
            )
        self._tell_engine()
        return self._app(request.app)

    def _tell_engine(self) -> None:
        """What apps may have holds for their live requests too."""
        model = self._models.current
        if model is not None:
            for account in self._accounts.listed(self._clock.time()):
                if account.live:
                    model.engine.send(self._apps.message(account))

    def _later(
        self,
        work: Coroutine[Any, Any, dict[str, Any]],
        id: str,
        reply: Callable[[Event], None],
        result: Answer,
    ) -> None:
        def done(task: asyncio.Task[dict[str, Any]]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                return
            error = task.exception()
            if error is None:
                result(task.result())
                return
            if isinstance(error, (ConfigError, OSError)):
                said = WireError("E_CONFIG", str(error))
            else:
                log.error("a control request failed", exc_info=error)
                said = WireError("E_INTERNAL", "a defect of the daemon; its log has more")
            reply(said.as_event(id, 0))

        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(done)

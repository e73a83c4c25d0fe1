"""What the daemon says of itself: ``status``, ``stats`` and ``ping`` (docs/protocol.md, section 8).

The engine's figures come as snapshots. Nothing here runs unless somebody asks: no timers tick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pagedd_daemon.front.accounts import RATE_S, Accounts
from pagedd_daemon.front.apps import CLASSES, Apps
from pagedd_daemon.front.metrics import Figures, histograms
from pagedd_daemon.front.model_ports import Clock, Timer
from pagedd_daemon.front.models import Model, Models, State
from pagedd_daemon.front.streams import Streams
from pagedd_daemon.front.watchdog import Watchdog
from pagedd_daemon.messages import AskSnapshot, Snapshot

FRESH_S = 0.1
"""Seconds a status waits for fresh figures of a busy engine."""

_TIER = ("blocks_total", "used", "cached", "free")
_SPLIT = ("token_state", "reserved", "internal", "external")
_SEQUENCES = ("running", "swapped", "ids_total")
_REQUESTS = ("running", "waiting", "paused")


class Board:
    """Puts together what people are shown."""

    def __init__(
        self,
        models: Models,
        streams: Streams,
        accounts: Accounts,
        apps: Apps,
        clock: Clock,
        version: str,
        watchdog: Watchdog,
    ) -> None:
        self._models = models
        self._streams = streams
        self._clock = clock
        self._started = clock.time()
        self._version = version
        self._watchdog = watchdog
        self._accounts = accounts
        self._settings = apps
        self.figures: Mapping[str, Any] = {}
        """The engine's last snapshot; empty without an engine."""
        self._taken = 0.0
        """When it came."""
        self.stale = False
        """A step was made since that snapshot."""
        self.blocks: Mapping[str, Any] = {}
        """The block map, from when somebody last asked for it; empty without an engine."""
        self.draining = False
        self.notice: str | None = None
        """What every client is told in ``hello``."""
        self._asked: list[tuple[Callable[[], None], bool]] = []
        """Whom to tell, and whether the block map is what they wait for."""
        self._timer: Timer | None = None

    # ------------------------------------------------------------ snapshots

    def take(self, snapshot: Snapshot) -> None:
        """The engine's figures are here."""
        figures = dict(snapshot.figures)
        blocks = figures.pop("blocks", None)
        self.figures = figures
        self._taken = self._clock.time()
        self.stale = False
        if blocks is not None:
            self.blocks = blocks
        self._answer(everybody=blocks is not None)

    def engine_gone(self) -> None:
        """There are no figures any more."""
        self.figures = {}
        self.blocks = {}
        self.stale = False
        self._answer()

    def fresh(self, answer: Callable[[], None], *, blocks: bool = False) -> None:
        """Call ``answer`` when the figures are fresh, or as fresh as they get in `FRESH_S`.

        An engine that sent its figures when it became idle is not asked again, unless for the block
        map, which it sends to nobody who did not ask.
        """
        model = self._models.current
        if model is None or not (blocks or self._streams.running or self.stale):
            answer()
            return
        asked = any(wanted >= blocks for _, wanted in self._asked)
        self._asked.append((answer, blocks))
        if not asked:
            model.engine.send(AskSnapshot(blocks=blocks))
        if self._timer is None:
            self._timer = self._clock.call_later(FRESH_S, self._answer)

    def _answer(self, *, everybody: bool = True) -> None:
        """Tell those who wait; without a new block map, not those who wait for one."""
        asked = self._asked
        self._asked = [] if everybody else [one for one in asked if one[1]]
        if not self._asked and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for answer, blocks in asked:
            if everybody or not blocks:
                answer()

    # ------------------------------------------------------------ results

    @property
    def state(self) -> str:
        """See docs/protocol.md, section 8."""
        if self.draining:
            return "draining"
        if self._models.state is State.READY:
            return "ready"
        if self._models.state is State.LOADING:
            return "loading"
        return "degraded" if self._models.trouble else "asleep"

    def ping(self) -> dict[str, Any]:
        """The result of ``ping``."""
        return {
            "pid": os.getpid(),
            "uptime_s": self._uptime_s(),
            "state": self.state,
            "steps": self._streams.steps,
            "healthy": self._watchdog.healthy,
            "silent_s": round(self._watchdog.silent_s, 1),
            "engine_deaths": self._models.deaths.total,
        }

    def status(self, only: int | None = None) -> dict[str, Any]:
        """The result of ``status``; ``only`` with the apps of one user."""
        model = self._models.current
        return {
            "version": self._version,
            **self.ping(),
            "degraded": [text for text in self._degraded(model) if text],
            "backend": model.ready.backend if model else None,
            "device": model.ready.device if model else None,
            "models": [self._model(model)] if model else [],
            "apps": self.apps(only),
            "kv": self._kv(),
            "split": self._group("split", _SPLIT),
            "sequences": self._group("sequences", _SEQUENCES),
            "requests": self._requests(),
        }

    def stats(self, only: int | None = None) -> dict[str, Any]:
        """The result of ``stats``; ``only`` with what one user asked and got. What the engine
        counts is of all users, and says when another's requests do what."""
        figures = self.figures if only is None else {}

        def total(name: str) -> int:
            return self._accounts.total(name, only)

        return {
            "uptime_s": self._uptime_s(),
            "requests": {
                **self._requests(),
                "finished": total("finished"),
                "cancelled": total("cancelled"),
                "failed": total("failed"),
            },
            "tokens": {
                "prompt": total("prompt_tokens"),
                "cached": total("cached_tokens"),
                "generated": total("generated_tokens"),
            },
            "kv": self._kv(),
            "steps": self._streams.steps,
            "pager": dict(figures.get("pager", {})),
            "memory": dict(figures.get("memory", {})),
            "backend": dict(figures.get("backend", {})),
            "apps": self.apps(only),
        }

    def metrics(self) -> Figures:
        """What ``metrics`` is written from."""
        return Figures(
            version=self._version,
            status=self.status(),
            stats=self.stats(),
            outcomes=self._accounts.counters(),
            measures={
                klass: histograms(self._streams.measures[number])
                for klass, number in CLASSES.items()
            },
        )

    def _degraded(self, model: Model | None) -> tuple[str | None, ...]:
        healthy, silent_s = self._watchdog.healthy, self._watchdog.silent_s
        return (
            None if healthy else f"The engine has made no step in {silent_s:.0f} s.",
            self.notice,
            self._models.notice,
            model.ready.notice if model else None,
            self._models.trouble,
            *self.figures.get("troubles", ()),
        )

    def _uptime_s(self) -> float:
        return round(self._clock.time() - self._started, 3)

    def _model(self, model: Model) -> dict[str, Any]:
        expires = self._models.expires_s
        return {
            "name": model.entry.name,
            "size_bytes": model.entry.as_map()["size_bytes"],
            "context_tokens": model.ready.context_tokens,
            "block_tokens": model.ready.block_tokens,
            "expires_s": None if expires is None else round(expires, 1),
        }

    def apps(self, only: int | None = None) -> list[dict[str, Any]]:
        """One row for each app that is connected, or was a moment ago; ``only`` of one user."""
        now = self._clock.time()
        of_apps = self.figures.get("apps", {})
        rows = []
        for account in self._accounts.listed(now):
            if only not in (None, account.uid):
                continue
            row = account.row(now, of_apps.get(account.key, {}))
            row["class"] = self._settings.klass(account)
            row["weight"] = self._settings.settings(account).weight
            if now - self._taken > RATE_S:
                row["share_percent"] = 0.0
            rows.append(row)
        return rows

    def _kv(self) -> dict[str, dict[str, int]]:
        tiers = self.figures.get("kv", {})
        return {
            tier: {name: int(tiers.get(tier, {}).get(name, 0)) for name in _TIER}
            for tier in ("gpu", "ram", "disk")
        }

    def _group(self, group: str, names: tuple[str, ...]) -> dict[str, int]:
        figures = self.figures.get(group, {})
        return {name: int(figures.get(name, 0)) for name in names}

    def _requests(self) -> dict[str, int]:
        counts = self._group("requests", _REQUESTS)
        live = sum(account.live for account in self._accounts.listed(self._clock.time()))
        # Those the engine does not have yet (model loading, tokenising) wait too.
        counts["waiting"] += max(0, live - self._streams.running)
        return counts

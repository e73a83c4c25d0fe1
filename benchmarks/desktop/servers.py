"""The servers of the desktop mix: the daemon with the settings of its apps, and others by URL."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.desktop.player import Record
from benchmarks.desktop.trace import App
from benchmarks.service import Daemon, packaged_model
from benchmarks.worker import Worker

Server = tuple[str, str]
"""``--pagedd`` with a host, ``--gateway`` or ``--openai`` with a URL: options of the player."""
Records = dict[str, list[Record]]
"""By app."""

_BEGIN_S = 1.0
"""From the order to the trace's time 0: every player has read its order by then."""


class _Serve(Daemon):
    """``pagedd serve``, which reads a configuration file, too."""

    command = (sys.executable, "-m", "pagedd", "serve")


class DesktopDaemon:
    """A daemon that was told of its apps, as a person does once."""

    def __init__(
        self, pool_tokens: int, threads: int, apps: Mapping[str, Mapping[str, object]]
    ) -> None:
        """``apps`` are settings (docs/protocol.md, ``apps.set``) by name."""
        self._folder = tempfile.TemporaryDirectory(prefix="pagedd-bench-")
        config = Path(self._folder.name) / "config.toml"
        lines: list[str] = []
        for name, settings in apps.items():
            lines.append(f'[apps."{name}"]')
            lines += [f"{key} = {_toml(value)}" for key, value in settings.items()]
        config.write_text("\n".join(lines) + "\n")
        model = ("--model", str(packaged_model()), "--backend", "llama.cpp")
        size = ("--kv-tokens", str(pool_tokens), "--threads", str(threads), "--ram-gb", "4")
        self.daemon = _Serve(*model, *size, "--config", str(config))
        self.server: Server = ("--pagedd", self.daemon.host)

    def __enter__(self) -> DesktopDaemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.daemon.close()
        self._folder.cleanup()


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def play(server: Server, apps: Sequence[App], most_s: float) -> Records:
    """Let all ``apps`` play at the same time, at most for ``most_s`` seconds."""
    players = {app.name: _player(server, app) for app in apps}
    try:
        start = time.monotonic() + _BEGIN_S
        for app in apps:
            players[app.name].order(op="play", app=asdict(app), start=start, until=start + most_s)
        return {name: _records(player.answer()) for name, player in players.items()}
    finally:
        for player in players.values():
            player.close()


def _player(server: Server, app: App) -> Worker:
    return Worker("benchmarks.desktop.player", *server, "--app", app.name, "--class", app.klass)


def _records(answer: dict[str, Any]) -> list[Record]:
    made = [
        Record(**{**r, "arrivals": [tuple(one) for one in r["arrivals"]]})
        for r in answer["records"]
    ]
    return sorted(made, key=lambda record: record.sent)


def alone(app: App, asks: int, wait_s: float | None = None) -> App:
    """The first ``asks`` of an app, for when it has the machine to itself; with ``wait_s`` between
    them where the pauses mean nothing to it."""
    chosen = app.asks[:asks]
    if wait_s is not None:
        chosen = tuple(replace(ask, wait_s=wait_s) for ask in chosen)
    return replace(app, asks=chosen, begin_s=0.0)

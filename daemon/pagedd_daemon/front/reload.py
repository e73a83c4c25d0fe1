"""Reading ``config.toml`` again: what of it holds at once, and what waits for a load or a restart.

A file that is wrong changes nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pagedd_daemon.front.config import ConfigError, Settings
from pagedd_daemon.front.config_file import load
from pagedd_daemon.front.config_model import FIELDS, ConfigFile, Holds, settings


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between the settings that hold and the file."""

    config: ConfigFile
    settings: Settings
    """The new ones; what waits for a restart is as before in them."""
    changed: dict[Holds, list[str]]
    """Keys like ``serve.drain``, by when their change holds."""

    def as_map(self) -> dict[str, Any]:
        """The result of ``reload`` in docs/protocol.md."""
        names = {"at once": "applied", "next load": "next_load", "restart": "restart"}
        return {names[holds]: keys for holds, keys in self.changed.items()}

    def sentence(self) -> str:
        """For the log."""
        said = [f"{holds}: {', '.join(keys)}" for holds, keys in self.changed.items() if keys]
        return "; ".join(said) or "nothing has changed"


def reread(old: Settings, config: ConfigFile) -> Changes:
    """Read the file again and compare it with what holds. Not for the event loop.

    Raises:
        ConfigError: The file is wrong, or there is none.
    """
    if old.config_file is None:
        raise ConfigError("the daemon runs without a configuration file")
    new = load(old.config_file)
    values = new.as_settings()
    changed: dict[Holds, list[str]] = {"at once": [], "next load": [], "restart": []}
    replaced: dict[str, Any] = {}
    for setting in settings():
        if setting.table not in ("serve", "disk"):
            continue
        field = FIELDS.get(setting.key, setting.key)
        if field in old.pinned or values[field] == getattr(old, field):
            continue
        changed[setting.holds].append(f"{setting.table}.{setting.key}")
        if setting.holds != "restart":
            replaced[field] = values[field]
    changed["at once"] += _changed_apps(config, new)
    return Changes(new, dataclasses.replace(old, **replaced), changed)


def _changed_apps(old: ConfigFile, new: ConfigFile) -> list[str]:
    changed = ["unknown"] if old.unknown != new.unknown else []
    names = sorted({*old.apps, *new.apps})
    return changed + [f"apps.{n}" for n in names if old.apps.get(n) != new.apps.get(n)]

"""``config.toml``: what a person sets once, for the daemon and for each app.

The file is checked as a whole. Whatever is wrong with it is said at once, one line for each
mistake: ``file:line key: what was expected``.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pagedd_daemon.front.config import ConfigError
from pagedd_daemon.front.config_model import AppSettings, ConfigFile, known_keys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(path: Path) -> ConfigFile:
    """Read and check the file; one that does not exist says nothing.

    Raises:
        ConfigError: Every mistake in it, a line each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ConfigFile()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> ConfigFile:
    """Check the text of a file called ``name``.

    Raises:
        ConfigError: As `load`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from error
    lines = key_lines(text)
    try:
        config = ConfigFile.model_validate(document)
    except ValidationError as errors:
        found = [(tuple(map(str, e["loc"])), e) for e in errors.errors(include_url=False)]
        said = [
            (_line(lines, _keys(path)), _said(name, lines, _keys(path), _expected(e)))
            for path, e in found
        ]
        raise ConfigError("\n".join(text for _, text in sorted(said))) from errors
    problems = _contradictions(config)
    if problems:
        raise ConfigError("\n".join(_said(name, lines, path, why) for path, why in problems))
    return config


def _contradictions(config: ConfigFile) -> list[tuple[tuple[str, ...], str]]:
    """What is wrong between settings that are each right by themselves."""
    problems: list[tuple[tuple[str, ...], str]] = []
    groups: dict[str, tuple[str, AppSettings]] = {}
    for name, app in config.apps.items():
        at = ("apps", name)
        if app.kv_ceiling and app.kv_floor > app.kv_ceiling:
            problems.append(((*at, "kv_floor"), f"at most kv_ceiling, which is {app.kv_ceiling}"))
        if app.share is None:
            continue
        other, same = groups.setdefault(app.share, (name, app))
        for key in ("kv_floor", "kv_ceiling"):
            if getattr(app, key) != getattr(same, key):
                why = f"{getattr(same, key)} as for {other}, with which it shares its KV"
                problems.append(((*at, key), why))
    floors = sum(app.kv_floor for app in config.apps.values())
    if config.serve.kv_tokens and floors > config.serve.kv_tokens:
        why = f"at least {floors}, the sum of all kv_floor"
        problems.append((("serve", "kv_tokens"), why))
    if config.disk.persist and not config.disk.budget_gb:
        problems.append((("disk", "persist"), "a budget_gb above 0 beside it"))
    return problems


def _keys(path: tuple[str, ...]) -> tuple[str, ...]:
    """Where an error is, in keys of the file: pydantic adds a step of its own for a bad key."""
    return tuple(step for step in path if step != "[key]")


def _expected(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        *table, key = map(str, error["loc"])
        near = difflib.get_close_matches(key, known_keys(tuple(table)), n=1)
        return f"{near[0]}, perhaps: nothing has this name" if near else "a setting that exists"
    message: str = error["msg"]
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _said(
    name: str, lines: Mapping[tuple[str, ...], int], path: tuple[str, ...], expected: str
) -> str:
    return f"{name}:{_line(lines, path)} {'.'.join(path)}: expected {expected}"


def _line(lines: Mapping[tuple[str, ...], int], path: tuple[str, ...]) -> int:
    """Where a key stands, or the table that should have it."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, on which each table and key of a TOML document first stands.

    TOML readers do not say, so headers and the left sides of assignments are read line by line.
    Lines within a string of many lines may be taken for keys, which then name no setting.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith("["):
            table = _path(line.strip("[]").split("]")[0])
            path = table
        elif "=" in line and not line.startswith("#"):
            path = (*table, *_path(line[: line.index("=")]))
        else:
            continue
        for length in range(1, len(path) + 1):
            lines.setdefault(path[:length], number)
    return lines


def _path(key: str) -> tuple[str, ...]:
    """The parts of a dotted key."""
    try:
        value: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    parts: list[str] = []
    while isinstance(value, dict):
        ((part, value),) = value.items()
        parts.append(part)
    return tuple(parts)


Keys = tuple[str, ...]


def change_app(path: Path, name: str, settings: Mapping[str, Any]) -> ConfigFile:
    """`change` settings of one app."""
    return change(path, {("apps", name, key): value for key, value in settings.items()})


def change(path: Path, settings: Mapping[Keys, Any]) -> ConfigFile:
    """Change settings in the file, each named by its keys; None takes one away. Comments stay.

    The file is replaced as a whole or not at all, and only by one that is right.

    Raises:
        ConfigError: The file is wrong, or would be.
        OSError: It cannot be written.
    """
    import tomlkit  # only here: nothing else of the daemon needs to write TOML

    text = path.read_text(encoding="utf-8") if path.exists() else ""
    parse(text, str(path))
    document: Any = tomlkit.parse(text)
    for (*tables, key), value in settings.items():
        table = document
        for depth, name in enumerate(tables, 1):
            outer = tomlkit.table(is_super_table=depth < len(tables))
            table = table.setdefault(name, outer)
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    changed = tomlkit.dumps(document)
    config = parse(changed, str(path))
    _replace(path, changed)
    return config


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = path.resolve()  # a link to the person's collection of settings stays one
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".config-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise

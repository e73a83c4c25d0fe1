"""``config.toml``: what a person sets once, for the daemon and for each app.

The file is checked as a whole. Whatever is wrong with it is said at once, one line for each
mistake: ``file:line key: what was expected``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pagedd_daemon.front.config import BACKENDS, ConfigError
from pagedd_daemon.front.requests import seconds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST = 2**31 - 1
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Duration = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(seconds)]


def _backend(value: str) -> str:
    if value not in BACKENDS:
        raise ValueError(f"one of {', '.join(BACKENDS)}")
    return value


class _Table(BaseModel):
    """A table of the file: no key that is not known, no value of another type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class AppSettings(_Table):
    """``[apps.NAME]``: what holds for one app."""

    ceiling: Literal["interactive", "normal", "background"] = Field("interactive", alias="class")
    """The most important class it gets, whatever it claims."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Its share beside one with weight 1, of the same class and user."""
    max_running: _Count = 0
    """Requests that run at the same time; further ones wait. 0: any number."""
    max_queued: _Count = 0
    """Requests that wait; further ones are refused (``E_BUSY``). 0: any number."""
    kv_floor: _Count = 0
    """Tokens of the pool that its running requests keep while others can be paged out instead."""
    kv_ceiling: Annotated[int, Field(ge=0, le=_MOST)] = 0
    """Tokens of the pool that its running requests never exceed. 0: all."""
    deadline_ms: _Count = 0
    """The deadline of its requests that name none. 0: none."""
    share: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Apps of one user with the same word here share prefixes; others do not."""
    executable: Annotated[str, Field(pattern="^/")] | None = None
    """These settings are for the app that is this program, and for none that only takes its
    name."""


class UnknownApps(_Table):
    """``[unknown]``: what holds for each app without settings of its own."""

    ceiling: Literal["interactive", "normal", "background"] = Field("interactive", alias="class")
    interactive_samples: _Count = 2
    """Samples that one program's unknown apps have in the interactive class at the same time; what
    goes beyond is normal. Anybody can say ``interactive``."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_running: _Count = 0
    max_queued: _Count = 0
    kv_ceiling: _Count = 0
    deadline_ms: _Count = 0


class ServeSettings(_Table):
    """``[serve]``: options of ``pagedd serve``; what the command line says comes first."""

    model: Annotated[str, Field(min_length=1)] | None = None
    backend: Annotated[str, AfterValidator(_backend)] | None = None
    kv_tokens: _Count | None = None
    ram_gb: Annotated[float, Field(ge=0)] | None = None
    threads: _Count | None = None
    context: _Count | None = None
    keep_alive: _Duration | None = None
    drain: _Duration | None = None
    log_level: Literal["debug", "info", "warning", "error"] | None = None


class ConfigFile(_Table):
    """The whole file."""

    serve: ServeSettings = Field(default_factory=ServeSettings)
    unknown: UnknownApps = Field(default_factory=lambda: UnknownApps.model_validate({}))
    apps: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")], AppSettings] = Field(
        default_factory=dict
    )


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
        raise ConfigError(
            "\n".join(_said(name, lines, _keys(path), _expected(e)) for path, e in found)
        ) from errors
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
    return problems


def _keys(path: tuple[str, ...]) -> tuple[str, ...]:
    """Where an error is, in keys of the file: pydantic adds a step of its own for a bad key."""
    return tuple(step for step in path if step != "[key]")


def _expected(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "no such setting"
    message: str = error["msg"]
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _said(
    name: str, lines: Mapping[tuple[str, ...], int], path: tuple[str, ...], expected: str
) -> str:
    known = path
    while known and known not in lines:
        known = known[:-1]
    line = lines.get(known, 1)
    return f"{name}:{line} {'.'.join(path)}: expected {expected}"


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


def change_app(path: Path, name: str, settings: Mapping[str, Any]) -> ConfigFile:
    """Change settings of one app in the file; None takes one away. Comments stay.

    The file is replaced as a whole or not at all, and only by one that is right.

    Raises:
        ConfigError: The file is wrong, or would be.
        OSError: It cannot be written.
    """
    import tomlkit  # only here: nothing else of the daemon needs to write TOML

    text = path.read_text(encoding="utf-8") if path.exists() else ""
    parse(text, str(path))
    document: Any = tomlkit.parse(text)
    apps = document.setdefault("apps", tomlkit.table(is_super_table=True))
    app = apps.setdefault(name, tomlkit.table())
    for key, value in settings.items():
        if value is None:
            app.pop(key, None)
        else:
            app[key] = value
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

"""``pagedd config``: the file with everything that can be set."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import pagedd
from pagedd._paths import config_file
from pagedd.cli import _output as out
from pagedd.cli._app import EX_CONFIG, CommandError, as_json, commands
from pagedd.cli._daemon import daemon_modules

Keys = tuple[str, ...]

_HEADER = ("SETTING", "VALUE", "UNIT", "HOLDS", "FROM")


@commands.group()
def config() -> None:
    """Settings of the daemon and of apps: show, check, set.

    They are in $XDG_CONFIG_HOME/pagedd/config.toml, or where --file says.
    """


_FILE = click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Another file. [default: $XDG_CONFIG_HOME/pagedd/config.toml]",
)


@config.command()
@click.argument("key", required=False)
@_FILE
@as_json
def show(key: str | None, path: Path | None, json_: bool) -> None:
    """What is set, or would be by default; with KEY (serve.drain, or serve) a part of it.

    HOLDS says when a change of the setting takes effect: at once, with the next load of a model, or
    after a restart of the daemon.
    """
    path = path or config_file()
    found = list(_settings(path))
    if key is not None:
        named = [row for row in found if row["key"] == key or row["key"].startswith(f"{key}.")]
        if not named:
            raise _unknown(key, [row["key"] for row in found])
        found = named
    if json_:
        out.print_json({"file": str(path), "exists": path.exists(), "settings": found})
        return
    rows = [[r["key"], _said(r["value"]), r["unit"], r["holds"], r["from"]] for r in found]
    click.echo(out.table(_HEADER, rows))
    if key is not None and len(found) == 1:
        click.echo(f"\n{found[0]['text']}")


@config.command()
@_FILE
@as_json
def check(path: Path | None, json_: bool) -> None:
    """Is the file right? Every mistake is named, with its line and what was expected."""
    path = path or config_file()
    _loaded(path)
    if json_:
        out.print_json({"file": str(path), "exists": path.exists(), "mistakes": []})
    else:
        click.echo(f"{path}: " + ("right" if path.exists() else "not there; all is by default"))


@config.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("settings", nargs=-1, required=True, metavar="KEY=VALUE...")
@_FILE
@as_json
def set_(settings: tuple[str, ...], path: Path | None, json_: bool) -> None:
    """Change settings in the file; 'KEY=' takes one away. A running daemon takes them over.

    For example: pagedd config set serve.keep_alive=1h apps.my-editor.weight=3
    """
    where = path or config_file()
    changes = parse_changes(settings)
    daemon = daemon_modules()
    try:
        daemon.config_file.change(where, changes)
    except daemon.config.ConfigError as error:
        raise _wrong(str(error)) from None
    told = _reloaded() if path is None else None
    if json_:
        keys = {".".join(keys): value for keys, value in changes.items()}
        out.print_json({"file": str(where), "set": keys, "daemon": told})
        return
    click.echo(f"written to {where}")
    if told is None:
        click.echo("no daemon was told: it reads the file at its start")
        return
    for name, words in (
        ("applied", "hold now"),
        ("next_load", "hold from the next load of a model"),
        ("restart", "hold after a restart of the daemon"),
    ):
        if told.get(name):
            click.echo(f"{words}: {', '.join(told[name])}")


@config.command()
@_FILE
def edit(path: Path | None) -> None:
    """Open the file in $EDITOR, then check it."""
    path = path or config_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    subprocess.run([*editor.split(), str(path)], check=False)  # noqa: S603 - the person's own
    _loaded(path)
    told = _reloaded()
    click.echo("right" + ("" if told is None else "; the daemon has read it"))


def parse_changes(settings: Sequence[str]) -> dict[Keys, str | int | float | None]:
    """``TABLE.KEY=VALUE`` each; an app's name may hold dots.

    Raises:
        click.BadParameter: One is of another form.
    """
    changes: dict[Keys, str | int | float | None] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        table, _, rest = name.partition(".")
        app, _, key = rest.rpartition(".")
        keys = (table, app, key) if table == "apps" and app else (table, rest)
        if not equals or not all(keys):
            raise click.BadParameter(f"'{setting}' is not of the form TABLE.KEY=VALUE")
        changes[keys] = _value(value)
    return changes


def _value(text: str) -> str | int | float | None:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?\d*\.\d+", text):
        return float(text)
    return text or None


def _settings(path: Path) -> Iterator[dict[str, Any]]:
    """Every setting that holds, in the order of the file."""
    daemon = daemon_modules()
    loaded = _loaded(path)
    lines: Mapping[Keys, int] = {}
    if path.exists():
        lines = daemon.config_file.key_lines(path.read_text(encoding="utf-8"))
    tables: list[tuple[str, Keys, Any]] = [
        ("serve", ("serve",), loaded.serve),
        ("disk", ("disk",), loaded.disk),
        ("unknown", ("unknown",), loaded.unknown),
        *(("apps.NAME", ("apps", name), app) for name, app in loaded.apps.items()),
    ]
    every = list(daemon.config_model.settings())
    for kind, keys, values in tables:
        plain = values.model_dump(by_alias=True)
        for setting in every:
            if setting.table != kind:
                continue
            line = lines.get((*keys, setting.key))
            value = plain[setting.key]
            yield {
                "key": ".".join((*keys, setting.key)),
                "value": value,
                "default": setting.default.strip("`"),
                "unit": setting.unit,
                "type": setting.type.replace("`", ""),
                "holds": setting.holds,
                "from": f"line {line}" if line else "default",
                "text": setting.text.replace("`", ""),
            }


def _loaded(path: Path) -> Any:
    daemon = daemon_modules()
    try:
        return daemon.config_file.load(path)
    except daemon.config.ConfigError as error:
        raise _wrong(str(error)) from None


def _wrong(mistakes: str) -> CommandError:
    error = CommandError(
        mistakes,
        code="E_CONFIG",
        exit_code=EX_CONFIG,
        advice="Correct it, or see 'pagedd config show' for what there is.",
    )
    error.details = {"mistakes": mistakes.splitlines()}
    return error


def _unknown(key: str, known: Sequence[str]) -> CommandError:
    near = out.nearest(key, known)
    return CommandError(
        f"there is no setting '{key}'" + (f": did you mean '{near}'?" if near else ""),
        code="E_CONFIG",
        exit_code=EX_CONFIG,
        advice="'pagedd config show' lists them.",
    )


def _reloaded() -> dict[str, Any] | None:
    """What a running daemon says of the file; None if none runs."""
    try:
        with pagedd.control() as control:
            return control.reload()
    except pagedd.ConnectionFailed:
        return None


def _said(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

"""``pagedd apps``: what each app may have of the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

import pagedd
from pagedd.cli import _output as out
from pagedd.cli._app import commands, reaches_daemon

_HEADER = ("APP", "CLASS", "WEIGHT", "RUNNING", "QUEUED", "KV FLOOR", "KV CEILING", "SETTINGS")


@commands.group()
def apps() -> None:
    """What each app may have: classes, weights, limits."""


@apps.command("list")
@reaches_daemon
def list_apps(json_: bool, host: str | None, timeout: float) -> None:
    """Apps that have settings, and apps that are connected.

    CLASS is the most important class an app gets; RUNNING and QUEUED are the most requests that run
    and wait at the same time.
    """
    with pagedd.control(host=host, timeout=timeout) as control:
        found = control.apps()
    if json_:
        out.print_json({"apps": found})
        return
    rows = [_row(app) for app in found]
    click.echo(out.table(_HEADER, rows, right="WEIGHT RUNNING QUEUED"))


@apps.command()
@click.argument("app")
@reaches_daemon
def show(app: str, json_: bool, host: str | None, timeout: float) -> None:
    """The settings that hold for APP, and who is connected under its name."""
    with pagedd.control(host=host, timeout=timeout) as control:
        found = control.app(app)
    _print(found, json_)


@apps.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("app")
@click.argument("settings", nargs=-1, required=True, metavar="KEY=VALUE...")
@reaches_daemon
def set_app(
    app: str, settings: tuple[str, ...], json_: bool, host: str | None, timeout: float
) -> None:
    """Change settings of APP, at once and in config.toml; 'KEY=' takes one away.

    For example: pagedd apps set my-editor class=interactive weight=3 kv_floor=4096
    """
    with pagedd.control(host=host, timeout=timeout) as control:
        found = control.set_app(app, parse_settings(settings))
    _print(found, json_)


def parse_settings(settings: Sequence[str]) -> dict[str, str | float | None]:
    """``KEY=VALUE`` each, numbers as numbers.

    Raises:
        click.BadParameter: One is of another form.
    """
    parsed: dict[str, str | float | None] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"'{setting}' is not of the form KEY=VALUE")
        parsed[key] = _value(value)
    return parsed


def _value(text: str) -> str | float | None:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?\d*\.\d+", text):
        return float(text)
    return text or None


def _print(app: Mapping[str, Any], json_: bool) -> None:
    if json_:
        out.print_json(app)
        return
    whose = "its own" if app["known"] else "those of unknown apps"
    pairs = [("app", str(app["app"])), ("settings", whose)]
    pairs += [(name, _said(value)) for name, value in app["settings"].items()]
    for row in app["connected"]:
        program = row.get("program") or "unknown program"
        pairs.append(("connected", f"{row['connections']} as {row['class']}, {program}"))
    click.echo(out.facts(pairs))


def _row(app: Mapping[str, Any]) -> list[str]:
    settings = app["settings"]
    return [
        str(app["app"]),
        str(settings["class"]),
        out.number(settings["weight"], 1),
        *(_limit(settings.get(name)) for name in ("max_running", "max_queued")),
        *(_limit(settings.get(name)) for name in ("kv_floor", "kv_ceiling")),
        "own" if app["known"] else "unknown apps'",
    ]


def _limit(value: object) -> str:
    return str(value) if value else "-"


def _said(value: object) -> str:
    return "-" if value in (None, 0) else str(value)

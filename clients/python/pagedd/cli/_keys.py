"""``pagedd apps key``: API keys, by which the gateway knows apps."""

from __future__ import annotations

import re

import click

from pagedd import _keys
from pagedd.cli import _output as out
from pagedd.cli._app import EX_NOINPUT, CommandError, as_json
from pagedd.cli._apps import apps

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@apps.group()
def key() -> None:
    """API keys: who sends one over HTTP is the app it was made for."""


@key.command()
@click.argument("app")
@click.option(
    "--priority",
    type=click.Choice(_keys.PRIORITIES),
    default="normal",
    show_default=True,
    help="What the app asks for; its settings cap it.",
)
@as_json
def add(app: str, priority: str, json_: bool) -> None:
    """Make a key for APP and print it, this once: only its hash is kept."""
    if not _NAME.fullmatch(app):
        raise click.BadParameter(f"'{app}' is no name: up to 64 of A-Z a-z 0-9 . _ -")
    secret, made = _keys.add(_keys.keys_file(), app, priority)
    if json_:
        out.print_json({"key": secret, "id": made.id, "app": app, "priority": priority})
    else:
        click.echo(secret)


@key.command("list")
@as_json
def list_keys(json_: bool) -> None:
    """The keys there are, without what would let anybody in."""
    found = _keys.read(_keys.keys_file())
    if json_:
        rows = [{"id": k.id, "app": k.app, "priority": k.priority, "added": k.added} for k in found]
        out.print_json({"keys": rows})
        return
    rows_shown = [[k.id, k.app, k.priority, k.added] for k in found]
    click.echo(out.table(("ID", "APP", "CLASS", "ADDED"), rows_shown))


@key.command()
@click.argument("key", metavar="ID|APP")
@as_json
def revoke(key: str, json_: bool) -> None:
    """Take a key away, or all keys of an app; a running gateway refuses them from now on."""
    gone = _keys.revoke(_keys.keys_file(), key)
    if not gone:
        raise CommandError(
            f"there is no key '{key}'",
            code="E_KEY",
            exit_code=EX_NOINPUT,
            advice="See 'pagedd apps key list'.",
        )
    if json_:
        out.print_json({"revoked": [one.id for one in gone]})
    else:
        click.echo(f"revoked {', '.join(f'{one.id} ({one.app})' for one in gone)}")

"""``pagedd cache``: the store of prefixes that outlives the daemon, where there is one."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

import pagedd
from pagedd._paths import config_file
from pagedd.cli import _output as out
from pagedd.cli._app import EX_CONFIG, EX_TEMPFAIL, CommandError, commands, reaches_daemon
from pagedd.cli._daemon import daemon_module, daemon_modules

_FOLDER = click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Another folder than that of the configuration. [default: $XDG_STATE_HOME/pagedd]",
)

_MINE = click.option(
    "--mine",
    is_flag=True,
    help="What is yours in the store of the running daemon, which others may share.",
)


@commands.group()
def cache() -> None:
    """Keys and values that are kept on disk from one run of the daemon to the next.

    There are none unless the configuration says so: 'persist = true' in its table [disk].
    """


@cache.command()
@_FOLDER
@_MINE
@reaches_daemon
def show(folder: Path | None, mine: bool, json_: bool, host: str | None, timeout: float) -> None:
    """How much is kept, and for which model."""
    if mine:
        with pagedd.control(host=host, timeout=timeout) as control:
            _print_mine(control.cache(), json_)
        return
    where = folder or _folder()
    try:
        found = daemon_module("engine.tiers.store").show(where)
    except OSError as error:
        raise _unusable(error) from None
    if json_:
        out.print_json({"folder": str(where), "store": None if found is None else asdict(found)})
        return
    if found is None:
        click.echo(f"there is no store in {where}")
        return
    pairs = [
        ("file", found.path),
        ("size", out.size(found.bytes)),
        ("kept", f"{out.tokens(found.tokens)} tokens, {out.size(found.page_bytes)}"),
        ("bound to", found.binding or "nothing: it is no store"),
        ("in use", "by a daemon" if found.in_use else "no"),
    ]
    click.echo(out.facts(pairs))


@cache.command()
@_FOLDER
@_MINE
@reaches_daemon
def clear(folder: Path | None, mine: bool, json_: bool, host: str | None, timeout: float) -> None:
    """Remove what is kept, and the key by which it could be found.

    With --mine nobody finds what is yours from now on; it is erased when a model is next loaded.
    """
    if mine:
        with pagedd.control(host=host, timeout=timeout) as control:
            control.clear_cache()
        if json_:
            out.print_json({"cleared": True})
        else:
            click.echo("nothing of yours is found any more")
        return
    where = folder or _folder()
    try:
        freed = daemon_module("engine.tiers.store").clear(where)
    except BlockingIOError as error:
        raise CommandError(
            str(error),
            code="E_BUSY",
            exit_code=EX_TEMPFAIL,
            advice="Unload the model first: pagedd unload",
        ) from None
    except OSError as error:
        raise _unusable(error) from None
    if json_:
        out.print_json({"folder": str(where), "freed_bytes": freed})
    else:
        click.echo(f"{out.size(freed)} are free again")


def _print_mine(kept: dict[int, int] | None, json_: bool) -> None:
    tokens = None if kept is None else kept.get(os.getuid(), 0)
    if json_:
        out.print_json({"tokens": tokens})
    elif tokens is None:
        click.echo("no model is loaded: ask for something first")
    else:
        click.echo(f"{out.tokens(tokens)} tokens are kept of you")


def _folder() -> Path:
    """Where the configuration has the store.

    Raises:
        CommandError: ``E_CONFIG``: the configuration file is wrong.
    """
    daemon = daemon_modules()
    try:
        disk = daemon.config_file.load(config_file()).disk
    except daemon.config.ConfigError as error:
        raise CommandError(str(error), code="E_CONFIG", exit_code=EX_CONFIG) from None
    # Where a store was kept before somebody turned it off, too.
    found: Path = daemon.config.disk_place(None if disk.path is None else Path(disk.path), True)
    return found


def _unusable(error: OSError) -> CommandError:
    return CommandError(f"the store cannot be used: {error}", code="E_CONFIG", exit_code=EX_CONFIG)

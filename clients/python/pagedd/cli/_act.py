"""Commands that change what the daemon does: load, unload, cancel, shutdown."""

from __future__ import annotations

import click

import pagedd
from pagedd.cli import _output as out
from pagedd.cli._app import commands, reaches_daemon

LOAD_TIMEOUT_S = 600.0
"""A large model comes from a slow disk."""


@commands.command()
@click.argument("model", required=False)
@click.option("--keep-alive", metavar="DURATION", help="For example 5m, 3600, -1 (for ever).")
@reaches_daemon
def load(
    model: str | None, keep_alive: str | None, json_: bool, host: str | None, timeout: float
) -> None:
    """Load MODEL, or the configured one; returns when it serves."""
    with pagedd.connect("pagedd-cli", host=host, timeout=timeout) as client:
        loaded = client.load(model, keep_alive, timeout=max(timeout, LOAD_TIMEOUT_S))
    if json_:
        out.print_json({"model": loaded})
    else:
        click.echo(f"loaded {loaded['name']} ({out.size(loaded['size_bytes'])})")


@commands.command()
@reaches_daemon
def unload(json_: bool, host: str | None, timeout: float) -> None:
    """Unload the model once its streams have ended."""
    with pagedd.connect("pagedd-cli", host=host, timeout=timeout) as client:
        name = client.unload(timeout=max(timeout, LOAD_TIMEOUT_S))
    if json_:
        out.print_json({"unloaded": name})
    else:
        click.echo(f"unloaded {name}" if name else "no model was loaded")


@commands.command()
@click.argument("request_id", metavar="[ID]", required=False)
@click.option("--app", help="Only requests of this app.")
@click.option("--all", "all_", is_flag=True, help="Requests of all apps.")
@reaches_daemon
def cancel(
    request_id: str | None,
    app: str | None,
    all_: bool,
    json_: bool,
    host: str | None,
    timeout: float,
) -> None:
    """Cancel requests: those of an app or of all, or the one called ID among them."""
    if not all_ and app is None and request_id is None:
        raise click.UsageError("say what to cancel: --app APP, --all, or the ID of a request")
    if all_ and app is not None:
        raise click.UsageError("--app and --all exclude each other")
    with pagedd.control(host=host, timeout=timeout) as control:
        cancelled = control.cancel_requests(app=app, target=request_id)
    if json_:
        out.print_json({"cancelled": cancelled})
    else:
        click.echo("cancelled" if cancelled else "there was nothing to cancel")


@commands.command()
@click.option("--now", is_flag=True, help="Do not let streams end by themselves.")
@reaches_daemon
def shutdown(now: bool, json_: bool, host: str | None, timeout: float) -> None:
    """Stop the daemon once its streams have ended."""
    with pagedd.control(host=host, timeout=timeout) as control:
        control.shutdown(drain=not now)
    if json_:
        out.print_json({"shutdown": True})
    else:
        click.echo("the daemon is shutting down")


commands.add_command(shutdown, "stop")

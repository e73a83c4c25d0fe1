"""``pagedd gateway``: HTTP for apps that speak nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from pagedd.cli._app import EX_UNAVAILABLE, CommandError, commands


def gateway_module() -> Any:
    """`pagedd_http.serving`.

    Raises:
        CommandError: ``E_NOT_INSTALLED``: its libraries are not installed.
    """
    try:
        return importlib.import_module("pagedd_http.serving")
    except ImportError as error:
        raise CommandError(
            f"the gateway is not installed: {error.name} is missing",
            code="E_NOT_INSTALLED",
            exit_code=EX_UNAVAILABLE,
            advice="Install it with: pip install 'pagedd[http]'",
        ) from error


@commands.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=11500, show_default=True)
@click.option(
    "--uds",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Listen at this Unix socket instead.",
)
@click.option(
    "--daemon", metavar="unix:///PATH", help="The daemon's socket. [default: $PAGEDD_HOST]"
)
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help="A further name clients may call it by."
)
@click.option("--require-key", is_flag=True, help="Refuse whoever sends no API key.")
def gateway(
    host: str,
    port: int,
    uds: Path | None,
    daemon: str | None,
    allow_host: tuple[str, ...],
    require_key: bool,
) -> int:
    """Serve OpenAI's HTTP interface until SIGTERM or Ctrl-C.

    It is a client of the daemon, which must run or be started on demand; while it is away clients
    are told to come back.
    """
    serving = gateway_module()
    try:
        settings = serving.settings(daemon=daemon, allow_hosts=allow_host, key_required=require_key)
        return int(serving.serve(settings, host=host, port=port, uds=uds))
    except serving.ListenError as error:
        raise CommandError(
            str(error), code="E_LISTEN", exit_code=EX_UNAVAILABLE, advice=error.advice
        ) from None

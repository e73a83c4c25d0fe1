"""The command that starts the daemon in this process."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pagedd._paths import SHARED_SOCKET_DIR
from pagedd._paths import config_file as default_config_file
from pagedd._paths import socket_dir as default_socket_dir
from pagedd.cli._app import EX_CONFIG, CommandError, as_json, commands
from pagedd.cli._daemon import daemon_modules

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float:
    """Seconds of ``300`` or ``1h30m``, as the daemon reads ``keep_alive``; negative is for ever.

    Raises:
        click.BadParameter: It is none.
    """
    sign, amount = (-1, text[1:]) if text.startswith("-") else (1, text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", amount)
    if re.fullmatch(r"\d+(\.\d+)?", amount):
        seconds = float(amount)
    elif parts and "".join(number + unit for number, unit in parts) == amount:
        seconds = sum(float(number) * _UNIT_S[unit] for number, unit in parts)
    else:
        raise click.BadParameter(f"'{text}' is no duration like 300, 5m or 1h30m")
    return math.inf if sign < 0 and seconds else seconds


_LOG = "Standard error has the reason."
_COUNT = click.IntRange(min=0)


@commands.command()
@click.option(
    "--model",
    envvar="PAGEDD_MODEL",
    metavar="NAME|PATH",
    help="What requests get that name no model. [default: what 'pagedd pull' got]",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "llama.cpp", "simulated"]),
    default="auto",
    show_default=True,
)
@click.option("--kv-tokens", type=_COUNT, default=0, help="Size of the pool. [default: by memory]")
@click.option(
    "--socket-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Directory of the two sockets. [default: $XDG_RUNTIME_DIR/pagedd, or, shared, "
    f"{SHARED_SOCKET_DIR}]",
)
@click.option("--shared", is_flag=True, help="Serve the other users of the machine too.")
@click.option("--group", metavar="NAME", help="Of a shared daemon: members of this group alone.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False, resolve_path=True),
    help="Settings of the daemon and of apps. [default: $XDG_CONFIG_HOME/pagedd/config.toml]",
)
@click.option(
    "--ram-gb",
    type=click.FloatRange(min=0),
    help="RAM for KV that is swapped out or cached. [default: a quarter]",
)
@click.option(
    "--vram-gb",
    type=click.FloatRange(min=0),
    envvar="PAGEDD_MAX_VRAM",
    default=0.0,
    help="GPU memory for model and KV. [default: nine tenths of what is free]",
)
@click.option("--threads", type=_COUNT, default=0, help="[default: the physical cores]")
@click.option("--context", type=_COUNT, default=0, help="Longest sequence. [default: the model's]")
@click.option(
    "--keep-alive",
    type=duration,
    envvar="PAGEDD_KEEP_ALIVE",
    default="5m",
    show_default=True,
    help="How long an idle model stays loaded; -1 for ever.",
)
@click.option(
    "--drain",
    type=duration,
    default="30s",
    show_default=True,
    help="How long streams may go on after SIGTERM.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
@click.option("--simulated-step-us", type=_COUNT, default=1000, hidden=True)
@click.option("--simulated-token-us", type=_COUNT, default=0, hidden=True)
@as_json
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    model: str | None,
    socket_dir: Path | None,
    config: Path | None,
    ram_gb: float | None,
    vram_gb: float,
    context: int,
    keep_alive: float,
    drain: float,
    json_: bool,
    **others: Any,
) -> int:
    """Run the daemon until SIGTERM, Ctrl-C or 'pagedd shutdown'.

    What is not given here is taken from [serve] of the configuration file, if it is there.

    With --json only an error is printed, as JSON; the log goes to standard error either way.
    """
    daemon = daemon_modules()
    path = config or default_config_file()
    options = {"model": model, "ram_gb": ram_gb, "context": context, **others}
    options |= {"keep_alive": keep_alive, "drain": drain, "vram_gb": int(vram_gb * 10**9)}
    if ram_gb is not None:
        options["ram_gb"] = int(ram_gb * 10**9)
    given = {
        daemon.config_model.FIELDS.get(name, name): value
        for name, value in options.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    try:
        values = daemon.config_file.load(path).as_settings() | given
        where = SHARED_SOCKET_DIR if values["shared"] else default_socket_dir()
        settings = daemon.config.Settings(
            socket_dir=socket_dir or where,
            config_file=path,
            pinned=frozenset(given),
            **values,
        )
    except daemon.config.ConfigError as error:
        raise CommandError(str(error), code="E_CONFIG", exit_code=EX_CONFIG) from None
    server = importlib.import_module("pagedd_daemon.front.server")
    status = int(server.main(settings))
    if json_ and status:
        raise CommandError("the daemon did not run", code="E_DAEMON", exit_code=status, advice=_LOG)
    return status

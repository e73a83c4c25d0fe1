"""``pagedd service``: run the daemon on demand, or from login on, under the service manager."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import click

import pagedd
from pagedd.cli import _output as out
from pagedd.cli import _units
from pagedd.cli._app import (
    EX_CANTCREAT,
    EX_UNAVAILABLE,
    CommandError,
    as_json,
    commands,
    reaches_daemon,
)
from pagedd.cli._gateway import gateway_module

_SHOWN = ("LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "StatusText")


@commands.group()
def service() -> None:
    """Have the service manager run the daemon: on demand, or from login on."""


@service.command()
@click.option("--at-login", is_flag=True, help="Start at login; without it, on the first request.")
@click.option("--with-gateway", is_flag=True, help="Serve HTTP too: see 'pagedd gateway'.")
@click.option("--force", is_flag=True, help="Replace unit files that somebody else wrote.")
@click.option("--dry-run", is_flag=True, help="Show what would be written and done.")
@as_json
def install(at_login: bool, with_gateway: bool, force: bool, dry_run: bool, json_: bool) -> None:
    """Install the daemon as a service of this user.

    The service manager listens in its place: the first request starts it and is answered. Running
    it again after an upgrade is fine.
    """
    services = [_units.DAEMON]
    if with_gateway or _units.GATEWAY in _units.installed():
        gateway_module()  # says what to install where it is missing
        services.append(_units.GATEWAY)
    plan = _units.plan(at_login, services)
    if dry_run:
        _show_plan(plan, json_)
        return
    _run(plan.probe)
    _write(plan.files, force)
    for command in plan.install:
        _run(command)
    if json_:
        out.print_json({"installed": [str(f.path) for f in plan.files], "at_login": at_login})
        return
    for file in plan.files:
        click.echo(f"written: {file.path}")
    click.echo("pagedd starts at login" if at_login else "pagedd starts on the first request")
    if _units.GATEWAY in services:
        click.echo("the gateway listens at http://127.0.0.1:11500")
    if shutil.which("loginctl"):
        click.echo("To keep it running while you are logged out: loginctl enable-linger")


@service.command()
@as_json
def uninstall(json_: bool) -> None:
    """Stop the service and remove what 'install' wrote. Models and settings stay."""
    plan = _units.plan(False, _units.installed())
    present = [file for file in plan.files if file.path.exists()]
    if present:
        for command in plan.uninstall:
            _run(command)
        for file in present:
            file.path.unlink(missing_ok=True)
        for command in plan.afterwards:
            _run(command)
    if json_:
        out.print_json({"removed": [str(file.path) for file in present]})
    else:
        click.echo("\n".join(f"removed: {file.path}" for file in present) or "nothing is installed")


@service.command()
@reaches_daemon
def status(json_: bool, host: str | None, timeout: float) -> None:
    """Is it installed, does it run, and would a request be served? Never starts it."""
    plan = _units.plan(False, _units.installed())
    files = [file.path for file in plan.files if file.path.exists()]
    names = _units.SERVICES[_units.DAEMON].units
    names += tuple(path.name for path in files if path.name not in names)
    units = {unit: _shown(unit) for unit in names} if shutil.which("systemctl") else {}
    state = {unit: shown.get("ActiveState", "inactive") for unit, shown in units.items()}
    # To ask where the manager listens would start the daemon.
    asleep = state.get("pagedd.socket") == "active" and state.get("pagedd.service") == "inactive"
    daemon = None if asleep else _ping(host, timeout)
    if json_:
        document = {"files": [str(path) for path in files], "units": units, "daemon": daemon}
        out.print_json(document)
        return
    pairs = [("installed", ", ".join(str(path) for path in files) or "no")]
    for unit, shown in units.items():
        parts = (state[unit], shown.get("SubState", ""), shown.get("StatusText", ""))
        pairs.append((unit, ", ".join(part for part in parts if part)))
    pairs.append(("daemon", "not running" if daemon is None else _alive(daemon)))
    click.echo(out.facts(pairs))


@service.command()
@click.option("-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on as more is written.")
def logs(lines: int, follow: bool) -> int:
    """What the service wrote to its log."""
    command = _units.log_command(lines, follow)
    if shutil.which(command[0]) is None:
        raise CommandError(
            f"there is no {command[0]} on this machine",
            code="E_NO_MANAGER",
            exit_code=EX_UNAVAILABLE,
            advice="A daemon that 'pagedd serve' started writes to its standard error.",
        )
    return subprocess.run(command, check=False).returncode  # noqa: S603 - our own arguments


def _write(files: Sequence[_units.UnitFile], force: bool) -> None:
    for file in files:
        if not force and file.path.exists() and _units.MARK not in file.path.read_text("utf-8"):
            raise CommandError(
                f"{file.path} is there already, and not written by pagedd",
                code="E_EXISTS",
                exit_code=EX_CANTCREAT,
                advice="Move it away, or replace it with --force.",
            )
    for file in files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.write_text(file.text, encoding="utf-8")


def _run(command: Sequence[str]) -> None:
    """Have the service manager do something.

    Raises:
        CommandError: There is none, or it does not want to.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise CommandError(
            f"there is no {command[0]} on this machine, so no service manager that pagedd knows",
            code="E_NO_MANAGER",
            exit_code=EX_UNAVAILABLE,
            advice="Start the daemon with 'pagedd serve', from what starts your session.",
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise CommandError(
            f"'{' '.join(command)}' failed: {said[0] if said else f'exit {done.returncode}'}",
            code="E_MANAGER",
            exit_code=EX_UNAVAILABLE,
            advice="Log in as the user (not with su or sudo), so that its manager runs; or see "
            "'loginctl enable-linger'.",
        )


def _shown(unit: str) -> dict[str, str]:
    command = ["systemctl", "--user", "show", unit, "--property", ",".join(_SHOWN)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {name: value for name, _, value in pairs if value}


def _ping(host: str | None, timeout: float) -> dict[str, Any] | None:
    try:
        with pagedd.control(host=host, timeout=timeout) as control:
            return control.ping()
    except pagedd.ConnectionFailed:
        return None


def _alive(daemon: dict[str, Any]) -> str:
    return f"{daemon['state']}, pid {daemon['pid']}, up {out.duration(daemon['uptime_s'])}"


def _show_plan(plan: _units.Plan, json_: bool) -> None:
    if json_:
        files = {str(file.path): file.text for file in plan.files}
        out.print_json({"files": files, "commands": [list(c) for c in plan.install]})
        return
    for file in plan.files:
        click.echo(f"# {file.path}\n{file.text}")
    for command in plan.install:
        click.echo(f"$ {' '.join(command)}")
    sys.stdout.flush()

"""Files and commands that make the daemon a service, for the managers we know.

A further service beside the daemon is a further entry in `SERVICES`: its unit files lie in
``units/``, with ``@PAGEDD@`` where the command stands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from xml.sax.saxutils import escape

from pagedd._paths import state_dir

MARK = "Written by 'pagedd service install'"
"""In each file of ours: others are not overwritten."""

PLIST = "io.pagedd.daemon.plist"
"""What launchd's files are made from."""

Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Service:
    """A service that can be installed."""

    units: tuple[str, ...]
    """Its unit files."""
    on_demand: tuple[str, ...]
    """Units to enable so that it starts when it is asked something."""
    at_login: tuple[str, ...]
    """Units to enable so that it starts at login."""
    label: str
    """launchd's name of it."""
    command: str
    """Of `pagedd`."""


DAEMON, GATEWAY = "pagedd", "pagedd-gateway"

SERVICES: dict[str, Service] = {
    DAEMON: Service(
        units=("pagedd.socket", "pagedd.service"),
        on_demand=("pagedd.socket",),
        at_login=("pagedd.socket", "pagedd.service"),
        label="io.pagedd.daemon",
        command="serve",
    ),
    # It takes 50 MB, and nobody listens in its place.
    GATEWAY: Service(
        units=("pagedd-gateway.service",),
        on_demand=("pagedd-gateway.service",),
        at_login=("pagedd-gateway.service",),
        label="io.pagedd.gateway",
        command="gateway",
    ),
}

SYSTEM = ("pagedd@.socket", "pagedd@.service", "pagedd-shared.service")
"""Units for the system's manager, which packages of distributions bring."""

SYSUSERS = 'u pagedd - "pagedd for several users" /var/lib/pagedd-shared\n'
"""The user and group of ``pagedd-shared.service``, for sysusers.d(5)."""

NAMES = tuple(unit for service in SERVICES.values() for unit in service.units)


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A file to write."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What installing and uninstalling come to on this machine."""

    files: tuple[UnitFile, ...]
    probe: Command
    """Works where there is a manager: nothing is written before."""
    install: tuple[Command, ...]
    """Once the files are there."""
    uninstall: tuple[Command, ...]
    """Before they are removed."""
    afterwards: tuple[Command, ...]
    """When they are gone."""


def plan(at_login: bool, services: Sequence[str] = (DAEMON,), platform: str = sys.platform) -> Plan:
    """For this user on this machine."""
    chosen = [SERVICES[name] for name in services]
    return _launchd(chosen) if platform == "darwin" else _systemd(at_login, chosen)


def installed(platform: str = sys.platform) -> tuple[str, ...]:
    """The services that have a file of this user."""
    return tuple(
        name
        for name in SERVICES
        if any(file.path.exists() for file in plan(False, (name,), platform).files)
    )


def _systemd(at_login: bool, services: Sequence[Service]) -> Plan:
    config = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(config) if os.path.isabs(config) else Path.home() / ".config"
    folder = base / "systemd" / "user"
    names = [unit for service in services for unit in service.units]
    files = [UnitFile(folder / name, rendered(name, program())) for name in names]
    chosen: list[str] = []
    for service in services:
        chosen += service.at_login if at_login else service.on_demand
    systemctl = ("systemctl", "--user")
    reload = (*systemctl, "daemon-reload")
    others = [name for name in names if name not in chosen]
    return Plan(
        files=tuple(files),
        probe=(*systemctl, "show-environment"),
        install=(
            reload,
            # From "at login" back to "on demand".
            *([(*systemctl, "disable", *others)] if others else []),
            (*systemctl, "enable", *chosen),
            (*systemctl, "restart", *chosen),
        ),
        uninstall=((*systemctl, "disable", "--now", *names),),
        afterwards=(reload, (*systemctl, "reset-failed")),
    )


def _launchd(services: Sequence[Service]) -> Plan:
    files: list[UnitFile] = []
    for service in services:
        path = Path.home() / "Library" / "LaunchAgents" / f"{service.label}.plist"
        words = (*program(), service.command)
        arguments = "\n".join(f"    <string>{escape(word)}</string>" for word in words)
        text = template(PLIST).replace("@ARGUMENTS@", arguments).replace("@LABEL@", service.label)
        log = state_dir() / f"{service.label.rpartition('.')[2]}.log"
        files.append(UnitFile(path, text.replace("@LOG@", escape(str(log)))))
    domain = f"gui/{os.getuid()}"
    return Plan(
        files=tuple(files),
        probe=("launchctl", "version"),
        install=tuple(("launchctl", "bootstrap", domain, str(file.path)) for file in files),
        uninstall=tuple(("launchctl", "bootout", f"{domain}/{s.label}") for s in services),
        afterwards=(),
    )


def log_command(lines: int, follow: bool) -> list[str]:
    """What shows the service's log."""
    if sys.platform == "darwin":
        return ["tail", "-n", str(lines), *(["-f"] if follow else []), f"{state_dir()}/daemon.log"]
    command = ["journalctl", "--user", "--unit", "pagedd.service", "--lines", str(lines)]
    return [*command, *(["--follow"] if follow else ["--no-pager"])]


def program() -> Command:
    """How this installation's ``pagedd`` is started, by absolute paths."""
    script = Path(sys.argv[0])
    if script.name == "pagedd" and os.access(script, os.X_OK):
        return (str(script.absolute()),)
    return (sys.executable, "-m", "pagedd")


def template(name: str) -> str:
    """A file of ``units/`` as it is."""
    return (
        resources.files("pagedd.cli").joinpath("units").joinpath(name).read_text(encoding="utf-8")
    )


def rendered(name: str, command: Command) -> str:
    """A unit file that starts ``command``."""
    return template(name).replace("@PAGEDD@", " ".join(_quoted(word) for word in command))


def _quoted(word: str) -> str:
    """A word of a command line in a unit file (systemd.service(5), "COMMAND LINES")."""
    word = word.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{word}"' if any(c.isspace() for c in word) or '"' in word else word

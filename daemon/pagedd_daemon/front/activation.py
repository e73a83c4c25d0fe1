"""Listening sockets that the service manager made: sd_listen_fds(3).

The manager listens at the daemon's paths before the daemon runs, and starts it when the first
client knocks. That client, and whoever follows while the daemon starts, waits in the queue of the
manager's socket, which is then the daemon's first generation (docs/adr/0004, docs/adr/0025).
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from pagedd_daemon.front.config import ConfigError
from pagedd_daemon.front.listener import CONTROL_NAME, DATA_NAME

_FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """Listening sockets by name, and the directory they lie in."""

    directory: Path
    sockets: dict[str, socket.socket]


def inherited(environ: MutableMapping[str, str] = os.environ) -> Inherited | None:
    """The sockets this process was started with, if any; takes them out of the environment.

    Raises:
        ConfigError: They are not the daemon's two Unix sockets.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or count == "0":
        return None
    sockets: dict[str, socket.socket] = {}
    folders: set[Path] = set()
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        sock = _listening(fd)
        path = Path(os.fsdecode(sock.getsockname()))
        sockets[path.name] = sock
        folders.add(path.parent)
    if set(sockets) != {DATA_NAME, CONTROL_NAME} or len(folders) != 1:
        names = ", ".join(os.fsdecode(s.getsockname()) for s in sockets.values())
        raise ConfigError(
            f"the service manager passed {names}, and must pass {DATA_NAME} and {CONTROL_NAME} of "
            "one directory"
        )
    return Inherited(folders.pop(), sockets)


def _listening(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"descriptor {fd} of the service manager is no socket") from error
    sock.set_inheritable(False)
    sock.setblocking(False)
    if (
        sock.family != socket.AF_UNIX
        or sock.type != socket.SOCK_STREAM
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise ConfigError(f"descriptor {fd} of the service manager is no listening Unix socket")
    return sock

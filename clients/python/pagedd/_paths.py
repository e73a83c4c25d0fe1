"""Where pagedd keeps things, by the XDG base directory specification (0.8).

The daemon and its clients must agree on these, so they are computed in one place. Nothing here
creates a directory.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pagedd._errors import ConnectionFailed

DATA_SOCKET = "pagedd.sock"
CONTROL_SOCKET = "control.sock"

SHARED_SOCKET_DIR = Path("/run/pagedd-shared")
"""Where a daemon serves that the users of a machine share. Only root makes anything in ``/run``."""

MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` of a Unix socket address holds 108 bytes with the terminating zero (unix(7))."""


def _xdg(variable: str, default: str) -> Path:
    """The base directory of an XDG variable; a relative value must be ignored (the standard)."""
    value = os.environ.get(variable, "")
    base = Path(value) if os.path.isabs(value) else Path.home() / default
    return base / "pagedd"


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/pagedd``, by default ``~/.cache/pagedd``: what can be had again."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def models_dir() -> Path:
    """Where ``pagedd pull`` puts models and the daemon looks for them by name."""
    return cache_dir() / "models"


def state_dir() -> Path:
    """``$XDG_STATE_HOME/pagedd``, by default ``~/.local/state/pagedd``: logs and swap files."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def config_file() -> Path:
    """``$XDG_CONFIG_HOME/pagedd/config.toml``, by default ``~/.config/pagedd/config.toml``."""
    return _xdg("XDG_CONFIG_HOME", ".config") / "config.toml"


def socket_dir() -> Path:
    """The directory of the two sockets.

    ``$XDG_RUNTIME_DIR/pagedd``; without the variable (cron, ssh without a login session)
    ``/run/user/UID/pagedd`` if that runtime directory exists and is ours, else
    ``~/.cache/pagedd/run``. Never ``/tmp``, where another user could have been there first.
    """
    value = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(value):
        return Path(value) / "pagedd"
    runtime = Path(f"/run/user/{os.getuid()}")
    try:
        found = runtime.stat()
    except OSError:
        return cache_dir() / "run"
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
        return runtime / "pagedd"
    return cache_dir() / "run"


def data_socket(directory: Path | None = None) -> Path:
    """The socket for requests and their streams, in ``directory`` or `socket_dir`."""
    return (directory or socket_dir()) / DATA_SOCKET


def control_socket(directory: Path | None = None) -> Path:
    """The socket for cancel, status, stats, ping and shutdown, beside `data_socket`."""
    return (directory or socket_dir()) / CONTROL_SOCKET


def resolve_host(host: str | None) -> Path:
    """The data socket a client connects to.

    Args:
        host: ``unix:///path/to/pagedd.sock``; None: the environment's ``PAGEDD_HOST``, and without
            that the socket of the user's own daemon, or, where there is none, of a shared one.

    Raises:
        ConnectionFailed: ``E_HOST``: it names something that is not a Unix socket; pagedd has no
            network code.
    """
    source = "host"
    if host is None:
        host, source = os.environ.get("PAGEDD_HOST", ""), "PAGEDD_HOST"
        if not host:
            own, shared = data_socket(), data_socket(SHARED_SOCKET_DIR)
            # Without the right to look, it is not there for this user.
            return shared if os.path.exists(shared) and not os.path.exists(own) else own
    path = host.removeprefix("unix://") if host.startswith("unix://") else ""
    if not os.path.isabs(path):
        raise ConnectionFailed(
            f"{source} is {host!r}, but pagedd only talks over a Unix socket: "
            "use unix:///path/to/pagedd.sock",
            code="E_HOST",
            retryable=False,
            details={"host": host},
        )
    return Path(path)

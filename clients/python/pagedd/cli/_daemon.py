"""The daemon's own code, where a command needs it.

By name: the client is installed without the daemon's libraries too, and imports point from the
daemon to the client.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from pagedd.cli._app import EX_UNAVAILABLE, CommandError


def daemon_module(name: str) -> Any:
    """A module of ``pagedd_daemon``.

    Raises:
        CommandError: ``E_NOT_INSTALLED``: the daemon's libraries are not installed.
    """
    try:
        return importlib.import_module(f"pagedd_daemon.{name}")
    except ModuleNotFoundError as error:
        raise CommandError(
            f"this needs the Python package '{error.name}', which is not installed",
            code="E_NOT_INSTALLED",
            exit_code=EX_UNAVAILABLE,
            advice="Install it with: pip install 'pagedd[cpu]'",
        ) from None


def daemon_modules() -> Any:
    """``config``, ``config_model`` and ``config_file`` of the daemon.

    Raises:
        CommandError: As `daemon_module`.
    """
    names = ("config", "config_model", "config_file")
    return SimpleNamespace(**{name: daemon_module(f"front.{name}") for name in names})

"""The command ``pagedd``."""

from __future__ import annotations

from pagedd.cli._app import main

__all__ = ["main"]

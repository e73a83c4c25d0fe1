"""``python -m pagedd`` is the command ``pagedd``."""

from __future__ import annotations

from pagedd.cli import main

main()

"""``python -m pagedd_daemon.helper --fd N [--limits JSON]``: for the front, not for people."""

from __future__ import annotations

import argparse
import json

from pagedd_daemon.helper.protocol import HelperLimits
from pagedd_daemon.helper.worker import run


def main() -> None:
    """Serve the socket that was inherited as ``--fd``."""
    parser = argparse.ArgumentParser(prog="pagedd-helper")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--limits", type=json.loads, default={})
    arguments = parser.parse_args()
    run(arguments.fd, HelperLimits(**arguments.limits))


if __name__ == "__main__":
    main()

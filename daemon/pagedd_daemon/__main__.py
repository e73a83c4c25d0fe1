"""``python -m pagedd_daemon``: the daemon without the command line client's conveniences."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagedd._paths import socket_dir
from pagedd_daemon.front.config import BACKENDS, KV_DTYPES, ConfigError, Settings
from pagedd_daemon.front.server import Exit
from pagedd_daemon.front.server import main as serve


def main() -> int:
    """Entry point. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pagedd_daemon", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--model", help="name or path, loaded at the start")
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--socket-dir", type=Path, default=socket_dir())
    parser.add_argument("--disk-folder", type=Path)
    parser.add_argument("--log-level")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES)
    parser.add_argument("--flash-attention", action=argparse.BooleanOptionalAction)
    for name in ("kv-tokens", "ram-bytes", "disk-bytes", "threads", "context-tokens"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("simulated-step-us", "simulated-token-us"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("keep-alive-s", "drain-s"):
        parser.add_argument(f"--{name}", type=float)
    try:
        return serve(Settings(**vars(parser.parse_args())))
    except ConfigError as error:
        print(f"pagedd: {error}", file=sys.stderr)
        return Exit.CONFIG


if __name__ == "__main__":
    sys.exit(main())

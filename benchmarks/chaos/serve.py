"""A daemon whose engines may die as often as they like, with or without writing through, with as
few descriptors as it is told, and shared with all users.

None of it is a setting of `pagedd serve`: people have no use for them.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

from pagedd_daemon.front.config import Settings
from pagedd_daemon.front.server import main


def settings() -> Settings:
    """What the arguments ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket-dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--kv-tokens", type=int, default=16384)
    parser.add_argument("--step-us", type=int, default=1000)
    parser.add_argument("--token-us", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-write-through", action="store_true")
    parser.add_argument("--descriptors", type=int, default=0)
    parser.add_argument("--shared", action="store_true")
    asked = parser.parse_args()
    if asked.shared:
        asked.socket_dir.chmod(0o711)  # a fresh folder, made for us alone
    if asked.descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (asked.descriptors, asked.descriptors))
    return Settings(
        socket_dir=asked.socket_dir,
        model=asked.model,
        backend=asked.backend,
        kv_tokens=asked.kv_tokens,
        threads=asked.threads,
        simulated_step_us=asked.step_us,
        simulated_token_us=asked.token_us,
        engine_deaths=10**6,
        write_through=not asked.no_write_through,
        shared=asked.shared,
    )


if __name__ == "__main__":
    sys.exit(main(settings()))

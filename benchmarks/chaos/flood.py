"""Part ``flood`` of ``make chaos``: many more connections than the daemon may have descriptors.

Each connects and says nothing, and is held by its client until the end: as many processes of the
same user as it takes, which all connect at the same time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import pagedd
from benchmarks.chaos.served import serve
from benchmarks.report import ROOT, Report, Row
from benchmarks.service import environment
from pagedd_daemon.front.listener import CONTROL_NAME, DATA_NAME

CONNECTIONS = 15_000
DESCRIPTORS = 1024
_EACH = 500
"""Connections of a process, well within what any may open."""
_PATIENCE_S = 400.0


@dataclass
class Outcome:
    """What a flood did."""

    made: int = 0
    """Connections."""
    took_s: float = 0.0
    """To make them."""
    asked: int = 0
    """Requests of a client that was there before, meanwhile."""
    slowest_s: float = 0.0
    """The slowest of their answers."""
    failed: int = 0
    """Those that were not answered, or not with all tokens."""
    most_open: int = 0
    """Descriptors of the front, at most."""
    alive: bool = False
    """The daemon is the same, and so is its engine."""
    newcomer_s: float = float("nan")
    """Until a new client had its answer, once nobody connected any more."""


def flood(connections: int, descriptors: int = DESCRIPTORS) -> Outcome:
    """Flood a daemon of its own that may open so many descriptors."""
    outcome = Outcome()
    with serve("simulated", "simulated", "--descriptors", str(descriptors)) as daemon:
        front = daemon.processes()[0]
        with pagedd.connect(app="early", host=daemon.host, timeout=60) as early:
            begin = time.monotonic()
            flooders = [
                _flooder(daemon.socket_dir / (DATA_NAME, CONTROL_NAME)[number % 2], count)
                for number, count in enumerate(_shares(connections))
            ]
            try:
                while outcome.made < connections and time.monotonic() < begin + _PATIENCE_S:
                    _ask(early, outcome)
                    outcome.most_open = max(outcome.most_open, front.num_fds())
                    outcome.made += sum(_made(flooder) for flooder in flooders)
                outcome.took_s = time.monotonic() - begin
            finally:
                for flooder in flooders:
                    flooder.kill()
                    flooder.communicate()
            begin = time.monotonic()
            with pagedd.connect(app="late", host=daemon.host, timeout=60) as late:
                _ask(late, outcome)
            outcome.newcomer_s = time.monotonic() - begin
            _ask(early, outcome)
        with suppress(psutil.NoSuchProcess):
            outcome.alive = front.is_running() and not daemon.client.ping()["engine_deaths"]
    return outcome


def _shares(connections: int) -> list[int]:
    full, rest = divmod(connections, _EACH)
    return [_EACH] * full + [rest] * bool(rest)


def _ask(client: pagedd.Client, outcome: Outcome) -> None:
    begin = time.monotonic()
    try:
        result = client.generate("hello", max_tokens=16, ignore_eos=True).wait()
        outcome.failed += result.usage.generated_tokens != 16
    except pagedd.PageddError:
        outcome.failed += 1
    outcome.asked += 1
    outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - begin)


def _made(flooder: subprocess.Popen[bytes]) -> int:
    """Connections that it has told of since it was looked at last."""
    assert flooder.stdout is not None
    with suppress(BlockingIOError):
        return len(os.read(flooder.stdout.fileno(), 65_536))
    return 0


def _flooder(path: Path, count: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.chaos.flood", str(path), str(count)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return process


def part(report: Report, _: int) -> None:
    """Rows of the flood."""
    outcome = flood(1500 if report.quick else CONNECTIONS)
    wanted = 1500 if report.quick else CONNECTIONS
    note = f"at {DESCRIPTORS} descriptors, in {outcome.took_s:.0f} s; the front had at most "
    note += f"{outcome.most_open} open"
    report.add(Row("flood: connections made", outcome.made, "", f"== {wanted}", note))
    lost = outcome.failed + (not outcome.alive)
    note = f"{outcome.asked} requests of 16 tokens meanwhile and afterwards, the slowest "
    note += f"{outcome.slowest_s:.2f} s; same front, same engine"
    what = "flood: requests of others that were lost, and daemons that died"
    report.add(Row(what, lost, "", "== 0", note))
    note = "from its connect to the last of its 16 tokens"
    report.add(Row("flood: a new client afterwards", outcome.newcomer_s, "s", "<= 5", note))


def main() -> int:
    """Connect so many times, a byte for each; then hold them all until it is ended."""
    path, count = sys.argv[1], int(sys.argv[2])
    held = []
    for _ in range(count):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)  # blocks while the kernel's queue is full
        held.append(sock)
        os.write(1, b".")
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())

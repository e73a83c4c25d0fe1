"""``make bench-desktop``: several apps on one machine, and whether each gets what it was promised.

The same trace is played on the daemon and on llama.cpp's own server, which is built once from the
sources of llama-cpp-python (some 20 minutes of one core). ``--openai URL`` plays it on any other
server that speaks OpenAI's API and writes no file, ``--gateway`` on the daemon through `pagedd
gateway`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from typing import Protocol

from benchmarks.cpu import threads
from benchmarks.desktop import behind, constrained, hostile, mix, peer, shares
from benchmarks.desktop.trace import desktop
from benchmarks.report import Report
from benchmarks.stages import run


class Stage(Protocol):
    """Measures some rows."""

    def __call__(self, report: Report, threads: int) -> None:
        """Fill the report; ``threads``: of whatever computes."""


STAGES: dict[str, Stage] = {
    "mix": mix.desktop_mix,
    "behind": behind.short_behind_long,
    "shares": shares.shares,
    "hostile": hostile.hostile_neighbours,
    "constrained": constrained.constrained,
}


def main() -> int:
    """Run the stages; exit status 1 if a row misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join(STAGES)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{names}; default: all of them")
    parser.add_argument("--openai", metavar="URL", help="another server to play the mix on")
    parser.add_argument("--gateway", action="store_true", help="play the mix through the gateway")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(unknown)}; there are {names}")
    # Ending early still ends the daemons and the players.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.openai:
        report = Report("bench-desktop", quick=bool(os.environ.get("PAGEDD_QUICK")))
        server = ("--openai", str(options.openai))
        mix.measured(report, options.openai, server, desktop(quick=report.quick))
        return report.show()
    if options.gateway:
        return run("bench-desktop", {"gateway": partial(_gateway, threads=threads())})
    peer.build(jobs=threads())
    stages = {name: partial(stage, threads=threads()) for name, stage in STAGES.items()}
    return run("bench-desktop", stages, options.stages)


def _gateway(report: Report, threads: int) -> None:
    """The mix through the gateway, its rows apart from those of the daemon itself."""
    over = Report(report.target, quick=report.quick)
    mix.on_daemon(over, threads, over_http=True)
    for row in over.rows:
        report.rows.append(replace(row, what=f"over HTTP: {row.what}"))


if __name__ == "__main__":
    sys.exit(main())

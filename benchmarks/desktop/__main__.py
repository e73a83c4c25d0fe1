"""``make bench-desktop``: several apps on one machine, and whether each gets what it was promised.

The same trace is played on the daemon and on llama.cpp's own server, which is built once from the
sources of llama-cpp-python (some 20 minutes of one core). ``--openai URL`` plays it on any other
server that speaks OpenAI's API, ``--gateway`` on the daemon through `pagedd gateway`; they write no
file.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

from benchmarks.cpu import threads
from benchmarks.desktop import behind, constrained, hostile, mix, peer, shares
from benchmarks.desktop.trace import desktop
from benchmarks.report import Report

PARTS: dict[str, Callable[[Report, int], None]] = {
    "mix": mix.desktop_mix,
    "behind": behind.short_behind_long,
    "shares": shares.shares,
    "hostile": hostile.hostile_neighbours,
    "constrained": constrained.constrained,
}


def main() -> int:
    """Run the parts; exit status 1 if a row misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{names}; default: all of them")
    parser.add_argument("--openai", metavar="URL", help="another server to play the mix on")
    parser.add_argument("--gateway", action="store_true", help="play the mix through the gateway")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {names}")
    # Ending early still ends the daemons and the players.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("bench-desktop", quick=bool(os.environ.get("PAGEDD_QUICK")))
    if options.openai:
        server = ("--openai", str(options.openai))
        mix.measured(report, options.openai, server, desktop(quick=report.quick))
        return report.show()
    if options.gateway:
        mix.on_daemon(report, threads(), over_http=True)
        return report.show()
    peer.build(jobs=threads())
    for name in options.parts or PARTS:
        PARTS[name](report, threads())
    if options.parts:
        print("a part of the benchmark: no result file is written")
        return report.show()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

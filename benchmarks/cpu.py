"""``make bench-cpu``: speed and memory of the daemon on a machine without CUDA.

Every figure is taken from outside: a daemon process as users run it, client processes as apps are,
and for comparison the plainest loop over the same llama.cpp bindings in a process of its own. Only
one side ever computes; the other is blocked in a read.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

import psutil

from benchmarks import decoding, methods, overhead, pool
from benchmarks.report import Report
from benchmarks.returning import returning
from benchmarks.service import Daemon, packaged_model
from benchmarks.stages import run
from tests.support.f32_model import f32_copy


def threads() -> int:
    """CPU threads of llama.cpp on both sides: physical cores this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0)))


def default_daemon() -> Daemon:
    """A daemon with the default model and room for everything that is measured on it."""
    arguments = ("--model", str(packaged_model()), "--backend", "llama.cpp")
    size = ("--kv-tokens", str(decoding.POOL_TOKENS), "--threads", str(threads()))
    return Daemon(*arguments, *size)


def decode(report: Report) -> None:
    """Decoding against the raw loop; then what the daemon that did it costs while it rests."""
    with default_daemon() as daemon:
        decoding.against_raw_loop(report, daemon, packaged_model(), threads())
        overhead.resting(report, daemon)


def prefixes(report: Report) -> None:
    """Prefixes that are shared, and many that are cached."""
    with default_daemon() as daemon:
        pool.shared_prefix(report, daemon)
        pool.many_prefixes(report, daemon)


def full_pool(report: Report) -> None:
    """Decoding beside the cached tokens of others."""
    decoding.with_full_pool(report, packaged_model(), threads())


def pressure(report: Report) -> None:
    """More demand than the pool has room for."""
    pool.pressure_quantised(report, packaged_model(), threads())
    pool.pressure_exact(report, f32_copy(packaged_model()), threads())


def agents(report: Report) -> None:
    """Agents that return after a pause."""
    returning(report, packaged_model(), threads())


def beams(report: Report) -> None:
    """Memory that beams and groups share, and every way of decoding in a full pool."""
    methods.beams(report, packaged_model(), threads())
    methods.group_swap(report, packaged_model(), threads())
    methods.all_together(report, f32_copy(packaged_model()), threads(), pool.EXACT_GAP)


STAGES: dict[str, Callable[[Report], None]] = {
    "decode": decode,
    "full-pool": full_pool,
    "prefixes": prefixes,
    "pressure": pressure,
    "beams": beams,
    "added-time": overhead.added_time,
    "returning": agents,
}


def main() -> int:
    """Run the stages; exit status 1 if a row misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join(STAGES)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{names}; default: all of them")
    chosen = parser.parse_args().stages
    if unknown := set(chosen) - set(STAGES):
        parser.error(f"no such stage: {', '.join(unknown)}; there are {names}")
    # Ending early still ends the daemons and the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run("bench-cpu", STAGES, chosen)


if __name__ == "__main__":
    sys.exit(main())

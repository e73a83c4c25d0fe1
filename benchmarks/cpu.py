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

from benchmarks import decoding, overhead, pool
from benchmarks.report import Report
from benchmarks.service import Daemon, packaged_model
from tests.support.f32_model import f32_copy


def threads() -> int:
    """CPU threads of llama.cpp on both sides: physical cores this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0)))


def spine(report: Report) -> None:
    """Everything that is measured on one daemon with the default model, in one life of it."""
    model, count = packaged_model(), threads()
    arguments = ("--model", str(model), "--backend", "llama.cpp", "--threads", str(count))
    with Daemon(*arguments, "--kv-tokens", str(decoding.POOL_TOKENS)) as daemon:
        decoding.against_raw_loop(report, daemon, model, count)
        pool.shared_prefix(report, daemon)
        pool.many_prefixes(report, daemon)
        overhead.resting(report, daemon)


def full_pool(report: Report) -> None:
    """Decoding beside the cached tokens of others."""
    decoding.with_full_pool(report, packaged_model(), threads())


def pressure(report: Report) -> None:
    """More demand than the pool has room for."""
    pool.pressure_quantised(report, packaged_model(), threads())
    pool.pressure_exact(report, f32_copy(packaged_model()), threads())


PARTS: dict[str, Callable[[Report], None]] = {
    "spine": spine,
    "full-pool": full_pool,
    "pressure": pressure,
    "added-time": overhead.added_time,
}


def main() -> int:
    """Run the parts; exit status 1 if a row misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: all of them")
    chosen = parser.parse_args().parts
    # Ending early still ends the daemons and the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("bench-cpu", quick=bool(os.environ.get("PAGEDD_QUICK")))
    for name in chosen or PARTS:
        PARTS[name](report)
    if chosen:
        print("a part of the benchmark: no result file is written")
        return int(any(not row.ok for row in report.rows))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

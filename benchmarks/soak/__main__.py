"""``make soak``: an hour of the desktop mix with faults, after which everything is as it was.

Rounds of five apps on a quarter of the pool that they want, while `benchmarks.soak.faults` happen.
After each round the daemon is left alone until nobody waits, and then looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import psutil

from benchmarks.desktop.figures import outcomes
from benchmarks.desktop.mix import settings
from benchmarks.desktop.servers import DesktopDaemon, Records, play
from benchmarks.desktop.trace import desktop, pool_tokens
from benchmarks.report import Report, Row, cores
from benchmarks.service import Daemon
from benchmarks.soak.faults import Faults

SECONDS = 3600
ROUND_S = 90.0
"""What an app has not finished by then is dropped, as at the end of a day."""
SETTLE_S = 60.0
LINGER_S = 3.0
"""After the last request: sockets of those who left are given back in the second after."""
WARM = 1
"""Rounds before the first that counts: buffers grow to the size they keep."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An idle daemon."""

    at: float
    front_bytes: int
    """Resident."""
    front_files: int
    front_threads: int
    processes: int
    engine_bytes: int
    """Resident, but for what it maps: the model, and RAM that is meant to fill with pages."""
    engine_files: int
    engine_threads: int
    blocks: int
    """Of the pool, held by somebody."""
    swapped: int
    """Pages that somebody has in RAM and would need again."""


def sample(daemon: Daemon) -> Sample:
    """Wait until nobody has a request, and look.

    Raises:
        TimeoutError: Somebody still has one.
    """
    end = time.monotonic() + SETTLE_S
    while True:
        daemon.client.load()  # who died while nobody asked is replaced when somebody does
        status = daemon.status()
        requests = status["requests"]
        busy = requests["running"] + requests["waiting"]
        if status["state"] == "ready" and not busy and _engine(daemon) is not None:
            break
        if time.monotonic() > end:
            raise TimeoutError(f"requests do not end: {requests}, {status['state']}")
        time.sleep(0.5)
    time.sleep(LINGER_S)
    processes = daemon.processes()
    front = processes[0]
    engine = _engine(daemon)
    assert engine is not None
    memory = engine.memory_info()
    kv = daemon.stats()["kv"]
    return Sample(
        at=time.monotonic(),
        front_bytes=front.memory_info().rss,
        front_files=front.num_fds(),
        front_threads=front.num_threads(),
        processes=len(processes),
        engine_bytes=memory.rss - memory.shared,
        engine_files=engine.num_fds(),
        engine_threads=engine.num_threads(),
        blocks=kv["gpu"]["used"],
        swapped=kv["ram"]["used"],
    )


def _engine(daemon: Daemon) -> psutil.Process | None:
    """Its process; None between two of them."""
    for process in daemon.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "pagedd_daemon.engine" in process.cmdline():
                return process
    return None


def one_round(server: DesktopDaemon, faults: Faults, seed: int, seconds: float) -> Records:
    """The apps and the faults, beside each other."""
    found: Records = {}

    def work() -> None:
        found.update(play(server.server, desktop(quick=True, seed=seed), seconds))

    thread = threading.Thread(target=work, name="apps")
    thread.start()
    faults.until(lambda: not thread.is_alive())
    thread.join()
    return found


def soak(report: Report, seconds: float) -> None:
    """Rounds until ``seconds`` are over, and the rows."""
    apps = desktop(quick=True)
    begin = time.monotonic()
    samples: list[Sample] = []
    ended: Counter[str] = Counter()
    errors: set[str] = set()
    with DesktopDaemon(pool_tokens(apps), cores(), settings(apps)) as server:
        faults = Faults(server.daemon, seed=1)
        seed = 1
        while len(samples) < WARM + 2 or time.monotonic() - begin < seconds:
            records = one_round(server, faults, seed, min(ROUND_S, max(20.0, seconds / 4)))
            ended += Counter(outcomes(chain.from_iterable(records.values())))
            errors |= {r.error[:80] for r in chain.from_iterable(records.values()) if r.error}
            samples.append(sample(server.daemon))
            seed += 1
        log = server.daemon.log()
        family = server.daemon.processes()
    _, left = psutil.wait_procs(family, timeout=10)
    took = time.monotonic() - begin
    happened = ", ".join(f"{n} {name}" for name, n in sorted(faults.done.items()))
    note = f"{sum(faults.done.values())} faults in {took:.0f} s: {happened}"
    failed = ended["failed"]
    told = ", ".join(f"{n} {how}" for how, n in sorted(ended.items()))
    report.add(Row("requests of the apps that failed", failed, "", "== 0", f"{told}; {errors}"))
    report.add(Row("tracebacks in the log", log.count("Traceback"), "", "== 0", note))
    _flat(report, samples)
    report.add(Row("processes left at the end", len(left), "", "== 0"))


def _engine_bytes(found: Sample) -> int:
    return found.engine_bytes


def _flat(report: Report, samples: list[Sample]) -> None:
    """How much more there is in the last third of the rounds than in the first."""
    counted = samples[WARM:]
    third = max(1, len(counted) // 3)
    apart = counted[-1].at - counted[0].at

    def grown(of: Callable[[Sample], int]) -> tuple[float, str]:
        # An engine that was just started holds less than one that has worked, so the largest of
        # each third is looked at there.
        figure = max if of is _engine_bytes else statistics.median
        first, last = (
            figure([of(s) for s in part]) for part in (counted[:third], counted[-third:])
        )
        return last - first, f"{first:,.0f}, and {last:,.0f} after {apart:.0f} s"

    for what, of, unit, scale, most in (
        # 16 MiB of answers are remembered for a resend, and threads begin when there is work.
        ("front: memory", lambda s: s.front_bytes, "MB", 1e6, 24),
        ("front: descriptors", lambda s: s.front_files, "", 1, 4),
        ("front: threads", lambda s: s.front_threads, "", 1, 4),
        ("engine: memory", _engine_bytes, "MB", 1e6, 100),
        ("engine: descriptors", lambda s: s.engine_files, "", 1, 2),
        ("engine: threads", lambda s: s.engine_threads, "", 1, 1),
        ("processes", lambda s: s.processes, "", 1, 1),
    ):
        more, note = grown(of)
        report.add(Row(f"{what}, growth", more / scale, unit, f"<= {most}", note))
    held = max(s.blocks for s in samples)
    report.add(Row("blocks held when nobody asks, most", held, "", "== 0"))
    swapped = max(s.swapped for s in samples)
    report.add(Row("pages swapped out when nobody asks, most", swapped, "", "== 0"))


def main() -> int:
    """Exit status 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    seconds = parser.parse_args().seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shorter one says little of what grows slowly: it is not for quoting.
    report = Report("soak", quick=seconds < SECONDS)
    soak(report, seconds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

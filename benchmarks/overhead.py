"""What the daemon itself costs: time per token, time to the first one, memory, idle CPU."""

from __future__ import annotations

import random
import statistics
import time

import psutil

from benchmarks.decoding import apps_of
from benchmarks.report import Report, Row
from benchmarks.service import Daemon

STEP_US = 5_000
"""Of the simulated backend: known, and long enough that the loop's own work would show after it
where it did not overlap."""
PROMPT_TOKENS = 32
TOKENS = 100


def added_time(report: Report) -> None:
    """Rows of time added per token and to the first token, where the step time is known."""
    requests = 20 if report.quick else 100
    source = random.Random(3)
    arguments = ("--model", "simulated", "--backend", "simulated")
    with (
        Daemon(*arguments, "--simulated-step-us", str(STEP_US)) as daemon,
        apps_of(daemon, 1) as apps,
    ):
        series = [
            {
                # The simulated vocabulary is that of bytes.
                "prompt": [source.randrange(256) for _ in range(PROMPT_TOKENS)],
                "max_tokens": TOKENS,
                "ignore_eos": True,
            }
            for _ in range(requests)
        ]
        # The first request of a connection warms up code paths on both sides.
        results = apps[0].ask(op="series", requests=[*series[:1], *series])["results"][1:]
    firsts: list[float] = []
    intervals: list[float] = []
    for result in results:
        if "failure" in result:
            raise RuntimeError(f"a request of the measurement failed: {result['failure']}")
        times = [at for at, count in result["arrivals"] for _ in range(count)]
        firsts.append(times[0] - result["sent"])
        # The mean over a request: tokens that came bundled cannot make it look better.
        intervals.append((times[-1] - times[0]) / (len(times) - 1))
    step = STEP_US / 1e6
    note = f"p50 of {requests} requests, step {STEP_US / 1000:g} ms, simulated backend"
    per_token = (statistics.median(intervals) - step) * 1e6
    report.add(Row("added per token at one stream", round(per_token), "µs", "<= 300", note))
    first = (statistics.median(firsts) - step) * 1e3
    report.add(Row("added to the time to first token", round(first, 2), "ms", "<= 3", note))


def resting(report: Report, daemon: Daemon) -> None:
    """Rows of the front's memory and of the daemon's CPU time while nobody asks anything."""
    seconds = 5.0 if report.quick else 30.0
    processes = daemon.processes()
    before = sum(_cpu_seconds(process) for process in processes)
    started = time.monotonic()
    time.sleep(seconds)
    used = sum(_cpu_seconds(process) for process in processes) - before
    percent = 100 * used / (time.monotonic() - started)
    names = f"front, engine and helpers: {len(processes)} processes, over {seconds:g} s"
    report.add(Row("CPU of the idle daemon", round(percent, 2), "% of a core", "<= 1", names))
    memory = processes[0].memory_info().rss / 2**20
    note = "resident, after serving this whole run"
    report.add(Row("memory of the front process", round(memory, 1), "MB", "<= 80", note))


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

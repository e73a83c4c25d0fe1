"""``make bench-service``: what living with the service costs, on a machine without CUDA.

Commands are run as a person runs them: processes that start, print and end.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pagedd
from benchmarks.report import ROOT, Report, Row
from benchmarks.service import Daemon, environment, packaged_model

sys.path.insert(0, str(ROOT / "packaging" / "dev"))

import dist_test

_PAGEDD = (sys.executable, "-m", "pagedd")
_STREAMS = 4
_STEP_US = 5000


def installed(report: Report) -> None:
    """Size and import of the base install; from the wheel to the first token."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", "dist"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    figures = dist_test.measure()
    note = "compiled, pip left out; installed with CC=false"
    report.add(Row("base install, with bytecode", figures.base_mb, "MB", "<= 25", note))
    note = "median of 9, in the clean environment"
    report.add(Row("import of pagedd", figures.import_ms, "ms", "<= 150", note))
    note = "venv, pip install of the wheel with [cpu] (cached), pull, serve, run"
    value = figures.first_token_s
    report.add(Row("wheel to first streamed token, CPU", value, "s", "<= 60", note))


def activated(report: Report) -> None:
    """The first request, which starts the daemon."""
    tool = shutil.which("systemd-socket-activate")
    if tool is None:
        print("systemd-socket-activate is not installed: its row is left out")
        return
    times = [_first_request(tool) for _ in range(3 if report.quick else 7)]
    note = f"median of {len(times)}, {min(times):.2f} to {max(times):.2f} s; SmolLM2, to its first "
    note += "token, by systemd-socket-activate"
    value = statistics.median(times)
    report.add(Row("first request, which starts the daemon", value, "s", "<= 5", note))


def _first_request(tool: str) -> float:
    with tempfile.TemporaryDirectory(prefix="pagedd-bench-") as name:
        folder = Path(name) / "run"
        folder.mkdir(mode=0o700)
        env = {**environment(), "XDG_CONFIG_HOME": name}
        listen = [word for s in ("pagedd", "control") for word in ("-l", str(folder / f"{s}.sock"))]
        serve = [*_PAGEDD, "serve", "--socket-dir", str(folder)]
        serve += ["--model", str(packaged_model()), "--backend", "llama.cpp"]
        passed = [f"-E{key}={value}" for key, value in env.items()]
        process = subprocess.Popen(
            [tool, *passed, *listen, *serve], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        try:
            for _ in range(2):
                process.stderr.readline()  # "Listening on …", for each socket
            reader = threading.Thread(target=process.stderr.read, daemon=True)
            reader.start()
            began = time.monotonic()
            host = f"unix://{folder / 'pagedd.sock'}"
            with pagedd.connect("first", "interactive", host=host, timeout=60) as client:
                next(client.generate("Once upon a time", max_tokens=8, ignore_eos=True))
                took = time.monotonic() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            reader.join()
            process.stderr.close()
    return took


def looked_at(report: Report) -> None:
    """``ps`` and ``top`` beside running streams."""
    simulated = ("--model", "simulated", "--backend", "simulated")
    with Daemon(*simulated, "--simulated-step-us", str(_STEP_US)) as daemon:
        seconds = 4.0 if report.quick else 15.0
        quiet, _ = _beside(daemon, seconds, None)
        asked, times = _beside(daemon, seconds, lambda: _run(daemon, "ps"))
        note = f"median of {len(times)}, the process included; {_STREAMS} streams run"
        value = statistics.median(times) * 1000
        report.add(Row("pagedd ps on a loaded daemon", value, "ms", "<= 200", note))
        beside, alone = 1000 * _late(asked), 1000 * _late(quiet)
        delay = beside - alone
        note = "99th percentile of the time to 20 further tokens, a step taking "
        note += f"{_STEP_US / 1000:g} ms: {beside:.1f} ms beside 'ps' once a second, "
        note += f"{alone:.1f} ms alone"
        report.add(Row("delay of a stream by pagedd ps", delay, "ms", "<= 5", note))
        share = _top_share(daemon, 6.0 if report.quick else 30.0)
        note = "in a terminal, once a second, after its start; 4 streams run"
        report.add(Row("pagedd top", share, "% of a core", "<= 2", note))


def _late(times: Sequence[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(times, n=100)[98]


def _run(daemon: Daemon, *arguments: str) -> float:
    began = time.monotonic()
    subprocess.run(
        [*_PAGEDD, *arguments],
        env={**environment(), "PAGEDD_HOST": daemon.host},
        check=True,
        capture_output=True,
    )
    return time.monotonic() - began


def _beside(
    daemon: Daemon, seconds: float, look: Callable[[], float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Times to 20 tokens of streams that run so long, and what ``look`` took, once a second."""
    gaps: list[float] = []
    over = threading.Event()

    def stream() -> None:
        with pagedd.connect("stream", host=daemon.host, timeout=60) as client:
            while not over.is_set():
                last, count = time.monotonic(), 0
                for chunk in client.generate("hello", max_tokens=2000, ignore_eos=True):
                    count += len(chunk.tokens)
                    if count >= 20:
                        now = time.monotonic()
                        gaps.append((now - last) * 20 / count)
                        last, count = now, 0
                    if over.is_set():
                        break

    threads = [threading.Thread(target=stream) for _ in range(_STREAMS)]
    for thread in threads:
        thread.start()
    times: list[float] = []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if look is None:
            time.sleep(left)
        else:
            times.append(look())
            time.sleep(max(0.0, min(1.0 - times[-1], end - time.monotonic())))
    over.set()
    for thread in threads:
        thread.join()
    return gaps, times


def _top_share(daemon: Daemon, seconds: float) -> float:
    """Per cent of a core that ``top`` takes in a terminal, its start left out."""
    inner, outer = pty.openpty()
    process = subprocess.Popen(
        [*_PAGEDD, "top"],
        env={**environment(), "PAGEDD_HOST": daemon.host, "TERM": "xterm", "COLUMNS": "120"},
        stdin=outer,
        stdout=outer,
        stderr=outer,
    )
    os.close(outer)
    over = threading.Event()

    def stream() -> None:
        with pagedd.connect("stream", host=daemon.host, timeout=60) as client:
            for _ in client.generate("hello", max_tokens=8000, ignore_eos=True):
                if over.is_set():
                    break

    threads = [threading.Thread(target=stream) for _ in range(_STREAMS)]
    for thread in threads:
        thread.start()
    try:
        _drain(inner, 3.0)
        before, began = _cpu_seconds(process.pid), time.monotonic()
        _drain(inner, seconds)
        used, took = _cpu_seconds(process.pid) - before, time.monotonic() - began
    finally:
        over.set()
        for thread in threads:
            thread.join()
        process.terminate()
        process.wait(30)
        os.close(inner)
    return 100 * used / took


def _cpu_seconds(pid: int) -> float:
    """Of all threads, to the nanosecond: the usual counters tick a hundred times a second."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text(encoding="ascii").split()[0]) for file in files) / 1e9


def _drain(terminal: int, seconds: float) -> None:
    """Read what a terminal is told, as a terminal does."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            os.read(terminal, 65536)


def main() -> int:
    """Every row; exit status 1 if one misses what it must reach."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("bench-service", quick=bool(os.environ.get("PAGEDD_QUICK")))
    looked_at(report)
    activated(report)
    installed(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

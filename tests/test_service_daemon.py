"""The daemon as a process: how it starts, ends, and takes its children with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import pagedd

START_S = 30


@contextmanager
def daemon(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon that serves, killed in the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pagedd_daemon", "--socket-dir", str(directory), *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "serves in" in line:
                break
        else:
            raise AssertionError("".join(seen))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def connect(directory: Path) -> pagedd.Client:
    return pagedd.connect("test", host=f"unix://{directory / 'pagedd.sock'}", timeout=START_S)


def attempt(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A daemon that is expected to give up by itself."""
    return subprocess.run(
        [sys.executable, "-m", "pagedd_daemon", "--socket-dir", str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=START_S,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_sigterm_lets_a_live_stream_end_and_exits_0(directory: Path) -> None:
    slow = ("--model", "simulated", "--simulated-step-us", "20000")
    with daemon(directory, *slow) as process, connect(directory) as client:
        stream = client.generate("hello", max_tokens=50, ignore_eos=True)
        chunks = iter(stream)
        tokens = len(next(chunks).tokens)
        process.send_signal(signal.SIGTERM)
        while True:  # until the signal has arrived
            try:
                client.generate("refused", max_tokens=1).text()
            except pagedd.Draining:
                break
        tokens += sum(len(chunk.tokens) for chunk in chunks)
        assert tokens == 50
        assert process.wait(START_S) == 0
        assert not (directory / "pagedd.sock").exists()


def test_a_second_signal_ends_it_without_waiting(directory: Path) -> None:
    slow = ("--model", "simulated", "--simulated-step-us", "1000000")
    with daemon(directory, *slow) as process, connect(directory) as client:
        stream = client.generate("hello", max_tokens=1000, ignore_eos=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(START_S) == 0


def test_streams_that_do_not_end_in_time_get_an_error(directory: Path) -> None:
    slow = ("--model", "simulated", "--simulated-step-us", "50000", "--drain-s", "0.2")
    with daemon(directory, *slow) as process, connect(directory) as client:
        stream = client.generate("hello", max_tokens=1000, ignore_eos=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(pagedd.Draining):
            stream.text()
        assert process.wait(START_S) == 0


def test_a_second_daemon_exits_75_and_names_the_first(directory: Path) -> None:
    with daemon(directory, "--model", "simulated") as first:
        second = attempt(directory, "--model", "simulated")
        assert second.returncode == 75
        assert "end it with 'pagedd stop'." in second.stderr
        assert str(first.pid) in second.stderr
        with connect(directory) as client:
            assert client.generate("still served", max_tokens=1).text() is not None


def test_a_missing_or_broken_model_exits_66_and_is_named(directory: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model at all")
    for path in (tmp_path / "missing.gguf", broken):
        ended = attempt(directory, "--model", str(path))
        assert ended.returncode == 66
        assert str(path) in ended.stderr
        assert "or get the default with 'pagedd pull'." in ended.stderr


def test_settings_that_cannot_be_used_exit_78(directory: Path) -> None:
    ended = attempt(directory, "--kv-tokens", "-1")
    assert (ended.returncode, "kv_tokens" in ended.stderr) == (78, True)
    directory.mkdir(mode=0o700)
    (directory / "pagedd.sock").write_text("mine")
    ended = attempt(directory, "--model", "simulated")
    assert (ended.returncode, "pagedd.sock" in ended.stderr) == (78, True)
    assert (directory / "pagedd.sock").read_text() == "mine"


def test_when_the_front_is_killed_its_children_end_within_two_seconds(directory: Path) -> None:
    with daemon(directory, "--model", "simulated") as process, connect(directory) as client:
        stream = client.generate("hello", max_tokens=1000, ignore_eos=True)
        next(iter(stream))
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=2)
        assert alive == []


def test_an_engine_that_is_killed_costs_its_streams_a_pause_and_no_token(directory: Path) -> None:
    with daemon(directory, "--model", "simulated") as process, connect(directory) as client:
        plain = client.generate("hello", max_tokens=1000, ignore_eos=True, seed=1).text()
        stream = client.generate("hello", max_tokens=1000, ignore_eos=True, seed=1)
        next(iter(stream))
        (engine,) = [
            child
            for child in psutil.Process(process.pid).children()
            if "pagedd_daemon.engine" in child.cmdline()
        ]
        engine.kill()
        assert stream.text() == plain
        assert client.generate("again", max_tokens=3, ignore_eos=True).text() is not None


def test_the_front_imports_no_torch_numpy_or_llama_and_stays_below_80_mb(directory: Path) -> None:
    with daemon(directory, "--model", "simulated") as process, connect(directory) as client:
        for _ in range(3):
            client.generate("hello", max_tokens=50, ignore_eos=True).text()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert not [name for name in ("numpy", "torch", "llama") if name in maps]
        assert psutil.Process(process.pid).memory_info().rss < 80e6


def test_an_idle_daemon_sleeps(directory: Path) -> None:
    with daemon(directory, "--model", "simulated") as process, connect(directory) as client:
        client.generate("hello", max_tokens=5, ignore_eos=True).text()
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]

        def used() -> float:
            return sum(sum(p.cpu_times()[:2]) for p in tree)

        before, start = used(), time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert (used() - before) / (time.monotonic() - start) <= 0.02


def test_shutdown_over_the_control_socket_drains_too(directory: Path) -> None:
    with daemon(directory, "--model", "simulated") as process:
        with pagedd.control(host=f"unix://{directory / 'pagedd.sock'}") as control:
            control.shutdown()
        assert process.wait(START_S) == 0

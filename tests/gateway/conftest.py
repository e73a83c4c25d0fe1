"""A daemon on the simulated backend and a gateway before it, both of the checkout's own .venv."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGEDD = (str(ROOT / ".venv" / "bin" / "python"), "-m", "pagedd")
START_S = 60.0


def _environment(folder: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PAGEDD_", "PYTHON"))}
    for name in ("RUNTIME_DIR", "CACHE_HOME", "STATE_HOME", "CONFIG_HOME"):
        path = folder / name.lower()
        path.mkdir(mode=0o700)
        env[f"XDG_{name}"] = str(path)
    return {**env, "PAGEDD_HOST": f"unix://{folder}/run/pagedd.sock"}


def _await_line(stream: IO[bytes], words: str) -> str:
    """The line of a process's standard error with these words in it."""
    end = time.monotonic() + START_S
    seen = b""
    while time.monotonic() < end:
        if not select.select([stream], [], [], 0.5)[0]:
            continue
        more = os.read(stream.fileno(), 4096)
        seen += more
        for line in seen.decode("utf-8", "replace").splitlines():
            if words in line:
                return line
        if not more:
            break
    raise AssertionError(f"no {words!r} in:\n{seen.decode('utf-8', 'replace')}")


@pytest.fixture(scope="session")
def gateway() -> Iterator[str]:
    """``http://127.0.0.1:PORT`` of a gateway whose daemon has the model ``simulated``."""
    with tempfile.TemporaryDirectory(prefix="pagedd-") as name:
        folder = Path(name)
        env = _environment(folder)
        serve = ("serve", "--model", "simulated", "--backend", "simulated")
        commands = (
            ((*PAGEDD, *serve, "--socket-dir", str(folder / "run")), " serves in "),
            ((*PAGEDD, "gateway", "--port", "0"), "listening at "),
        )
        started: list[subprocess.Popen[bytes]] = []
        try:
            line = ""
            for command, words in commands:
                process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
                started.append(process)
                assert process.stderr is not None
                line = _await_line(process.stderr, words)
            yield line.split("listening at ")[1].strip()
        finally:
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=60)

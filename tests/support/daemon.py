"""A real daemon in a process of its own, with sockets and XDG folders in a temporary directory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import pagedd

START_S = 60.0
STOP_S = 60.0


@dataclass(slots=True, eq=False)
class RunningDaemon:
    """A daemon that listens."""

    process: subprocess.Popen[str]
    folder: Path
    env: dict[str, str]
    """Environment in which clients find this daemon and nothing of the person who runs the test."""
    killed: bool = False
    _lines: list[str] = field(default_factory=list)
    _listening: threading.Event = field(default_factory=threading.Event)
    _reader: threading.Thread | None = None

    @property
    def socket_dir(self) -> Path:
        """Where its two sockets are."""
        return self.folder / "run"

    @property
    def host(self) -> str:
        """What clients are told to connect to."""
        return f"unix://{self.socket_dir / 'pagedd.sock'}"

    def log(self) -> str:
        """What it wrote to standard error so far."""
        return "".join(self._lines)

    def connect(
        self, app: str = "test", priority: str = "normal", *, timeout: float = 60.0
    ) -> pagedd.Client:
        """A client of it."""
        return pagedd.connect(app, priority, host=self.host, timeout=timeout)

    def control(self, *, timeout: float = 60.0) -> pagedd.Control:
        """Its control socket."""
        return pagedd.control(host=self.host, timeout=timeout)

    def command(
        self, *arguments: str, stdin: str | bytes = "", timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run ``pagedd`` against it, without a terminal."""
        given = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [sys.executable, "-m", "pagedd", *arguments],
            env=self.env,
            input=given,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def family(self) -> list[psutil.Process]:
        """Its engine and helpers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        self.killed = True
        self.process.kill()

    def wait(self) -> int:
        """Until it has exited by itself; its exit status."""
        status = self.process.wait(STOP_S)
        if self._reader is not None:
            self._reader.join(STOP_S)
        return status

    def _read(self) -> None:
        """Keeps standard error from filling up, and notices when it listens, or dies."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            if " serves in " in line:
                self._listening.set()
        self._listening.set()

    def _await_listening(self) -> None:
        self._reader = threading.Thread(target=self._read, name="daemon-log", daemon=True)
        self._reader.start()
        if not self._listening.wait(START_S) or self.process.poll() is not None:
            raise AssertionError(f"the daemon did not start:\n{self.log()}")


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of a daemon and its clients that live in ``folder``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PAGEDD_")}
    for name in ("RUNTIME_DIR", "CACHE_HOME", "STATE_HOME", "CONFIG_HOME"):
        path = folder / name.lower()
        path.mkdir(mode=0o700, exist_ok=True)
        env[f"XDG_{name}"] = str(path)
    env["PAGEDD_DEBUGGABLE"] = "1"  # tests look into /proc, without being root
    return env | {"PAGEDD_HOST": f"unix://{folder / 'run' / 'pagedd.sock'}", "COLUMNS": "120"}


@contextlib.contextmanager
def running_daemon(
    model: str = "simulated",
    *,
    load: bool = True,
    environ: Mapping[str, str] | None = None,
    config_text: str = "",
    user: int | None = None,
    groups: Sequence[int] = (),
    **options: str | float,
) -> Iterator[RunningDaemon]:
    """``pagedd serve``, stopped by SIGTERM at the end, which it must survive with exit status 0.

    Args:
        model: Name or path; with ``simulated`` the backend is the simulated one.
        load: Wait until the model serves.
        environ: Further variables of the daemon's environment.
        config_text: Text of ``config.toml``.
        user: Uid that it runs as, with ``groups``, and whose its folders are, which others may pass
            through; None: ours. Needs root.
        options: Options of ``pagedd serve``: ``kv_tokens=4096`` for ``--kv-tokens 4096``.
    """
    # Socket paths hold 107 bytes, and pytest's own temporary folders are long.
    with tempfile.TemporaryDirectory(prefix="pagedd-") as name:
        folder = Path(name)
        env = environment(folder)
        (Path(env["XDG_CONFIG_HOME"]) / "pagedd").mkdir(mode=0o700)
        (Path(env["XDG_CONFIG_HOME"]) / "pagedd" / "config.toml").write_text(config_text)
        identity: dict[str, Any] = {}
        if user is not None:
            folder.chmod(0o711)
            for path in (folder, *folder.rglob("*")):
                os.chown(path, user, user)
            identity = {"user": user, "group": user, "extra_groups": groups}
        options.setdefault("backend", "simulated" if model == "simulated" else "auto")
        command = [sys.executable, "-m", "pagedd", "serve", "--model", model]
        command += ["--socket-dir", str(folder / "run")]
        for option, value in options.items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        process = subprocess.Popen(
            command,
            env={**env, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **identity,
        )
        daemon = RunningDaemon(process, folder, env)
        try:
            daemon._await_listening()
            if load:
                with daemon.connect("test-start", timeout=START_S) as client:
                    client.load()
            yield daemon
            _stop(daemon)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            if daemon._reader is not None:
                daemon._reader.join()
            assert process.stderr is not None
            process.stderr.close()


def _stop(daemon: RunningDaemon) -> None:
    """Ends it, unless it has ended, and looks at how it went."""
    family: list[psutil.Process] = []
    if daemon.process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = daemon.family()
        daemon.process.terminate()
    status = daemon.wait()
    expected = -signal.SIGKILL if daemon.killed else 0
    assert status == expected, f"the daemon exited {status}:\n{daemon.log()}"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, f"the daemon left processes behind: {alive}"

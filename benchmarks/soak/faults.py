"""What goes wrong on a desktop, done to a daemon while its apps work."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psutil

import pagedd
from benchmarks.report import ROOT
from benchmarks.service import Daemon

LEAST_S, MOST_S = 2.0, 6.0
"""Between two faults."""
ENGINE_EVERY_S = 40.0
"""An engine lives at least so long: five deaths in a minute would end the daemon, and a request
that three engines died with would be suspected."""

_CLIENT = """
import sys
import pagedd
with pagedd.connect("victim", "background", host=sys.argv[1]) as client:
    for _ in client.generate("Tell me everything", max_tokens=2000, ignore_eos=True):
        print("on", flush=True)
"""


class Faults:
    """Does things to a daemon, chosen by a seed."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self._daemon = daemon
        self._dice = random.Random(seed)
        self._killed_at = time.monotonic()
        self.done: Counter[str] = Counter()
        """How often each took place."""
        self._kinds: tuple[Callable[[], object], ...] = (
            self.engine_killed,
            self.helper_killed,
            self.client_killed,
            self.client_stopped,
            self.nonsense,
            self.connections,
            self.refused_requests,
            self.cancels,
            self.sessions_left,
            self.reload,
        )

    def until(self, over: Callable[[], bool]) -> None:
        """One fault after another, until ``over``."""
        due = time.monotonic() + self._dice.uniform(LEAST_S, MOST_S)
        while not over():
            time.sleep(0.2)
            if time.monotonic() >= due:
                self.do(self._dice.choice(self._kinds))
                due = time.monotonic() + self._dice.uniform(LEAST_S, MOST_S)

    def do(self, kind: Callable[[], object]) -> None:
        """One fault; one that finds nobody to befall counts as none."""
        if kind() is not False:
            self.done[kind.__name__] += 1

    def _process(self, module: str) -> psutil.Process | None:
        found = [p for p in self._daemon.processes() if module in p.cmdline()]
        return self._dice.choice(found) if found else None

    def engine_killed(self) -> bool:
        """As the kernel does when memory runs out."""
        engine = self._process("pagedd_daemon.engine")
        if engine is None or time.monotonic() - self._killed_at < ENGINE_EVERY_S:
            return False
        self._killed_at = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.kill()
        return True

    def helper_killed(self) -> bool:
        """The same, to a process that tokenises."""
        helper = self._process("pagedd_daemon.helper")
        if helper is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                helper.kill()
        return helper is not None

    @contextlib.contextmanager
    def _client(self) -> Iterator[subprocess.Popen[str]]:
        """An app in the middle of a reply."""
        with subprocess.Popen(
            [sys.executable, "-c", _CLIENT, self._daemon.host],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as client:
            try:
                assert client.stdout is not None
                client.stdout.readline()
                yield client
            finally:
                client.kill()

    def client_killed(self) -> None:
        """An app that crashes while it reads."""
        with self._client():
            pass

    def client_stopped(self) -> None:
        """An app that hangs for some seconds, and then crashes."""
        with self._client() as client:
            client.send_signal(signal.SIGSTOP)
            time.sleep(2.0)

    def nonsense(self) -> None:
        """Bytes that are no ZeroMQ, on both sockets."""
        for path in ("pagedd.sock", "control.sock"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(self._daemon.socket_dir / path))
                with contextlib.suppress(OSError):
                    sock.sendall(self._dice.randbytes(5000))

    def connections(self) -> None:
        """Apps that come, ask something and go."""
        for number in range(20):
            with pagedd.connect(f"visitor-{number}", host=self._daemon.host) as client:
                client.tokenize("hello")

    def refused_requests(self) -> None:
        """Requests that cannot be served."""
        with pagedd.connect("wrong", host=self._daemon.host) as client:
            with contextlib.suppress(pagedd.PageddError):
                client.generate([1] * 50_000, max_tokens=4).wait()
            for wrong in ("(", "[z-a]", "a{9999999}"):
                with contextlib.suppress(pagedd.PageddError):
                    client.generate("x", regex=wrong, max_tokens=4).wait()

    def cancels(self) -> None:
        """An app that changes its mind at every moment."""
        with pagedd.connect("fickle", host=self._daemon.host) as client:
            for pieces in range(6):
                stream = client.generate("Once upon a time", max_tokens=60, ignore_eos=True)
                for _ in zip(range(pieces), stream, strict=False):
                    pass
                stream.cancel()

    def sessions_left(self) -> None:
        """Conversations that nobody closes."""
        with pagedd.connect("forgetful", host=self._daemon.host) as client:
            for _ in range(4):
                session = client.session(system="You are terse.")
                session.say("Hello", max_tokens=4).wait()
                session.fork()

    def reload(self) -> None:
        """Somebody edited the settings."""
        self._daemon.processes()[0].send_signal(signal.SIGHUP)

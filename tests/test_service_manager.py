"""The daemon under a service manager: readiness, reload, and sockets that were there before it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pagedd
from pagedd_daemon.front.notify import Notifier
from tests.support.daemon import environment, running_daemon

PATIENCE_S = 60


class Manager:
    """What a service manager hears."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.settimeout(PATIENCE_S)

    def until(self, line: str) -> list[str]:
        """Every line up to the message that has this one."""
        heard: list[str] = []
        while line not in heard:
            heard += self._sock.recv(4096).decode().splitlines()
        return heard

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="pagedd-") as folder:
        found = Manager(Path(folder) / "notify")
        yield found
        found.close()


def test_ready_is_said_once_a_request_would_be_served_and_stopping_at_the_end(
    manager: Manager,
) -> None:
    with running_daemon(load=False, environ={"NOTIFY_SOCKET": str(manager.path)}) as daemon:
        heard = manager.until("READY=1")
        assert heard[0] == "STATUS=loading simulated"
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in heard)
        assert heard[-1] == "STATUS=serving"
        with daemon.control() as control:
            assert control.status()["state"] == "ready"
        daemon.process.send_signal(signal.SIGTERM)
        assert manager.until("STOPPING=1")


def test_the_managers_watchdog_is_fed_while_there_is_nothing_to_do(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "300000"}
    with running_daemon(load=False, environ=environ):
        manager.until("READY=1")
        for _ in range(3):
            assert manager.until("WATCHDOG=1")


def test_a_reload_changes_what_can_be_live_and_says_what_cannot(manager: Manager) -> None:
    with running_daemon(environ={"NOTIFY_SOCKET": str(manager.path)}, drain="7s") as daemon:
        manager.until("READY=1")
        path = Path(daemon.env["XDG_CONFIG_HOME"]) / "pagedd" / "config.toml"
        path.write_text(
            '[serve]\nkeep_alive = "1h"\ndrain = "1s"\nthreads = 1\nmodel = "other"\n'
            "[apps.editor]\nweight = 3\n"
        )
        daemon.process.send_signal(signal.SIGHUP)
        heard = manager.until("READY=1")
        assert heard[0] == "RELOADING=1"
        assert heard[-1] == (
            "STATUS=at once: serve.keep_alive, apps.editor; next load: serve.threads"
        ), "the model and drain are the command line's, which stays"
        with daemon.control() as control:
            assert control.app("editor")["settings"]["weight"] == 3
            (model,) = control.status()["models"]
            assert 3500 < model["expires_s"] <= 3600
            assert control.reload() == {"applied": [], "next_load": [], "restart": []}


def test_a_broken_file_on_reload_keeps_what_was_and_says_so(manager: Manager) -> None:
    with running_daemon(environ={"NOTIFY_SOCKET": str(manager.path)}) as daemon:
        manager.until("READY=1")
        path = Path(daemon.env["XDG_CONFIG_HOME"]) / "pagedd" / "config.toml"
        path.write_text("[apps.editor]\nweight = 3\n")
        with daemon.control() as control:
            assert control.reload()["applied"] == ["apps.editor"]
            path.write_text("[apps.editor]\nweight = 0\nwieght = 1\n")
            with pytest.raises(pagedd.RequestError, match=r"3 apps\.editor\.wieght") as caught:
                control.reload()
            assert caught.value.code == "E_CONFIG"
            daemon.process.send_signal(signal.SIGHUP)
            heard = manager.until("READY=1")
            assert heard[-1].endswith(
                "the configuration file is wrong; the settings stay as they were"
            )
            assert control.app("editor")["settings"]["weight"] == 3
    # Now that all of its log has been read.
    assert "config.toml:2 apps.editor.weight: expected greater than 0" in daemon.log()


def test_config_set_reaches_a_running_daemon_at_once() -> None:
    with running_daemon() as daemon:
        done = daemon.command("config", "set", "apps.editor.weight=2", "serve.threads=1")
        assert done.stdout.splitlines()[1:] == [
            "hold now: apps.editor",
            "hold from the next load of a model: serve.threads",
        ]
        with daemon.control() as control:
            assert control.app("editor")["settings"]["weight"] == 2


def test_the_environment_of_the_manager_is_not_handed_on() -> None:
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}
    notifier = Notifier(environ)
    assert environ == {}
    assert (notifier.heard, notifier.watchdog_s) == (True, None)
    assert Notifier({"WATCHDOG_USEC": "5000000"}).watchdog_s == 5.0
    notifier.ready("nobody listens there, and nothing happens")


_AS_MANAGER = """
import os, sys
a, b = int(sys.argv[1]), int(sys.argv[2])
os.dup2(a, 10); os.dup2(b, 11); os.dup2(10, 3); os.dup2(11, 4)
for fd in (3, 4): os.set_inheritable(fd, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


class Activation:
    """Two listening sockets, and daemons that are started with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir(mode=0o700)
        self.env = environment(folder)
        self.sockets = []
        for name in ("pagedd.sock", "control.sock"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind(str(self.run / name))
            sock.listen(4096)
            self.sockets.append(sock)

    @contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        fds = [sock.fileno() for sock in self.sockets]
        command = [sys.executable, "-c", _AS_MANAGER, *map(str, fds), "-m", "pagedd", "serve"]
        command += ["--model", "simulated", "--backend", "simulated"]
        command += ["--socket-dir", str(self.run)]
        process = subprocess.Popen(
            command, env=self.env, pass_fds=fds, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def ask(self) -> str:
        host = f"unix://{self.run}/pagedd.sock"
        with pagedd.connect("first", host=host, timeout=PATIENCE_S) as client:
            return client.complete("hello", max_tokens=3, seed=1).text

    def is_the_managers(self) -> None:
        """Whoever knocks now reaches the manager's socket, and nothing else lies around."""
        names = sorted(path.name for path in self.run.iterdir() if path.is_socket())
        assert names == ["control.sock", "pagedd.sock"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.connect(str(self.run / "pagedd.sock"))
            self.sockets[0].accept()[0].close()


@pytest.fixture
def activation() -> Iterator[Activation]:
    with tempfile.TemporaryDirectory(prefix="pagedd-") as folder:
        found = Activation(Path(folder))
        yield found
        for sock in found.sockets:
            sock.close()


def test_the_request_that_starts_the_daemon_is_answered_each_time(activation: Activation) -> None:
    for _ in range(2):
        answers: list[str] = []
        first = threading.Thread(target=lambda kept=answers: kept.append(activation.ask()))
        first.start()
        with activation.daemon() as process:
            first.join(PATIENCE_S)
            assert activation.ask() == answers[0], "and those that come later"
            process.terminate()
            process.wait(PATIENCE_S)
        activation.is_the_managers()


def test_a_daemon_that_was_killed_is_followed_by_one_that_puts_the_sockets_back(
    activation: Activation,
) -> None:
    with activation.daemon() as process:
        activation.ask()
        process.kill()
    with activation.daemon() as process:
        assert process.stderr is not None
        assert any(b" serves in " in line for line in process.stderr)
        activation.ask()
        process.terminate()
        process.wait(PATIENCE_S)
    activation.is_the_managers()


def test_sockets_of_another_directory_are_refused(activation: Activation, tmp_path: Path) -> None:
    activation.run, real = tmp_path, activation.run
    with activation.daemon() as process:
        assert process.wait(PATIENCE_S) == 78
    activation.run = real

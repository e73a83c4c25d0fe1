"""What the kernel says of the program behind a connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pagedd_daemon.front import transport
from pagedd_daemon.front.identity import UNKNOWN, Program, pin, program, scope_of
from tests.support.transport import Client, Served


@pytest.mark.parametrize(
    ("cgroup", "scope"),
    [
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-code-1234.scope\n",
            "app-code-1234.scope",
        ),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/agent.service\n",
            "agent.service",
        ),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", ""),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope/inner\n", "x.scope"),
        (
            "12:memory:/x.scope\n1:name=systemd:/system.slice/nightly.service\n0::/\n",
            "nightly.service",
        ),
        ("0::/\n", ""),
        ("", ""),
        ("no line of this form", ""),
        ("0::/../../etc.scope/..\n", "etc.scope"),
    ],
)
def test_the_scope_is_the_innermost_unit_that_was_made_for_a_program(
    cgroup: str, scope: str
) -> None:
    assert scope_of(cgroup) == scope


def test_a_living_peer_is_known_by_its_executable() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pidfd = pin(ours.fileno(), os.getpid())
        assert pidfd is not None
        try:
            found = program(os.getpid(), pidfd)
        finally:
            os.close(pidfd)
    assert found.executable == os.path.realpath(sys.executable)


def test_what_is_read_of_a_process_that_has_ended_is_not_believed(tmp_path: Path) -> None:
    """Its id may be another's by now: here a privileged one has taken it over."""
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    pidfd = os.pidfd_open(ended.pid)
    ended.wait()
    taken_over = tmp_path / str(ended.pid)
    taken_over.mkdir()
    (taken_over / "exe").symlink_to("/usr/bin/trusted")
    (taken_over / "cgroup").write_text("0::/app.slice/trusted.scope\n")
    try:
        assert program(ended.pid, pidfd, tmp_path) == UNKNOWN
    finally:
        os.close(pidfd)


def test_a_process_that_may_not_be_looked_at_has_no_executable(tmp_path: Path) -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert program(os.getpid(), pidfd, tmp_path) == Program("", "")
    finally:
        os.close(pidfd)


def test_the_pinned_process_is_the_one_that_connected_whatever_holds_its_id(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        child = subprocess.Popen([sys.executable, "-c", script, path])
        with listener.accept()[0] as connection:
            pidfd = pin(connection.fileno(), child.pid)
            assert pidfd is not None
            found = program(child.pid, pidfd)
            connection.send(b"x")
            child.wait()
            after = program(child.pid, pidfd)
            os.close(pidfd)
    assert found.executable == os.path.realpath(sys.executable)
    assert after == UNKNOWN
    assert found.label == (found.scope or found.executable)


def test_requests_sent_before_the_answer_to_hello_are_answered_after_it(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(tmp_path) as client:
        client.ask("hello", "h", app="eager")
        client.ask("models", "m1")
        client.ask("models", "m2")
        assert [client.event()["id"] for _ in range(3)] == ["h", "m1", "m2"]
        (connection,) = served.service.connections
        assert connection.program.executable == os.path.realpath(sys.executable)


def test_a_process_that_cannot_be_read_in_time_is_served_as_an_unknown_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    def hangs(pid: int, pidfd: int) -> Program:
        never.wait()
        return UNKNOWN

    monkeypatch.setattr(transport, "program", hangs)
    monkeypatch.setattr(transport, "_IDENTIFY_S", 0.05)
    try:
        with Served(tmp_path) as served, Client(tmp_path) as client:
            client.ask("hello", "h", app="stuck")
            with Client(tmp_path, "control.sock") as control:
                assert control.call("ping")["type"] == "result", "the loop waits for nobody"
            assert client.event()["id"] == "h"
            assert served.service.connections[0].program == UNKNOWN
            never.set()
    finally:
        never.set()

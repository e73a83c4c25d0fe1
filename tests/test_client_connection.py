"""How connections begin, fail and end: each with its own error, and at once."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagedd
from pagedd._wire import Wire
from tests.support.fake_daemon import FakeDaemon, Peer, Request, story


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[pagedd.Client]:
    with pagedd.connect("test", host=daemon.host, timeout=10) as connected:
        yield connected


def test_no_socket_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(pagedd.DaemonNotRunning, match="pagedd serve"):
        pagedd.connect(host=f"unix://{tmp_path}/pagedd.sock")
    with (
        pytest.raises(pagedd.DaemonNotRunning),
        pagedd.control(host=f"unix://{tmp_path}/pagedd.sock") as control,
    ):
        control.ping()


def test_a_stale_socket_is_an_error_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "pagedd.sock"))
    with pytest.raises(pagedd.DaemonNotRunning):
        pagedd.connect(host=f"unix://{tmp_path}/pagedd.sock")


def test_a_file_that_is_no_socket_is_named(tmp_path: Path) -> None:
    (tmp_path / "pagedd.sock").touch()
    with pytest.raises(pagedd.ConnectionFailed, match="is not a socket"):
        pagedd.connect(host=f"unix://{tmp_path}/pagedd.sock")


def test_a_full_queue_of_connections_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retried = threading.Semaphore(0)
    retry = Wire.retry

    def count_and_retry(wire: Wire) -> None:
        retry(wire)
        retried.release()

    monkeypatch.setattr(Wire, "retry", count_and_retry)
    connected: list[pagedd.Client] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "pagedd.sock"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                one = stack.enter_context(socket.socket(socket.AF_UNIX))
                one.setblocking(False)
                one.connect(str(tmp_path / "pagedd.sock"))
        host = f"unix://{tmp_path}/pagedd.sock"
        thread = threading.Thread(target=lambda: connected.append(pagedd.connect(host=host)))
        thread.start()
        for _ in range(3):
            assert retried.acquire(timeout=10)
        stack.enter_context(FakeDaemon(tmp_path, listener=listener))
        thread.join(timeout=10)
        assert connected[0].server.pid == 1
        connected[0].close()


def test_a_refused_user_gets_access_denied(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, admit=False) as daemon:
        with pytest.raises(pagedd.AccessDenied, match="uid"):
            pagedd.connect(host=daemon.host)
        with pagedd.control(host=daemon.host) as control, pytest.raises(pagedd.AccessDenied):
            control.status()


def test_a_daemon_that_dies_ends_streams_at_once_after_what_arrived(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    asked: list[Request] = []

    def both_in_one_message(peer: Peer, request: Request) -> None:
        asked.append(request)
        if len(asked) == 2:
            peer.events(*(event for one in asked for event in story(one, "a", "b")[:2]))

    daemon.on("generate", both_in_one_message)
    first, second = client.generate("1"), client.generate("2")
    assert next(first).text == "a"
    daemon.die()
    with pytest.raises(pagedd.ConnectionFailed):
        next(first)
    assert next(second).text == "a"
    with pytest.raises(pagedd.ConnectionFailed):
        next(second)
    with pytest.raises(pagedd.ConnectionFailed):
        client.generate("3")


def test_a_daemon_that_dies_wakes_every_waiting_thread(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    arrived = threading.Semaphore(0)
    daemon.on("generate", lambda peer, request: arrived.release())
    failures: list[str] = []

    def read(stream: pagedd.Stream) -> None:
        try:
            stream.text()
        except pagedd.ConnectionFailed as error:
            failures.append(error.code)

    threads = [threading.Thread(target=read, args=(client.generate("x"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert arrived.acquire(timeout=10)
    daemon.die()
    for thread in threads:
        thread.join(timeout=10)
    assert failures == ["E_SESSION_LOST"] * 4


def test_closing_ends_the_calls_of_other_threads(daemon: FakeDaemon) -> None:
    arrived = threading.Event()
    daemon.on("generate", lambda peer, request: arrived.set())
    client = pagedd.connect(host=daemon.host)
    failures: list[pagedd.PageddError] = []

    def read() -> None:
        try:
            client.generate("x").text()
        except pagedd.PageddError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert arrived.wait(10)
    client.close()
    thread.join(timeout=10)
    assert "was closed" in str(failures[0])
    client.close()
    with pytest.raises(pagedd.ConnectionFailed, match="was closed"):
        client.generate("y")


def test_nonsense_from_the_daemon_is_a_protocol_violation(
    daemon: FakeDaemon, client: pagedd.Client
) -> None:
    daemon.on("generate", lambda peer, request: peer.raw(b"\xc1nonsense"))
    with pytest.raises(pagedd.ProtocolViolation):
        client.complete("hi")


def test_another_protocol_version_is_named(daemon: FakeDaemon) -> None:
    daemon.on("hello", lambda peer, request: peer.raw(b"\x82\xa1v\x02\xa2ev\x90"))
    with pytest.raises(pagedd.ProtocolViolation, match="speaks protocol 2"):
        pagedd.connect(host=daemon.host)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_must_connect_anew(client: pagedd.Client) -> None:
    stream = client.generate("hi")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        codes = []
        for use in (lambda: client.generate("x"), lambda: next(stream), client.ping, stream.close):
            try:
                use()
            except pagedd.PageddError as error:
                codes.append(error.code)
        client.close()
        os.write(writing, ",".join(codes).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert answer.read() == "E_FORKED,E_FORKED,E_FORKED"
    assert os.waitpid(child, 0)[1] == 0
    assert stream.text() == "abc"


@pytest.mark.parametrize("host", ["tcp://127.0.0.1:1", "localhost:80", "unix://relative", ""])
def test_a_host_that_is_no_unix_socket_is_refused(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pagedd.ConnectionFailed, match="unix:///path") as caught:
        pagedd.connect(host=host)
    assert (caught.value.code, caught.value.retryable) == ("E_HOST", False)


def test_the_environment_names_the_socket(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEDD_HOST", daemon.host)
    with pagedd.connect() as client:
        assert client.ping()["pid"] == 1


def test_importing_the_client_imports_nothing_heavy() -> None:
    heavy = ["asyncio", "click", "numpy", "platformdirs", "psutil", "rich"]
    code = f"import pagedd, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

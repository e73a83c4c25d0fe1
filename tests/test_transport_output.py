"""What waits for clients that are slow, stopped, or gone, over real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from pagedd_daemon.front.limits import Limits
from tests.support.transport import WAIT_MS, Client, Served, connected, said


def test_a_client_that_does_not_read_is_paused_and_loses_nothing(tmp_path: Path) -> None:
    count = 40_000
    with (
        Served(tmp_path) as served,
        connected(tmp_path, RCVHWM=2) as slow,
        connected(tmp_path) as other,
    ):
        slow.ask("generate", "g", prompt="p", max_tokens=count)
        assert served.service.next_call() == ("lagging", 1, True)
        connection = served.service.connections[0]
        assert connection.lagging
        backlog = served.call(served.transport.backlog_bytes, connection)
        assert backlog > Limits().output_bytes_per_connection
        for _ in range(50):
            assert other.call("models")["type"] == "result"
        slow.ask("models", "refused")
        seen = [slow.event() for _ in range(count)]
        assert [event["seq"] for event in seen] == list(range(count))
        assert served.service.next_call() == ("lagging", 1, False)
        refusal = slow.event()
        assert (refusal["id"], refusal["code"]) == ("refused", "E_SLOW")
        assert refusal["details"]["backlog_bytes"] > 0
        assert slow.call("models")["type"] == "result"
        assert served.call(served.transport.backlog_bytes, connection) == 0


def test_a_client_that_asks_and_never_reads_is_closed(tmp_path: Path) -> None:
    limits = Limits(frame_bytes=100_000, output_bytes_per_connection=10_000)
    with (
        Served(tmp_path, limits) as served,
        connected(tmp_path) as other,
        connected(tmp_path, RCVHWM=1) as slow,
    ):
        slow.ask("generate", "g", prompt="p", max_tokens=200_000)
        assert served.service.next_call() == ("lagging", 2, True)
        assert served.service.next_call() == ("closed", 2)
        connection = served.service.connections[1]
        assert served.call(served.transport.backlog_bytes, connection) == 0
        assert other.call("models")["type"] == "result"


CHILD = """
import os, sys
from pathlib import Path
from tests.support.transport import Client
client = Client(Path(sys.argv[1]))
client.sock.set(__import__("zmq").RCVTIMEO, -1)
client.hello("child")
print("ready", flush=True)
mode, count = sys.argv[2], int(sys.argv[3])
if mode == "fork":
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    print("forked", flush=True)
client.ask("generate", "g", prompt="p", max_tokens=max(count, 1))
for seq in range(count):
    assert client.event()["seq"] == seq
print("all", count, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def child(path: Path, mode: str = "plain", count: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, path, mode, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as process:
        try:
            assert said(process) == "ready"
            yield process
        finally:
            process.kill()


def test_a_stopped_client_goes_on_where_it_was(tmp_path: Path) -> None:
    with Served(tmp_path) as served, connected(tmp_path) as other:
        with child(tmp_path, count=60_000) as stopped:
            stopped.send_signal(signal.SIGSTOP)
            for _ in range(20):
                assert other.call("models")["type"] == "result"
            stopped.send_signal(signal.SIGCONT)
            assert said(stopped) == "all 60000"
        while served.service.next_call() != ("closed", 2):
            pass


def test_a_killed_client_is_closed(tmp_path: Path) -> None:
    with Served(tmp_path) as served, child(tmp_path) as killed:
        assert served.service.connections[0].pid == killed.pid
        killed.kill()
        assert served.service.next_call() == ("closed", 1)


def test_a_dead_client_is_closed_though_its_child_holds_the_connection(tmp_path: Path) -> None:
    with Served(tmp_path) as served, child(tmp_path, "fork") as dead:
        assert said(dead) == "forked"
        os.kill(dead.pid, signal.SIGKILL)
        assert served.service.next_call() == ("closed", 1)
        assert dead.stdin is not None
        dead.stdin.close()


def test_a_connection_that_goes_without_bye_is_closed_once(tmp_path: Path) -> None:
    with Served(tmp_path) as served, connected(tmp_path) as other:
        for number in range(2, 8):
            with connected(tmp_path) as client:
                client.ask("generate", prompt="p", max_tokens=5)
            assert served.service.next_call() == ("closed", number)
        connection = served.service.connections[1]
        served.call(served.service.send, connection, {"id": "late", "seq": 0, "type": "done"})
        assert other.call("models")["type"] == "result"
        assert served.service.calls.empty()


def test_a_client_that_gives_no_sign_of_life_is_closed(tmp_path: Path) -> None:
    limits = Limits(heartbeat_ms=100, silence_ms=400)
    with Served(tmp_path, limits) as served, connected(tmp_path) as other, child(tmp_path) as gone:
        gone.send_signal(signal.SIGSTOP)
        assert served.service.next_call() == ("closed", 2)
        assert other.call("models")["type"] == "result"


class Unlooked:
    """A ZeroMQ socket that takes every queue for full until it is asked for its events."""

    def __init__(self, sock: zmq.Socket[bytes]) -> None:
        self._sock = sock
        self._looked = False

    def send(self, data: bytes, flags: int) -> None:
        if flags & zmq.SNDMORE and not self._looked:
            raise zmq.Again
        self._looked = False
        self._sock.send(data, flags)

    def get(self, option: int) -> int | bytes | str:
        self._looked |= option == zmq.EVENTS
        return self._sock.get(option)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_no_answer_is_lost_to_a_queue_that_only_seems_full(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(tmp_path, "control.sock") as control:
        router = served.transport._control
        served.call(setattr, router, "_sock", Unlooked(router._sock))
        for at in range(20):
            assert control.call("ping", f"p{at}")["id"] == f"p{at}"


def test_stopping_delivers_what_waits(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(tmp_path, RCVHWM=2) as client:
        client.hello()
        client.ask("generate", prompt="p", max_tokens=20_000)
        assert served.service.next_call() == ("lagging", 1, True)
        stopping = threading.Thread(target=served.stop, args=[WAIT_MS / 1000])
        stopping.start()
        assert [client.event()["seq"] for _ in range(20_000)] == list(range(20_000))
        stopping.join()

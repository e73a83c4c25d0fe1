"""The transport over real sockets: who is let in, bad input, other daemons, descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from pagedd_daemon.front import requests as r
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import Limits, as_map
from pagedd_daemon.front.listener import AlreadyRunning, SocketPathError, open_descriptors
from pagedd_daemon.front.ports import Connection
from tests.support.transport import WAIT_MS, Client, RecordingService, Served, connected, said


def request(verb: str, id: str = "q", **fields: Any) -> bytes:
    packed: bytes = msgpack.packb({"v": 1, "verb": verb, "id": id, **fields})
    return packed


# ------------------------------------------------------------------------------------------ opening


def test_hello_opens_a_connection(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(tmp_path) as client:
        answer = client.hello("my-editor", priority="interactive", client="raw/1")
        (connection,) = served.service.connections
        assert answer["token"] == connection.token
        assert len(connection.token) == 16
        assert answer["pid"] == os.getpid()
        assert answer["limits"] == as_map(Limits())
        assert answer["server"] == "test"
        assert (connection.app, connection.priority) == ("my-editor", "interactive")
        assert (connection.uid, connection.pid) == (os.geteuid(), os.getpid())


def test_the_first_message_is_hello_and_no_other_is(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(tmp_path) as client:
        assert client.call("models")["code"] == "E_HELLO"
        client.hello()
        again = client.call("hello", "again", app="other")
        assert (again["id"], again["code"]) == ("again", "E_HELLO")
        assert client.call("models")["type"] == "result"
        assert [c.app for c in served.service.connections] == ["test"]


def test_bye_ends_a_connection_and_hello_may_follow(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(tmp_path) as client:
        client.hello()
        assert client.call("bye", "b") == {"id": "b", "seq": 0, "type": "result"}
        assert served.service.next_call() == ("closed", 1)
        assert client.call("models")["code"] == "E_HELLO"
        client.hello()
        assert [c.number for c in served.service.connections] == [1, 2]
        assert served.service.calls.empty()


def test_connections_are_limited(tmp_path: Path) -> None:
    with Served(tmp_path, Limits(connections=2)) as served, connected(tmp_path):
        with connected(tmp_path), Client(tmp_path) as third:
            answer = third.call("hello", app="a")
            assert (answer["code"], answer["details"]["limit"]) == ("E_LIMIT", "connections")
        assert served.service.next_call() == ("closed", 2)
        with connected(tmp_path) as client:
            assert client.call("models")["type"] == "result"


def test_what_the_service_refuses_is_answered(tmp_path: Path) -> None:
    def refuse(connection: Connection, request: r.DataRequest) -> None:
        if isinstance(request, r.Unload):
            raise KeyError("a defect")
        raise WireError("E_BUSY", "too much", details={"limit": 5})

    with Served(tmp_path, service=RecordingService(on_request=refuse)), connected(tmp_path) as c:
        answer = c.call("models", "m")
        assert (answer["id"], answer["code"], answer["retryable"]) == ("m", "E_BUSY", True)
        assert answer["details"] == {"limit": 5}
        assert (c.call("unload", "u")["code"], c.call("models")["code"]) == ("E_INTERNAL", "E_BUSY")


# ------------------------------------------------------------------------------------------ control


def test_a_token_names_its_connection_on_the_control_socket(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(tmp_path, "control.sock") as control:
        assert control.call("ping", "p")["for"] is None
        with Client(tmp_path) as client:
            token = client.hello()["token"]
            assert control.call("cancel", token=token, target="x")["for"] == 1
            wrong = bytes([token[0] ^ 1]) + token[1:]
            assert control.call("cancel", token=wrong, target="x")["code"] == "E_TOKEN"
            assert control.call("models")["details"]["socket"] == "pagedd.sock"
            served.service.connections[0].uid += 1
            assert control.call("cancel", token=token, target="x")["code"] == "E_TOKEN"
        assert served.service.next_call() == ("closed", 1)
        assert control.call("cancel", token=token, target="x")["code"] == "E_TOKEN"


def test_a_control_request_counts_though_its_client_is_gone(tmp_path: Path) -> None:
    class Listening(RecordingService):
        def control(self, uid: int, request: r.ControlRequest, *rest: Any) -> None:
            self.calls.put((request.verb, request.id))

    with Served(tmp_path, service=Listening()) as served:
        for number in range(5):
            with Client(tmp_path, "control.sock") as client:
                client.ask("shutdown", str(number))
                client.sock.close(WAIT_MS)
            assert served.service.next_call() == ("shutdown", str(number))


# ----------------------------------------------------------------------- bad input on a live daemon


class Stream:
    """A stream that must go on, whatever happens beside it."""

    def __init__(self, served: Served, client: Client) -> None:
        self.served, self.client = served, client
        self.connection = served.service.connections[-1]
        self.seq = 0

    def goes_on(self) -> None:
        event = {"id": "stream", "seq": self.seq, "type": "chunk", "text": "x"}
        self.served.call(self.served.service.send, self.connection, event)
        assert self.client.event() == event
        self.seq += 1


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[Stream]:
    limits = Limits(frame_bytes=100_000, string_bytes=50_000)
    with Served(tmp_path, limits) as served, connected(tmp_path) as client:
        stream = Stream(served, client)
        stream.goes_on()
        yield stream
        stream.goes_on()


START = b"\x82\xa2id\xa2me\xa1a"
"""A map that has said its id and goes on with the value of ``a``."""

BAD: dict[str, tuple[bytes, str, str]] = {
    "not msgpack": (b"\xc1\xc1", "E_MALFORMED", ""),
    "empty": (b"", "E_MALFORMED", ""),
    "not a map": (b"\x01", "E_MALFORMED", ""),
    "truncated": (request("models", "me")[:-1], "E_MALFORMED", ""),
    "trailing bytes": (request("models", "me") + b"\x00", "E_MALFORMED", "me"),
    "not UTF-8": (START + b"\xa2\xff\xff", "E_MALFORMED", "me"),
    "amplifying": (START + b"\xdc\x40\x00" + b"\x93\x80\x80\x80" * 16384, "E_LIMIT", "me"),
    "too deep": (START + b"\x91" * 1000 + b"\xc0", "E_MALFORMED", "me"),
    "same key twice": (b"\x82\xa2id\xa2me\xa2id\xa2me", "E_MALFORMED", "me"),
    "another version": (msgpack.packb({"v": 9, "verb": "models", "id": "me"}), "E_VERSION", "me"),
    "unknown verb": (request("modles", "me"), "E_VERB", "me"),
    "unknown field": (request("models", "me", x=1), "E_FIELD", "me"),
    "wrong type": (request("generate", "me", prompt="p", n="1"), "E_FIELD", "me"),
    "NaN": (request("generate", "me", prompt="p", temperature=float("nan")), "E_FIELD", "me"),
    "out of range": (request("generate", "me", prompt="p", top_p=1.5), "E_FIELD", "me"),
    "empty prompt": (request("generate", "me", prompt=""), "E_FIELD", "me"),
    "n over its cap": (request("generate", "me", prompt="p", n=17), "E_LIMIT", "me"),
    "logprobs over its cap": (request("generate", "me", prompt="p", logprobs=21), "E_LIMIT", "me"),
    "stop over its cap": (request("generate", "me", prompt="p", stop=["a"] * 17), "E_LIMIT", "me"),
    "string over its cap": (request("tokenize", "me", text="x" * 50_001), "E_LIMIT", "me"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_and_disturbs_nobody(
    tmp_path: Path, stream: Stream, name: str
) -> None:
    data, code, id = BAD[name]
    with connected(tmp_path) as bad:
        for _ in range(3):
            bad.send(data)
            answer = bad.event()
            assert (answer["type"], answer["code"], answer["id"]) == ("error", code, id)
            stream.goes_on()
        assert bad.call("models")["type"] == "result"
    with Client(tmp_path, "control.sock") as control:
        control.send(data)
        assert control.event()["type"] == "error"
        assert control.call("ping")["type"] == "result"


def test_many_frames_are_refused_and_not_kept(tmp_path: Path, stream: Stream) -> None:
    with connected(tmp_path) as bad:
        for _ in range(2):
            bad.send(*[b"x" * 1000] * 20_000)
            assert bad.event()["code"] == "E_MALFORMED"
            stream.goes_on()
        assert bad.call("models")["type"] == "result"


def test_a_frame_at_the_limit_is_taken_and_one_beyond_closes_its_connection(
    tmp_path: Path, stream: Stream
) -> None:
    with connected(tmp_path) as bad:
        # Both are refused for what is in them, the first by an answer.
        bad.send(b"\x81\xa2id".ljust(100_000, b"\xc0"))
        assert bad.event()["code"] == "E_MALFORMED"
        stream.goes_on()
        bad.send(b"\x81\xa2id".ljust(100_001, b"\xc0"))
        assert stream.served.service.next_call() == ("closed", 2)


# -------------------------------------------------------------------------- other daemons and files


def test_a_second_transport_is_refused_and_the_first_goes_on(
    tmp_path: Path, stream: Stream
) -> None:
    with pytest.raises(AlreadyRunning) as caught, Served(tmp_path):
        pass
    assert caught.value.pid == os.getpid()
    stream.goes_on()
    with connected(tmp_path) as client:
        assert client.call("models")["type"] == "result"


@pytest.mark.parametrize("name", ["pagedd.sock", "control.sock"])
def test_a_file_in_place_of_a_socket_is_kept_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(SocketPathError, match=name), Served(tmp_path):
        pass
    assert (tmp_path / name).read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {name, "pagedd.lock"}


def test_a_stopped_transport_leaves_room_for_the_next(tmp_path: Path) -> None:
    for _ in range(3):
        with Served(tmp_path), connected(tmp_path) as client:
            assert client.call("models")["type"] == "result"
    assert {path.name for path in tmp_path.iterdir()} == {"pagedd.lock"}


# -------------------------------------------------------------------------------------- descriptors

DAEMON = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pathlib import Path
from pagedd_daemon.front.limits import Limits
from tests.support.transport import Served
with Served(Path(sys.argv[1]), Limits(handshake_ms=200)):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def small_daemon(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A transport in a process that may open 256 descriptors."""
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as process:
        assert said(process) == "ready"
        try:
            yield process
            assert process.poll() is None
        finally:
            process.communicate()
    assert process.returncode == 0


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_two_thousand_connections_at_256_descriptors_are_survived(tmp_path: Path) -> None:
    with small_daemon(tmp_path) as daemon, connected(tmp_path) as early:
        made: list[socket.socket] = []

        def connect(name: str) -> None:
            # Blocks while the kernel's queue is full, until the daemon accepts again.
            for _ in range(250):
                sock = socket.socket(socket.AF_UNIX)
                made.append(sock)
                sock.connect(os.fspath(tmp_path / name))

        threads = [
            threading.Thread(target=connect, args=[name])
            for name in ("pagedd.sock", "control.sock")
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        assert early.call("models")["type"] == "result"
        for thread in threads:
            thread.join()
        assert len(made) == 2000
        assert daemon.poll() is None
        for sock in made:
            sock.close()
        assert early.call("models")["type"] == "result"
        with connected(tmp_path) as late:
            assert late.call("models")["type"] == "result"


@pytest.mark.usefixtures("many_descriptors")
def test_clients_beyond_the_descriptors_wait_for_their_turn(tmp_path: Path) -> None:
    with small_daemon(tmp_path):
        clients = [Client(tmp_path) for _ in range(300)]
        for client in clients:
            client.ask("hello", "h", app="one-of-many")
        # Each leaves once it was served, which makes room for those that wait.
        poller = zmq.Poller()
        waiting = {client.sock: client for client in clients}
        for sock in waiting:
            poller.register(sock, zmq.POLLIN)
        while waiting:
            ready = poller.poll(WAIT_MS)
            assert ready, f"{len(waiting)} clients were never served"
            for sock, _ in ready:
                client = waiting.pop(sock)
                assert client.event()["type"] == "result"
                poller.unregister(sock)
                client.close()


def test_what_clients_took_is_given_back_when_they_are_gone(tmp_path: Path) -> None:
    with Served(tmp_path) as served, connected(tmp_path) as stays:
        before = served.call(open_descriptors)
        for _ in range(20):
            with connected(tmp_path), Client(tmp_path, "control.sock") as control:
                assert control.call("ping")["type"] == "result"
        # Unused listening sockets are taken back with a delay; the test's own limit bounds this.
        while served.call(open_descriptors) > before:
            threading.Event().wait(0.1)
        assert stays.call("models")["type"] == "result"

"""Who is let in, and that a daemon whose authentication is broken does not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import zmq

from pagedd_daemon.front import router
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.auth import DOMAIN, AuthenticationBroken, Authenticator, Credentials
from pagedd_daemon.front.limits import Limits
from pagedd_daemon.front.transport import ZmqTransport
from tests.support.transport import WAIT_MS, Client, Served, connected

UID = os.geteuid()


def asked(
    address: bytes = f"localhost:{UID}:5:77".encode(),
    version: bytes = b"1.0",
    domain: bytes = DOMAIN,
    mechanism: bytes = b"NULL",
) -> list[bytes]:
    return [version, b"7", domain, address, b"", mechanism]


def test_our_own_user_is_let_in_under_its_credentials() -> None:
    answer = Authenticator().answer(asked())
    assert answer == [b"1.0", b"7", b"200", b"OK", f"{UID}:5:77".encode(), b""]


@pytest.mark.parametrize(
    "request_",
    [
        asked(address=f"localhost:{UID + 1}:5:77".encode()),
        asked(address=b"localhost:65534:65534:77"),
        asked(address=b"127.0.0.1"),
        asked(address=b""),
        asked(address=b"localhost"),
        asked(address=b"localhost:::"),
        asked(address=f"localhost:{UID}:5".encode()),
        asked(address=f"elsewhere:{UID}:5:77".encode()),
        asked(domain=b""),
        asked(domain=b"other"),
        asked(mechanism=b"PLAIN"),
        asked(version=b"2.0"),
        asked()[:4],
        [],
    ],
)
def test_everybody_else_is_refused(request_: list[bytes]) -> None:
    authenticator = Authenticator()
    answer = authenticator.answer(request_)
    assert answer[2] in (b"400", b"500")
    assert answer[4] == b""
    assert authenticator.refusals == 1


def test_the_overflow_user_is_refused_even_by_its_own_daemon() -> None:
    nobody = Authenticator(Access(owner=65534))
    assert not nobody.allows(Credentials(65534, 65534, 1))


def test_a_refused_client_can_see_it_in_its_monitor(tmp_path: Path) -> None:
    with Served(tmp_path) as served:
        served.call(served.transport._authenticator.refused_pids.add, os.getpid())
        with Client(tmp_path / "nothing") as client:
            monitor = client.sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
            client.sock.connect(f"ipc://{tmp_path / 'pagedd.sock'}")
            assert monitor.poll(WAIT_MS)
            client.sock.disable_monitor()
            monitor.close(0)
        served.call(served.transport._authenticator.refused_pids.clear)
        with connected(tmp_path) as client:
            assert client.call("models")["type"] == "result"


@pytest.mark.parametrize("name", ["pagedd.sock", "control.sock"])
def test_a_chosen_identity_is_refused(tmp_path: Path, name: str) -> None:
    with Served(tmp_path) as served:
        for identity in (b"me", b"\xffx", b"x" * 255):
            with Client(tmp_path, name, IDENTITY=identity) as client:
                verb = "ping" if name == "control.sock" else "hello"
                answer = client.call(verb, **({} if verb == "ping" else {"app": "a"}))
                assert (answer["type"], answer["code"]) == ("error", "E_HELLO")
        assert served.service.connections == []


def test_a_squatted_identity_takes_nothing_from_its_owner(tmp_path: Path) -> None:
    with Served(tmp_path), connected(tmp_path) as owner:
        with Client(tmp_path, IDENTITY=b"x") as first:
            assert first.call("hello", app="a")["type"] == "error"
            # Only now: of two that connect at once, either may be first.
            with Client(tmp_path, IDENTITY=b"x") as second:
                second.ask("hello", app="a")
                assert owner.call("models")["type"] == "result"
        assert owner.call("models")["type"] == "result"


QUICK = Limits(handshake_ms=300)


def start_broken(path: Path) -> None:
    with pytest.raises(AuthenticationBroken), Served(path, QUICK):
        pass
    assert not (path / "pagedd.sock").exists()
    assert not (path / "control.sock").exists()


def test_a_daemon_that_lets_everybody_in_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Authenticator, "allows", lambda self, peer: True)
    start_broken(tmp_path)


def test_a_daemon_whose_handler_is_not_asked_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unprotected(sock: Any, handshake_ms: int) -> None:
        sock.set(zmq.HANDSHAKE_IVL, handshake_ms)

    monkeypatch.setattr(router, "protect", unprotected)
    start_broken(tmp_path)


def test_a_daemon_whose_handler_is_dead_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(self: ZmqTransport) -> None:
        self._zap.recv_multipart()

    monkeypatch.setattr(ZmqTransport, "_authenticate", deaf)
    start_broken(tmp_path)

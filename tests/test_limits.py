"""Every limit of the daemon's one table holds: what is at it is served, one beyond is refused."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from pagedd_daemon.front import requests as r
from pagedd_daemon.front import wire
from pagedd_daemon.front.auth import Credentials
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits, names
from pagedd_daemon.front.rates import PIECE_BYTES, Rates
from tests.support.front import Front, begun, ready, run
from tests.support.transport import WAIT_MS, Client, Served, connected

TURN = {"role": "user", "content": "x"}


def generate(**fields: Any) -> dict[str, Any]:
    return {"v": 1, "verb": "generate", "id": "g", "prompt": "p", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"v": 1, "verb": "chat", "id": "c", "messages": [TURN], **fields}


def nested(levels: int) -> dict[str, Any]:
    inner: Any = 1
    for _ in range(levels - 2):  # the message and template_args are the first two
        inner = [inner]
    return chat(template_args={"a": inner})


def nodes(count: int) -> dict[str, Any]:
    """A message of so many values, keys included: itself, five pairs, and a list's."""
    message = generate(stop_token_ids=[])
    return {**message, "stop_token_ids": [1] * (count - 1 - 2 * len(message))}


def padded(size: int) -> dict[str, Any]:
    message = generate(prompt="p" * size)
    over = len(msgpack.packb(message)) - size
    return generate(prompt="p" * (size - over))


IN_A_MESSAGE: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    # Limit -> the value it is tested at, and a message that has so much of it.
    "frame_bytes": (90_000, padded),
    "depth": (6, nested),
    "map_entries": (20, lambda n: chat(template_args={f"k{i}": 1 for i in range(n)})),
    "list_entries": (20, lambda n: generate(stop_token_ids=[1] * n)),
    "string_bytes": (500, lambda n: generate(prompt="p" * n)),
    "binary_bytes": (400, lambda n: generate(prompt=None, tokens=bytes(n))),
    "total_nodes": (40, nodes),
    "id_chars": (10, lambda n: generate(id="i" * n)),
    "app_chars": (10, lambda n: {"v": 1, "verb": "hello", "id": "h", "app": "a" * n}),
    "samples": (5, lambda n: generate(n=n)),
    "best_of": (5, lambda n: generate(best_of=n)),
    "beam_width": (5, lambda n: generate(beam_width=n)),
    "logprobs": (5, lambda n: generate(logprobs=n)),
    "stop_strings": (5, lambda n: generate(stop=["x"] * n)),
    "stop_string_bytes": (11, lambda n: generate(stop=["é" * (n // 2) + "e" * (n % 2)])),
    "stop_token_ids": (5, lambda n: generate(stop_token_ids=[1] * n)),
    "embed_inputs": (5, lambda n: {"v": 1, "verb": "embed", "id": "e", "texts": ["x"] * n}),
    "grammar_bytes": (60, lambda n: generate(regex="a" * n)),
    "logit_bias": (5, lambda n: generate(logit_bias=dict.fromkeys(range(n), 1.0))),
    "messages": (5, lambda n: chat(messages=[TURN] * n)),
    "tools": (5, lambda n: chat(tools=[{}] * n)),
}
ELSEWHERE = {
    "frames": "test_a_message_is_one_frame",
    "handshake_ms": "test_a_connection_that_shakes_no_hands_is_closed",
    "messages_per_s": "test_a_process_sends_so_many_messages_at_once_and_a_second",
    "messages_per_s_per_user": "test_processes_of_a_user_send_so_many_messages_together",
    "message_burst": "test_a_process_sends_so_many_messages_at_once_and_a_second",
    "sessions_per_connection": "test_sessions_of_one_connection_and_of_all",
    "sessions_total": "test_sessions_of_one_connection_and_of_all",
    "requests_per_connection": "test_requests_of_one_connection_and_of_all",
    "requests_total": "test_requests_of_one_connection_and_of_all",
    "request_bytes_total": "test_texts_of_live_requests_share_a_budget",
    "connections_per_user": "test_so_many_connections_may_say_hello",
    "connections": "test_so_many_connections_may_say_hello",
    "output_bytes_per_connection": "test_what_waits_for_clients_that_do_not_read",
    "output_bytes_per_user": "test_what_waits_for_clients_that_do_not_read",
    "output_bytes_total": "test_what_waits_for_clients_that_do_not_read",
    "remembered_requests": "test_so_many_finished_requests_are_remembered",
    "remembered_bytes": "test_events_of_finished_requests_share_a_budget",
}
IN_SHARED = {
    "sessions_per_user": "test_sessions_of_a_user_at_its_limit",
    "requests_per_user": "test_requests_of_a_user_at_its_limit",
    "request_bytes_per_user": "test_texts_of_a_user_at_its_limit",
    "remembered_bytes_per_user": "test_remembered_events_of_a_user",
}
"""In `test_shared.py`, beside other users."""
IN_TRANSPORT_OUTPUT = {"heartbeat_ms", "silence_ms"}
"""Times of libzmq's own: `test_transport_output.py` has a client that is stopped."""


def test_every_limit_of_the_table_is_tested() -> None:
    elsewhere = ELSEWHERE.keys() | IN_SHARED.keys() | IN_TRANSPORT_OUTPUT
    assert IN_A_MESSAGE.keys() | elsewhere == set(names())
    shared = (Path(__file__).parent / "test_shared.py").read_text()
    assert all(f"def {test}" in shared for test in IN_SHARED.values())
    assert set(ELSEWHERE.values()) <= set(globals())
    assert "silence_ms=" in (Path(__file__).parent / "test_transport_output.py").read_text()


def parsed(message: dict[str, Any], limits: Limits) -> Any:
    return wire.parse_data(wire.decode([msgpack.packb(message)], limits), limits)


@pytest.mark.parametrize("name", IN_A_MESSAGE)
def test_a_message_may_have_as_much_as_the_limit_and_not_one_more(name: str) -> None:
    most, make = IN_A_MESSAGE[name]
    limits = replace(DEFAULT_LIMITS, **{name: most})
    parsed(make(most), limits)
    step = 4 if name == "binary_bytes" else 1  # token ids have four bytes
    with pytest.raises(WireError) as refused:
        parsed(make(most + step), limits)
    assert refused.value.code in ("E_LIMIT", "E_MALFORMED")
    assert (refused.value.details["limit"], refused.value.details["max"]) == (name, most)


def test_a_message_is_one_frame() -> None:
    frame = msgpack.packb(generate())
    wire.decode([frame], DEFAULT_LIMITS)
    for frames in ([], [frame, frame]):
        with pytest.raises(WireError) as refused:
            wire.decode(frames, DEFAULT_LIMITS)
        assert refused.value.details["limit"] == "frames"


# ----------------------------------------------------------------------------------- the service


def test_sessions_of_one_connection_and_of_all() -> None:
    async def scenario() -> None:
        limits = replace(DEFAULT_LIMITS, sessions_per_connection=2, sessions_total=3)
        async with Front(limits=limits) as front:
            first, second = front.connect(), front.connect()
            opened = [await first.end(first.ask(r.SessionOpen)) for _ in range(2)]
            assert [end["type"] for end in opened] == ["result"] * 2
            end = await first.end(first.ask(r.SessionOpen))
            assert end["details"] == {"limit": "sessions_per_connection", "value": 3, "max": 2}
            assert (await second.end(second.ask(r.SessionOpen)))["type"] == "result"
            end = await second.end(second.ask(r.SessionOpen))
            assert end["details"] == {"limit": "sessions_total", "value": 4, "max": 3}
            await first.end(first.ask(r.SessionClose, session=opened[0]["session"]))
            assert (await second.end(second.ask(r.SessionOpen)))["type"] == "result"
            front.service.closed(first.connection)
            front.service.closed(second.connection)
            third = front.connect()
            assert (await third.end(third.ask(r.SessionOpen)))["type"] == "result"

    run(scenario())


def test_requests_of_one_connection_and_of_all() -> None:
    async def scenario() -> None:
        limits = replace(DEFAULT_LIMITS, requests_per_connection=2, requests_total=3)
        async with Front(limits=limits) as front:
            client, engine = await ready(front)
            first, rid = await begun(client, engine)
            await begun(client, engine)
            end = await client.end(client.generate())
            assert (end["code"], end["details"]["limit"]) == ("E_BUSY", "requests_per_connection")
            other = front.connect()
            await begun(other, engine)
            end = await other.end(other.generate())
            assert (end["code"], end["details"]["limit"]) == ("E_BUSY", "requests_total")
            engine.close_request(rid)
            await client.end(first)
            await begun(other, engine)

    run(scenario())


def test_texts_of_live_requests_share_a_budget() -> None:
    async def scenario() -> None:
        size = 4 * 100  # of token ids
        limits = replace(DEFAULT_LIMITS, request_bytes_total=2 * size + 40)
        async with Front(limits=limits) as front:
            client, engine = await ready(front)
            first, rid = await begun(client, engine, tokens="x" * 100, id="a")
            await begun(front.connect(), engine, tokens="x" * 100, id="b")
            end = await client.end(client.generate("x" * 100, id="c"))
            assert (end["code"], end["retryable"]) == ("E_BUSY", True)
            assert end["details"]["limit"] == "request_bytes_total"
            engine.close_request(rid)
            await client.end(first)
            await begun(client, engine, tokens="x" * 100, id="d")

    run(scenario())


async def _finished(front: Front, count: int, size: int) -> list[str]:
    """Requests of the only client's that are over, each with an event of so many bytes."""
    client, engine = await ready(front)
    done = []
    for at in range(count):
        request, rid = await begun(client, engine, id=f"q{at}")
        engine.write(rid, "w" * size)
        engine.close_request(rid)
        await client.end(request)
        done.append(request)
    return done


def test_so_many_finished_requests_are_remembered() -> None:
    async def scenario() -> None:
        # The load that `ready` asks for is the first of them.
        async with Front(limits=replace(DEFAULT_LIMITS, remembered_requests=2)) as front:
            first, second, third = await _finished(front, 3, 5)
            (client,) = [front.transport.events[c] for c in front.transport.events]
            (peer,) = front.service._calls.peers.values()
            assert list(peer.answered) == [second, third]
            assert first not in peer.answered
            assert client

    run(scenario())


def test_events_of_finished_requests_share_a_budget() -> None:
    async def scenario() -> None:
        limits = replace(DEFAULT_LIMITS, remembered_bytes=2 * 5600)
        async with Front(limits=limits) as front:
            await _finished(front, 3, 1000)
            (peer,) = front.service._calls.peers.values()
            kept = [name for name, answer in peer.answered.items() if not answer.journal.forgotten]
            assert kept == ["q1", "q2"]
            front.service.request(
                peer.connection, r.Generate(id="q0", tokens=peer_tokens(), max_tokens=256)
            )
            last = front.transport.events[peer.connection][-1]
            assert last["details"] == {"limit": "remembered_bytes", "max": 2 * 5600}

    run(scenario())


def peer_tokens() -> bytes:
    """What `Client.generate` asks about if nothing else is said."""
    return b"".join(ord(c).to_bytes(4, "little") for c in "abc")


# --------------------------------------------------------------------------------- the transport


def test_a_process_sends_so_many_messages_at_once_and_a_second() -> None:
    now = 0.0
    limits = replace(DEFAULT_LIMITS, messages_per_s=10, message_burst=20)
    rates = Rates(limits, lambda: now)
    one, other = Credentials(1, 1, 7), Credentials(1, 1, 8)
    for _ in range(20):
        rates.spend(one, 100)
    with pytest.raises(WireError) as refused:
        rates.spend(one, 100)
    assert refused.value.code == "E_BUSY"
    assert refused.value.details == {
        "limit": "messages_per_s", "max": 10, "burst": 20, "retry_ms": 101,
    }  # fmt: skip
    rates.spend(other, 100)
    now = 1.0
    for _ in range(10):
        rates.spend(one, 100)
    with pytest.raises(WireError):
        rates.spend(one, 100)
    now = 100.0
    rates.spend(one, 18 * PIECE_BYTES)  # counts as 19
    rates.spend(one, 0)
    with pytest.raises(WireError):
        rates.spend(one, 0)


def test_processes_of_a_user_send_so_many_messages_together() -> None:
    now = 0.0
    rates = Rates(replace(DEFAULT_LIMITS, messages_per_s_per_user=10), lambda: now)
    for pid in range(20):
        rates.spend(Credentials(1, 1, pid), 100)
    with pytest.raises(WireError) as refused:
        rates.spend(Credentials(1, 1, 99), 100)
    assert refused.value.details == {
        "limit": "messages_per_s_per_user", "max": 10, "burst": 20, "retry_ms": 101,
    }  # fmt: skip
    rates.spend(Credentials(2, 1, 100), 100)  # another user
    now = 1.0
    for pid in range(10):
        rates.spend(Credentials(1, 1, pid), 100)
    with pytest.raises(WireError):
        rates.spend(Credentials(1, 1, 99), 100)


def test_one_that_floods_is_answered_by_its_ids_and_others_are_served(tmp_path: Path) -> None:
    limits = replace(DEFAULT_LIMITS, messages_per_s=1, message_burst=5)
    with Served(tmp_path, limits), connected(tmp_path) as client:
        for at in range(4):
            assert client.call("models", f"q{at}")["type"] == "result"
        refused = client.call("models", "late")
        assert (refused["id"], refused["code"]) == ("late", "E_BUSY")
        with Client(tmp_path, "control.sock") as control:
            # The same process: what it was let in with can be taken back.
            assert control.call("ping", "p")["type"] == "result"
            answers = [control.call("ping", f"p{at}") for at in range(50)]
            assert "E_BUSY" in {answer.get("code") for answer in answers}


@pytest.mark.parametrize("limit", ["connections", "connections_per_user"])
def test_so_many_connections_may_say_hello(tmp_path: Path, limit: str) -> None:
    with (
        Served(tmp_path, replace(DEFAULT_LIMITS, **{limit: 2})) as served,
        connected(tmp_path),
        Client(tmp_path) as third,
    ):
        with connected(tmp_path):
            answer = third.call("hello", app="third")
            assert (answer["code"], answer["details"]["limit"]) == ("E_LIMIT", limit)
        assert served.service.next_call() == ("closed", 2)
        assert third.call("hello", app="third")["type"] == "result"


def test_a_connection_that_shakes_no_hands_is_closed(tmp_path: Path) -> None:
    with (
        Served(tmp_path, replace(DEFAULT_LIMITS, handshake_ms=300)),
        contextlib.closing(socket.socket(socket.AF_UNIX)) as mute,
        connected(tmp_path) as other,
    ):
        mute.settimeout(WAIT_MS / 1000)
        mute.connect(str(tmp_path / "pagedd.sock"))
        while mute.recv(4096):  # libzmq's greeting, and then the end
            pass
        assert other.call("models")["type"] == "result"


@pytest.mark.parametrize("limit", ["output_bytes_per_user", "output_bytes_total"])
def test_what_waits_for_clients_that_do_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Beyond its own limit a client is paused; beyond that of all, the worst of them is closed."""
    limits = replace(DEFAULT_LIMITS, output_bytes_per_connection=1000, **{limit: 2500})
    with (
        Served(tmp_path, limits) as served,
        connected(tmp_path) as reads,
        connected(tmp_path),
        connected(tmp_path),
    ):
        transport, (_, one, two) = served.transport, served.service.connections
        address = transport._data.address
        full = {transport._peers.by_number[connection.number].route for connection in (one, two)}

        def refuse(route: bytes) -> None:
            if route in full:  # as if they left their queues unread, to the byte
                raise zmq.Again
            address(route)

        monkeypatch.setattr(transport._data, "address", refuse)

        def wait_for(connection: Any, size: int) -> None:
            """Have so much wait for a client."""
            event = {"id": "x", "seq": 0, "type": "chunk", "text": ""}
            missing = size - transport.backlog_bytes(connection) - len(wire.pack_event(event))
            transport.send(
                connection, {**event, "text": "x" * (missing - (2 if missing > 255 else 1))}
            )
            transport.flush()

        served.call(wait_for, one, 1000)
        assert served.call(transport.backlog_bytes, one) == 1000
        assert not one.lagging
        served.call(wait_for, one, 1100)
        assert served.service.next_call() == ("lagging", one.number, True)
        served.call(wait_for, two, 1400)
        assert served.service.next_call() == ("lagging", two.number, True)
        assert served.call(transport.backlog_bytes, two) == 1400
        served.call(wait_for, two, 1500)
        assert served.service.next_call() == ("closed", two.number)
        assert reads.call("models")["type"] == "result"
        assert served.call(transport.backlog_bytes, one) == 1100

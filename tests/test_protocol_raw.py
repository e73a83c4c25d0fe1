"""A client written from docs/protocol.md alone, with pyzmq and msgpack, against the real daemon.

Nothing of pagedd is imported below, but for the fixture that starts the daemon.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from tests.support.daemon import RunningDaemon, running_daemon

PATIENCE_MS = 30_000

Event = dict[str, Any]


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


class Raw:
    """One socket of section 1."""

    def __init__(self, path: Path) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(f"ipc://{path}")
        self.waiting: list[Event] = []

    def send(self, verb: str, id_: str, **fields: Any) -> None:
        """Section 2, from client to daemon."""
        self.socket.send(msgpack.packb({"v": 1, "verb": verb, "id": id_, **fields}))

    def event(self) -> Event:
        """Section 2, from daemon to client: the next event."""
        while not self.waiting:
            assert self.socket.poll(PATIENCE_MS), "the daemon does not answer"
            (frame,) = self.socket.recv_multipart()
            message = msgpack.unpackb(frame)
            assert set(message) == {"v", "ev"}
            assert message["v"] == 1
            self.waiting += message["ev"]
        return self.waiting.pop(0)

    def ask(self, verb: str, id_: str, **fields: Any) -> Event:
        """A request and its one answer."""
        self.send(verb, id_, **fields)
        event = self.event()
        assert (event["id"], event["seq"]) == (id_, 0)
        return event

    def stream(self, id_: str, first: int = 0) -> list[Event]:
        """Every event of a stream to its end, from ``first`` on without a gap."""
        events: list[Event] = []
        while not events or events[-1]["type"] not in ("done", "error"):
            event = self.event()
            assert (event["id"], event["seq"]) == (id_, first + len(events))
            events.append(event)
        return events

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def data(daemon: RunningDaemon) -> Iterator[Raw]:
    """A connection that has said hello (section 3)."""
    raw = Raw(daemon.socket_dir / "pagedd.sock")
    raw.hello = raw.ask("hello", "h", app="raw-client", priority="interactive")  # type: ignore[attr-defined]
    yield raw
    raw.close()


@pytest.fixture
def control(daemon: RunningDaemon) -> Iterator[Raw]:
    raw = Raw(daemon.socket_dir / "control.sock")
    yield raw
    raw.close()


def hello_of(data: Raw) -> Event:
    result: Event = data.hello  # type: ignore[attr-defined]
    return result


def text_of(events: list[Event], index: int = 0) -> str:
    """Section 4, generate: join the chunks of a sample with what was held back."""
    parts = [e["text"] for e in events if e["type"] == "chunk" and e["index"] == index]
    held_back: str = events[-1]["finish"][index]["text"]
    return "".join(parts) + held_back


def tokens_of(events: list[Event], index: int = 0) -> bytes:
    return b"".join(e["tokens"] for e in events if e["type"] == "chunk" and e["index"] == index)


def test_hello_brings_what_section_3_says(daemon: RunningDaemon, data: Raw) -> None:
    hello = hello_of(data)
    assert hello["type"] == "result"
    assert len(hello["token"]) == 16
    assert hello["pid"] == daemon.process.pid
    assert isinstance(hello["server"], str)
    assert hello["limits"]["frame_bytes"] > 0
    assert hello["model"]["loaded"] is True
    assert "notice" in hello


def test_the_first_message_must_be_hello(daemon: RunningDaemon) -> None:
    raw = Raw(daemon.socket_dir / "pagedd.sock")
    try:
        answer = raw.ask("models", "m")
        assert (answer["type"], answer["code"], answer["retryable"]) == ("error", "E_HELLO", False)
    finally:
        raw.close()


def test_generate_streams_text_without_gaps(data: Raw) -> None:
    data.send("generate", "g1", prompt="Once upon a time", max_tokens=20, ignore_eos=True, seed=5)
    events = data.stream("g1")
    assert events[0]["type"] == "accepted"
    assert events[0]["seed"] == 5
    assert events[0]["prompt_tokens"] > 0
    assert isinstance(events[0]["model"], str)
    assert [event["type"] for event in events[1:-1]] == ["chunk"] * (len(events) - 2)
    done = events[-1]
    assert done["type"] == "done"
    assert [(f["index"], f["reason"]) for f in done["finish"]] == [(0, "length")]
    assert done["usage"]["generated_tokens"] == 20 == len(tokens_of(events)) // 4
    assert done["usage"]["prompt_tokens"] == events[0]["prompt_tokens"]
    assert set(done["timings"]) == {"queue_ms", "prompt_ms", "generation_ms", "ttft_ms"}
    assert isinstance(text_of(events), str)


def test_token_ids_continue_like_the_text_they_stand_for(data: Raw) -> None:
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    tokens = data.ask("tokenize", "t", text="Once upon a time")["tokens"]
    data.send("generate", "text", prompt="Once upon a time", **options)
    from_text = data.stream("text")
    data.send("generate", "ids", tokens=tokens, **options)
    from_ids = data.stream("ids")
    assert tokens_of(from_text) == tokens_of(from_ids)
    assert text_of(from_text) == text_of(from_ids)
    assert isinstance(data.ask("detokenize", "d", tokens=tokens_of(from_ids))["text"], str)


def test_samples_and_logprobs_come_as_section_4_says(data: Raw) -> None:
    data.send("generate", "n", prompt="abc", n=2, max_tokens=5, ignore_eos=True, logprobs=2)
    events = data.stream("n")
    assert [finish["index"] for finish in events[-1]["finish"]] == [0, 1]
    assert events[-1]["usage"]["generated_tokens"] == 10
    for chunk in events[1:-1]:
        assert len(chunk["logprobs"]) == len(chunk["tokens"]) // 4
        for own, top in chunk["logprobs"]:
            assert own <= 0
            assert len(top) == 2


def test_chat_and_sessions(data: Raw) -> None:
    data.send("chat", "c", messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
    assert data.stream("c")[-1]["type"] == "done"
    session = data.ask("session.open", "so", system="Be terse.")["session"]
    data.send("session.say", "s1", session=session, content="Hi", max_tokens=4)
    assert data.stream("s1")[-1]["type"] == "done"
    branch = data.ask("session.fork", "sf", session=session)["session"]
    assert branch != session
    assert data.ask("session.close", "sc", session=session)["turns"] == 1
    assert data.ask("session.say", "s2", session=session, content="x")["code"] == "E_SESSION"


def test_cancel_over_the_control_socket_ends_the_stream(data: Raw, control: Raw) -> None:
    data.send("generate", "long", prompt="abc", max_tokens=100_000, ignore_eos=True)
    while data.event()["type"] != "chunk":
        pass
    token = hello_of(data)["token"]
    assert control.ask("cancel", "x1", token=token, target="long")["cancelled"] is True
    while (event := data.event())["type"] == "chunk":
        pass
    assert event["type"] == "done"
    assert event["finish"][0]["reason"] == "cancelled"
    assert control.ask("cancel", "x2", token=token, target="long")["cancelled"] is False
    assert control.ask("cancel", "x3", token=token, target="never")["cancelled"] is False
    assert control.ask("cancel", "x4", token=b"x" * 16, target="long")["code"] == "E_TOKEN"


def test_the_same_request_again_repeats_what_is_after_and_starts_nothing(
    data: Raw, control: Raw
) -> None:
    fields = {"prompt": "again", "max_tokens": 10, "ignore_eos": True}
    data.send("generate", "same", **fields)
    events = data.stream("same")
    before = control.ask("stats", "before")["requests"]["finished"]
    data.send("generate", "same", **fields, after=2)
    assert data.stream("same", first=3) == events[3:]
    data.send("generate", "same", **fields)
    assert data.stream("same") == events
    assert control.ask("stats", "after")["requests"]["finished"] == before


def test_the_same_id_with_other_fields_is_a_duplicate(data: Raw) -> None:
    data.send("generate", "dup", prompt="one", max_tokens=2, ignore_eos=True)
    data.stream("dup")
    data.send("generate", "dup", prompt="two", max_tokens=2, ignore_eos=True)
    event = data.event()
    assert (event["id"], event["type"], event["code"]) == ("dup", "error", "E_DUPLICATE")


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"v": 2, "verb": "models", "id": "e"}, "E_VERSION"),
        ({"v": 1, "verb": "generat", "id": "e"}, "E_VERB"),
        ({"v": 1, "verb": "status", "id": "e"}, "E_VERB"),
        ({"v": 1, "verb": "generate", "id": "e", "prompt": "x", "colour": 1}, "E_FIELD"),
        ({"v": 1, "verb": "generate", "id": "e"}, "E_FIELD"),
        ({"v": 1, "verb": "generate", "id": "e", "prompt": "x", "temperature": "hot"}, "E_FIELD"),
        ({"v": 1, "verb": "generate", "id": "e", "prompt": "x", "n": 17}, "E_LIMIT"),
        ({"v": 1, "verb": "generate", "id": "e", "tokens": struct.pack("<i", 10**9)}, "E_TOKEN_ID"),
        ({"v": 1, "verb": "session.say", "id": "e", "session": "no", "content": "x"}, "E_SESSION"),
        ({"v": 1, "verb": "generate", "id": "e", "prompt": "x", "model": "none"}, "E_MODEL"),
    ],
)
def test_a_bad_request_gets_its_code_and_the_connection_goes_on(
    data: Raw, request_: Event, code: str
) -> None:
    data.socket.send(msgpack.packb(request_))
    event = data.event()
    assert (event["id"], event["type"], event["code"]) == ("e", "error", code)
    assert isinstance(event["message"], str)
    assert isinstance(event["retryable"], bool)
    assert isinstance(event["details"], dict)
    assert data.ask("models", "m")["type"] == "result"


def test_a_message_that_is_no_msgpack_is_answered_without_an_id(data: Raw) -> None:
    data.socket.send(b"\xc1")
    event = data.event()
    assert (event["id"], event["type"], event["code"]) == ("", "error", "E_MALFORMED")
    assert data.ask("models", "m")["type"] == "result"


def test_a_null_field_counts_as_left_out(data: Raw) -> None:
    data.send("generate", "null", prompt="x", max_tokens=1, stop=None, seed=None, tokens=None)
    assert data.stream("null")[-1]["type"] == "done"


def test_models_load_and_unload(data: Raw) -> None:
    models = data.ask("models", "m")["models"]
    (loaded,) = [model for model in models if model["loaded"]]
    assert set(loaded) == {
        "name",
        "path",
        "size_bytes",
        "loaded",
        "architecture",
        "parameters",
        "quantization",
        "context_tokens",
    }
    assert data.ask("unload", "u1")["unloaded"] == loaded["name"]
    assert data.ask("unload", "u2")["unloaded"] is None
    assert data.ask("load", "l", keep_alive="5m")["model"]["name"] == loaded["name"]


def test_status_has_every_field_of_section_8_and_needs_no_token(control: Raw) -> None:
    status = control.ask("status", "s")
    assert status["state"] == "ready"
    assert status["degraded"] == []
    assert (status["backend"], status["version"] != "") == ("simulated", True)
    assert isinstance(status["uptime_s"], float)
    for tier in ("gpu", "ram", "disk"):
        assert set(status["kv"][tier]) == {"blocks_total", "used", "cached", "free"}
    assert set(status["split"]) == {"token_state", "reserved", "internal", "external"}
    assert set(status["sequences"]) == {"running", "swapped", "ids_total"}
    assert set(status["requests"]) == {"running", "waiting", "paused"}
    (model,) = status["models"]
    assert {"name", "size_bytes", "context_tokens", "block_tokens", "expires_s"} <= set(model)


def test_status_shows_an_app_while_it_is_connected(data: Raw, control: Raw) -> None:
    data.send("generate", "row", prompt="x", max_tokens=3, ignore_eos=True)
    data.stream("row")
    rows = {row["app"]: row for row in control.ask("status", "s")["apps"]}
    row = rows["raw-client"]
    assert row["class"] == "interactive"
    assert row["generated_tokens"] >= 3
    assert set(row["kv"]) == {"gpu", "ram", "disk"}
    for name in ("connections", "running", "waiting", "prompt_tokens", "cached_tokens"):
        assert isinstance(row[name], int), name
    assert {"hit_percent", "ttft_ms", "tokens_per_s"} <= set(row)


def test_ping_and_stats(control: Raw) -> None:
    ping = control.ask("ping", "p")
    assert {"pid", "uptime_s", "state", "steps"} <= set(ping)
    stats = control.ask("stats", "s")
    assert {"uptime_s", "requests", "tokens", "kv", "steps", "apps"} <= set(stats)


def test_bye_ends_the_connection_and_its_requests(daemon: RunningDaemon, control: Raw) -> None:
    raw = Raw(daemon.socket_dir / "pagedd.sock")
    try:
        raw.ask("hello", "h", app="leaving")
        raw.send("generate", "long", prompt="abc", max_tokens=100_000, ignore_eos=True)
        assert raw.event()["type"] == "accepted"
        raw.send("bye", "b")
        while raw.event()["id"] != "b":
            pass
        assert raw.ask("models", "m")["code"] == "E_HELLO"
    finally:
        raw.close()
    rows = {row["app"]: row for row in control.ask("status", "s")["apps"]}
    assert rows.get("leaving", {"running": 0})["running"] == 0

"""Bytes to plain values: what is no message, what would grow, and the limits of messages."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedd_daemon.front import wire
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import Limits
from tests.support.wire import GENERATE, refused

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=60,
)


@given(st.dictionaries(st.text(), plain, max_size=20))
def test_whatever_a_client_may_send_is_decoded_as_it_was(message: dict[str, Any]) -> None:
    assert wire.decode([msgpack.packb(message)], Limits(depth=100)) == message


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: b"\x81\xa1a" + tail))
def test_random_bytes_raise_nothing_but_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        wire.parse_data(wire.decode([data]))


@given(st.dictionaries(st.text(), plain, max_size=8), st.data())
def test_every_truncation_is_malformed(message: dict[str, Any], data: st.DataObject) -> None:
    packed = msgpack.packb(message)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(WireError) as caught:
        wire.decode([packed[:cut]], Limits(depth=100))
    assert caught.value.code == "E_MALFORMED"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb("text"),
        msgpack.packb({}) + b"\xc0",
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"a": msgpack.Timestamp(1, 1)}),
        msgpack.packb({b"a": 1}),
        msgpack.packb({1: 1}),
        msgpack.packb({"a": {1: 2}}),
        msgpack.packb({"logit_bias": {1: 2, "b": 3}}),
        msgpack.packb({"logit_bias": {True: 2}}),
        b"\x81\x90\x01",
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\xa1a\xa2\xff\xfe",
        b"\x81\xa1a\xa3\xed\xa0\x80",
        b"\x81\xa2\xc3\x28\x01",
    ],
    ids=lambda data: data[:12].hex() or "empty",
)
def test_what_is_not_msgpack_of_this_protocol_is_malformed(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode([data])
    assert caught.value.code == "E_MALFORMED"


def test_more_frames_than_one_are_malformed() -> None:
    with pytest.raises(WireError) as caught:
        wire.decode([b"\x80", b"\x80"])
    assert caught.value.code == "E_MALFORMED"
    assert caught.value.details["limit"] == "frames"


def test_an_error_carries_the_id_that_stands_before_what_is_wrong() -> None:
    good = msgpack.packb({"v": 1, "id": "me", "x": 1})
    assert refused(good[:-1] + b"\xc1").id == "me"
    assert refused(good + b"junk").id == "me"
    assert refused(good[:-1] + b"\xa2\xff\xfe").id == "me"
    assert refused({"v": 1, "id": "me", "x": {}, "y": [[[]]]}, Limits(depth=2)).id == "me"
    assert refused({"v": 2, "id": "me"}).id == "me"
    assert refused({"v": 1, "id": "me", "verb": "nope"}).id == "me"
    assert refused({**GENERATE, "n": "x"}).id == "a"
    assert refused({**GENERATE, "id": "a\n"}).id == ""
    assert refused({**GENERATE, "id": "x" * 65}).id == ""
    assert refused({**GENERATE, "id": [[1]]}).id == ""


def nested(depth: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(depth - 1):
        value = [value]
    return {"a": value}


def named_limit(data: bytes, limits: Limits) -> str | None:
    try:
        wire.decode([data], limits)
    except WireError as error:
        return str(error.details["limit"])
    return None


SMALL = Limits(
    frame_bytes=10_000,
    depth=5,
    map_entries=20,
    list_entries=30,
    string_bytes=300,
    binary_bytes=400,
    total_nodes=100,
)


@pytest.mark.parametrize(
    ("name", "at", "beyond"),
    [
        ("depth", nested(5), nested(6)),
        (
            "map_entries",
            {"a": {str(i): i for i in range(20)}},
            {"a": {str(i): i for i in range(21)}},
        ),
        ("list_entries", {"a": [0] * 30}, {"a": [0] * 31}),
        ("string_bytes", {"a": "é" * 150}, {"a": "é" * 150 + "x"}),
        ("binary_bytes", {"a": b"x" * 400}, {"a": b"x" * 401}),
        # The map, its key, four lists and what is in them.
        (
            "total_nodes",
            {"a": [[0] * 30, [0] * 30, [0] * 30, [0] * 3]},
            {"a": [[0] * 30, [0] * 30, [0] * 30, [0] * 4]},
        ),
    ],
)
def test_each_limit_of_a_message_holds_at_it_and_one_beyond(
    name: str, at: dict[str, Any], beyond: dict[str, Any]
) -> None:
    assert named_limit(msgpack.packb(at), SMALL) is None
    assert named_limit(msgpack.packb(beyond), SMALL) == name


def test_a_frame_of_exactly_the_limit_is_taken() -> None:
    message = {"a": b""}
    room = 1000 - len(msgpack.packb(message)) - 1
    data = msgpack.packb({"a": b"x" * room})
    assert len(data) == 1000
    assert named_limit(data, Limits(frame_bytes=1000)) is None
    assert named_limit(data, Limits(frame_bytes=999)) == "frame_bytes"


AMPLIFIERS = {
    "a list of empty maps": "b'\\x81\\xa1a\\xdd' + (size).to_bytes(4, 'big') + b'\\x80' * size",
    "lists of empty maps": (
        "b'\\x81\\xa1a\\xdc\\x20\\x00' + (b'\\xdc\\x04\\x00' + b'\\x80' * 1024) * 8192"
    ),
    "nested list headers": "b'\\x81\\xa1a' + b'\\xdc\\x40\\x00' * (size // 3)",
    "nested map headers": "b'\\x81\\xa1a' + b'\\xde\\x10\\x00\\xa1a' * (size // 5)",
    "maps of one": "b'\\x81\\xa1a\\xdc\\x40\\x00' + b'\\x81\\xa1a\\xc0' * (size // 4)",
    "a list that promises": "b'\\x81\\xa1a\\xdd\\xff\\xff\\xff\\xff'",
    "the same in a key": "b'\\x81\\x9f' + b'\\x80' * size",
}


@pytest.mark.parametrize("name", AMPLIFIERS)
def test_an_amplifying_message_costs_no_memory(name: str) -> None:
    # In a process of its own, whose peak is what this message alone has cost.
    program = f"""
import resource
from pagedd_daemon.front import wire
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import DEFAULT_LIMITS
size = DEFAULT_LIMITS.frame_bytes - 64
data = ({AMPLIFIERS[name]})[:DEFAULT_LIMITS.frame_bytes]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    wire.decode([data])
except WireError as error:
    print(error.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    code, grown_kib = out.stdout.split()
    assert code in ("E_LIMIT", "E_MALFORMED")
    assert int(grown_kib) < 8 * 1024

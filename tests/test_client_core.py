"""The client's protocol core, fed any history of frames: no sockets, no threads, no clock."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagedd
from pagedd import _verbs
from pagedd._core import MAX_RESENDS, Assembly, Call, Core
from tests.support.fake_daemon import story


def frame(*events: dict[str, Any]) -> bytes:
    """Events as the daemon sends them."""
    packed: bytes = msgpack.packb({"v": 1, "ev": list(events)})
    return packed


def opened(core: Core, words: int = 3) -> tuple[Call, list[dict[str, Any]]]:
    """A stream that was started, and every event the daemon has for it."""
    call, request = core.open("generate", {"prompt": "x"})
    return call, story(msgpack.unpackb(request), *(f"{n} " for n in range(words)))


def read(call: Call) -> Assembly:
    """What the reader made of the events that arrived."""
    assembly = Assembly()
    while call.events:
        assembly.take(call.take())
    return assembly


@given(lost=st.lists(st.booleans(), max_size=60), words=st.integers(1, 12))
def test_whatever_is_lost_nothing_is_missing_and_nothing_comes_twice(
    lost: list[bool], words: int
) -> None:
    """Each event travels alone and may be lost, in resends too, but for the last of each attempt:
    that one's loss shows only in the deadline."""
    core = Core()
    call, events = opened(core, words)
    fate = iter(lost)
    line = list(events)
    for _ in range(len(lost) + 2):
        answers: list[dict[str, Any]] = []
        for event in line:
            if event is not line[-1] and next(fate, False):
                continue
            for _, again in core.feed(frame(event)):
                after = msgpack.unpackb(again)["after"]
                answers += events[after + 1 :]
        line = answers
        if not line:
            break
    assert call.over
    assert call.failure is None
    completion = read(call).completion
    assert completion is not None
    assert completion.text == "".join(f"{n} " for n in range(words))
    assert completion.samples[0].tokens == tuple(range(words))


def test_live_events_after_a_gap_do_not_ask_twice() -> None:
    core = Core()
    call, events = opened(core, 6)
    assert core.feed(frame(events[0])) == []
    assert len(core.feed(frame(events[2]))) == 1
    assert core.feed(frame(events[3], events[4])) == []
    assert core.feed(frame(*events[1:])) == []
    assert read(call).completion is not None


def test_a_daemon_that_cannot_resend_is_given_up() -> None:
    core = Core()
    call, events = opened(core)
    for _ in range(MAX_RESENDS + 1):
        core.feed(frame(events[2]))
    assert call.over
    with pytest.raises(pagedd.ProtocolViolation, match="lost") as caught:
        call.take()
    assert caught.value.details == {"request": "r1", "missing_seq": 0, "got_seq": 2}


def test_events_of_unknown_and_finished_requests_are_ignored() -> None:
    core = Core()
    call, events = opened(core)
    core.feed(frame(*events))
    assert core.feed(frame(*events, {"id": "other", "seq": 9, "type": "chunk"})) == []
    assert len(call.events) == len(events)


def test_an_abandoned_call_keeps_nothing_and_asks_for_nothing() -> None:
    core = Core()
    call, events = opened(core)
    core.feed(frame(events[0]))
    core.abandon(call)
    assert core.feed(frame(events[2])) == []
    assert core.feed(frame(events[-1])) == []
    assert call.over
    assert not call.events


def test_one_message_may_carry_events_of_several_requests() -> None:
    core = Core()
    (first, a), (second, b) = opened(core, 1), opened(core, 2)
    core.feed(frame(*(event for pair in zip(a, b, strict=False) for event in pair), *b[len(a) :]))
    assert (first.over, second.over) == (True, True)


def test_an_error_without_an_id_ends_only_what_was_never_answered() -> None:
    core = Core()
    (answered, events), (unanswered, _) = opened(core), opened(core)
    core.feed(frame(events[0]))
    error = {"id": "", "seq": 0, "type": "error", "code": "E_MALFORMED", "message": "no"}
    core.feed(frame(error))
    assert not answered.over
    with pytest.raises(pagedd.InvalidRequest, match="no"):
        unanswered.take()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_violation(data: bytes) -> None:
    core = Core()
    opened(core)
    with contextlib.suppress(pagedd.ProtocolViolation):
        core.feed(data)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(["accepted", "chunk", "done", "result", "error", "other"]),
    st.dictionaries(
        st.sampled_from(
            ["index", "text", "tokens", "logprobs", "finish", "usage", "timings", "seed", "model"]
        ),
        _VALUES,
    ),
)
def test_any_event_is_read_or_a_pagedd_error(kind: str, fields: dict[str, Any]) -> None:
    with contextlib.suppress(pagedd.PageddError):
        Assembly().take({"id": "r1", "seq": 0, "type": kind, **fields})


def test_token_ids_of_an_odd_length_are_a_violation_of_the_protocol() -> None:
    event = {"id": "r1", "seq": 0, "type": "chunk", "index": 0, "text": "", "tokens": b"abcde"}
    with pytest.raises(pagedd.ProtocolViolation):
        Assembly().take(event)


def test_a_resend_of_a_request_without_a_stream_is_the_same_request() -> None:
    core = Core()
    call, request = core.open("tokenize", {"text": "x", "bos": None})
    assert core.again(call) == request
    assert "bos" not in msgpack.unpackb(request)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_survive_the_wire(tokens: list[int]) -> None:
    assert list(_verbs.unpack_tokens(_verbs.pack_tokens(tokens))) == tokens

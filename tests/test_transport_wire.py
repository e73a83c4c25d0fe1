"""Plain values to requests: the models of each verb, and the limits of requests."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgpack
import pytest

from pagedd_daemon.front import requests as r
from pagedd_daemon.front import wire
from pagedd_daemon.front.errors import RETRYABLE, WireError
from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits, markdown
from pagedd_daemon.params import SamplingParams, StopParams
from tests.support.wire import GENERATE, parse, refused

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------- parse


@pytest.mark.parametrize("version", [0, 2, 1.0, True, "1", None, [1]])
def test_another_version_is_told_which_ones_there_are(version: object) -> None:
    error = refused({**GENERATE, "v": version})
    assert error.code == "E_VERSION"
    assert error.details == {"supported": [1]}


def test_an_unknown_verb_is_told_the_nearest() -> None:
    assert refused({**GENERATE, "verb": "generat"}).details["nearest"] == "generate"
    assert refused({**GENERATE, "verb": "zzzzzzz"}).details["nearest"] is None
    assert refused({**GENERATE, "verb": 5}).details["field"] == "verb"
    long = refused({**GENERATE, "verb": "generate" * 100_000})
    assert len(long.message) < 200


def test_a_verb_on_the_wrong_socket_is_told_the_right_one() -> None:
    error = refused({"v": 1, "verb": "cancel", "id": "a"})
    assert error.code == "E_VERB"
    assert error.details["socket"] == "control.sock"
    with pytest.raises(WireError) as caught:
        wire.parse_control({"v": 1, "verb": "generate", "id": "a"})
    assert caught.value.details["socket"] == "pagedd.sock"


def test_the_defaults_are_those_of_the_protocol() -> None:
    assert parse(GENERATE).model_dump(exclude={"id", "prompt"}) == {
        "model": None,
        "max_tokens": 256,
        "min_tokens": 0,
        "ignore_eos": False,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "logit_bias": {},
        "stop": [],
        "stop_token_ids": [],
        "logprobs": None,
        "json_schema": None,
        "regex": None,
        "grammar": None,
        "keep_alive": None,
        "deadline_ms": None,
        "after": -1,
        "tokens": None,
        "n": 1,
        "best_of": None,
        "beam_width": None,
        "length_penalty": 1.0,
        "early_stopping": False,
        "stream": None,
        "echo": False,
        "prompt_logprobs": None,
    }


def test_a_field_that_is_null_counts_as_left_out() -> None:
    nulls = dict.fromkeys(r.Generate.model_fields)
    assert parse({**nulls, **GENERATE}) == parse(GENERATE)


@pytest.mark.parametrize(
    ("field", "low", "high", "below", "above"),
    [
        ("n", 1, 16, 0, 17),
        ("max_tokens", 1, 10**9, 0, None),
        ("min_tokens", 0, 10**9, -1, None),
        ("temperature", 0, 100, -0.001, 100.001),
        ("top_k", 0, 1_000_000, -1, 1_000_001),
        ("top_p", 1e-9, 1, 0, 1.001),
        ("min_p", 0, 1, -0.001, 1.001),
        ("typical_p", 1e-9, 1, 0, 1.001),
        ("repetition_penalty", 1e-9, 10, 0, 10.001),
        ("presence_penalty", -10, 10, -10.001, 10.001),
        ("frequency_penalty", -10, 10, -10.001, 10.001),
        ("seed", 0, 2**63 - 1, -1, 2**63),
        ("logprobs", 0, 20, -1, 21),
        ("deadline_ms", 1, 10**12, 0, None),
        ("after", -1, 10**12, -2, None),
        ("logit_bias", {0: -100}, {2**31 - 1: 100}, {-1: 0}, {2**31: 0}),
        ("stop_token_ids", [0], [2**31 - 1], [-1], [2**31]),
    ],
)
def test_each_range_holds_at_its_ends_and_beyond(
    field: str, low: Any, high: Any, below: Any, above: Any
) -> None:
    assert getattr(parse({**GENERATE, field: low}), field) == low
    assert getattr(parse({**GENERATE, field: high}), field) == high
    for value in (below, above):
        if value is not None:
            error = refused({**GENERATE, field: value})
            assert error.code in ("E_FIELD", "E_LIMIT")
            assert error.details["field"].startswith(field)


WRONG: list[tuple[str, object]] = [
    *((name, math.nan) for name in ("temperature", "top_p", "min_p", "presence_penalty")),
    *((name, math.inf) for name in ("temperature", "frequency_penalty", "keep_alive")),
    *((name, True) for name in ("n", "temperature", "max_tokens", "seed", "keep_alive")),
    *((name, "1") for name in ("n", "temperature", "ignore_eos", "stop", "logprobs")),
    *((name, 1.0) for name in ("n", "top_k", "seed", "max_tokens")),
    ("ignore_eos", 1),
    ("prompt", b"bytes"),
    ("prompt", ""),
    ("prompt", 5),
    ("model", ""),
    ("stop", ["a", 5]),
    ("stop", [""]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [True]),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: True}),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", []),
    ("keep_alive", "soon"),
    ("keep_alive", "5x"),
    ("keep_alive", ""),
    ("keep_alive", "-"),
    ("keep_alive", [5]),
    ("keep_alive", "1" * 400),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: repr(value)[:20])
def test_wrong_types_are_refused_by_the_name_of_the_field(field: str, value: object) -> None:
    error = refused({**GENERATE, field: value})
    assert error.code == "E_FIELD"
    assert str(error.details["field"]).startswith(field)


@pytest.mark.parametrize(
    ("limit", "field", "at", "beyond"),
    [
        ("samples", "n", 16, 17),
        ("logprobs", "logprobs", 20, 21),
        ("stop_strings", "stop", ["a"] * 16, ["a"] * 17),
        ("stop_string_bytes", "stop", ["é" * 128], ["é" * 128 + "x"]),
        ("stop_token_ids", "stop_token_ids", [7] * 64, [7] * 65),
        (
            "logit_bias",
            "logit_bias",
            dict.fromkeys(range(1024), 1.0),
            dict.fromkeys(range(1025), 1.0),
        ),
    ],
)
def test_each_limit_of_a_request_holds_at_it_and_one_beyond(
    limit: str, field: str, at: Any, beyond: Any
) -> None:
    assert getattr(parse({**GENERATE, field: at}), field) == at
    error = refused({**GENERATE, field: beyond})
    assert error.code == "E_LIMIT"
    assert error.details["limit"] == limit
    assert error.details["max"] == getattr(DEFAULT_LIMITS, limit)
    assert error.details["value"] > error.details["max"]


def test_limits_are_those_of_the_configuration() -> None:
    assert refused({**GENERATE, "n": 3}, Limits(samples=2)).details["max"] == 2
    assert parse({**GENERATE, "n": 17}, Limits(samples=17)).n == 17


def test_the_limits_of_ids_apps_messages_and_tools_hold() -> None:
    assert parse({**GENERATE, "id": "x" * 64}).id == "x" * 64
    assert refused({**GENERATE, "id": "x" * 65}).details["limit"] == "id_chars"
    hello = {"v": 1, "verb": "hello", "id": "h"}
    assert parse({**hello, "app": "a" * 64}).app == "a" * 64
    assert refused({**hello, "app": "a" * 65}).details["limit"] == "app_chars"
    chat = {"v": 1, "verb": "chat", "id": "c"}
    few = Limits(messages=2, tools=2)
    turn = {"role": "user", "content": "x"}
    parse({**chat, "messages": [turn] * 2, "tools": [{}] * 2}, few)
    assert refused({**chat, "messages": [turn] * 3}, few).details["limit"] == "messages"
    over = refused({**chat, "messages": [turn], "tools": [{}] * 3}, few)
    assert over.details["limit"] == "tools"


@pytest.mark.parametrize("app", ["", "a b", "a/b", "ä", "a\n", 5, None])
def test_an_app_name_is_made_of_few_characters(app: object) -> None:
    assert refused({"v": 1, "verb": "hello", "id": "h", "app": app}).details["field"] == "app"


@pytest.mark.parametrize("id", ["", "a\n", "é", "\x7f", 5, None, ["a"]])
def test_an_id_is_printable_ascii(id: object) -> None:
    error = refused({**GENERATE, "id": id})
    assert (error.code, error.details["field"], error.id) == ("E_FIELD", "id", "")


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    error = refused({**GENERATE, "max_token": 5})
    assert error.code == "E_FIELD"
    assert error.details["field"] == "max_token"
    assert error.details["nearest"] == "max_tokens"
    assert len(refused({**GENERATE, "x" * 10_000: 5}).message) < 300


def test_exactly_one_of_prompt_and_tokens_is_given() -> None:
    base = {"v": 1, "verb": "generate", "id": "a"}
    assert refused(base).details["field"] == "prompt"
    assert refused({**base, "prompt": "a", "tokens": bytes(4)}).details["field"] == "prompt"
    assert parse({**base, "tokens": bytes(8)}).tokens == bytes(8)


@pytest.mark.parametrize("tokens", [b"", b"abc", b"\0\0\0\x80", bytes(8) + b"\xff\xff\xff\xff"])
def test_packed_token_ids_are_whole_and_not_negative(tokens: bytes) -> None:
    error = refused({"v": 1, "verb": "generate", "id": "a", "tokens": tokens})
    assert (error.code, error.details["field"]) == ("E_FIELD", "tokens")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (0.5, 0.5),
        (-1, math.inf),
        (-0.1, math.inf),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        ("300", 300.0),
        ("0", 0.0),
        ("-1", math.inf),
        ("-1m", math.inf),
    ],
)
def test_keep_alive_is_read_as_seconds(given: object, seconds: float) -> None:
    assert parse({**GENERATE, "keep_alive": given}).keep_alive == seconds


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": "x", "score": math.nan}],
        [{"role": "user", "content": "x", "data": b"bytes"}],
        ["text"],
        "text",
        None,
    ],
)
def test_a_chat_without_proper_messages_is_refused(messages: object) -> None:
    error = refused({"v": 1, "verb": "chat", "id": "c", "messages": messages})
    assert (error.code, error.details["field"].split(".")[0]) == ("E_FIELD", "messages")


def test_further_keys_of_messages_tools_and_template_args_pass_as_they_are() -> None:
    fields = {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "x": {"y": 1.5}}]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        "tools": [{"type": "function", "function": {"parameters": {"a": [1, None, True]}}}],
        "template_args": {"enable_thinking": False, "nested": {"a": []}},
    }
    chat = parse({"v": 1, "verb": "chat", "id": "c", **fields})
    assert {name: getattr(chat, name) for name in fields} == fields


def test_a_session_turn_draws_one_sample() -> None:
    say = {"v": 1, "verb": "session.say", "id": "s", "session": "1", "content": "hi"}
    assert parse(say).n == 1
    assert parse(say).role == "user"
    for field in ("n", "prompt", "tokens"):
        assert refused({**say, field: 1}).details["field"] == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "token"),
        ({"token": bytes(16)}, "target"),
        ({"token": bytes(15), "target": "a"}, "token"),
        ({"token": bytes(16), "target": "a", "all": True}, "token"),
        ({"app": "a", "all": True}, "token"),
        ({"target": "a"}, "token"),
    ],
)
def test_a_cancel_names_one_scope(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.parse_control({"v": 1, "verb": "cancel", "id": "c", **fields})
    assert caught.value.details["field"] == field
    cancel = {"v": 1, "verb": "cancel", "id": "c"}
    for scope in ({"token": bytes(16), "target": "a"}, {"app": "x"}, {"all": True, "target": "a"}):
        wire.parse_control({**cancel, **scope})


def test_every_verb_of_the_protocol_has_a_model() -> None:
    page = (ROOT / "docs/protocol.md").read_text()
    section = page[page.index("## 4.") : page.index("## 5.")]
    heads = [line[4:].split(" (")[0] for line in section.splitlines() if line.startswith("### ")]
    documented = {verb.strip() for head in heads for verb in head.split(",")}
    assert documented | {"hello"} == {*wire.DATA_VERBS, *wire.CONTROL_VERBS}


def test_no_error_ever_holds_the_text_of_a_prompt() -> None:
    secret = "my secret diary"
    for fields in ({"prompt": [secret]}, {"prompt": secret, "n": secret}, {"stop": [secret * 99]}):
        error = refused({**GENERATE, **fields})
        assert secret not in repr(error.as_event("a", 0))


def test_sampling_and_stopping_are_the_fields_of_the_engine() -> None:
    request = parse({**GENERATE, "seed": 5, "stop_token_ids": [1, 2], "logit_bias": {3: 1}})
    assert SamplingParams(**request.sampling()).seed == 5
    assert SamplingParams(**request.sampling()).logprobs == -1
    assert StopParams(**request.stopping()).stop_token_ids == (1, 2)
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert set(request.sampling()) == names
    assert 0 <= parse(GENERATE).sampling()["seed"] < 2**63


# --------------------------------------------------------------------------------- errors, encoding


def test_events_travel_in_order_in_one_map() -> None:
    events = [{"id": "a", "seq": i, "type": "chunk", "tokens": b"\0" * i} for i in range(100)]
    assert msgpack.unpackb(wire.encode(events)) == {"v": 1, "ev": events}


def test_the_codes_are_those_of_the_protocol() -> None:
    page = (ROOT / "docs/protocol.md").read_text()
    documented = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].startswith("`E_"):
            documented[cells[1].strip("`")] = cells[2] == "yes"
    assert documented == RETRYABLE


def test_the_table_of_limits_in_the_protocol_is_up_to_date() -> None:
    page = (ROOT / "docs/protocol.md").read_text()
    shown = page.split("<!-- limits -->\n")[1].split("<!-- end of limits -->")[0]
    assert shown.strip() == markdown(), "run: python -m pagedd_daemon.front.limits"

"""Schemas and tools in OpenAI's interface, on the simulated backend: what it says is noise, and the
constraint alone makes sense of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import ask, got, run, streamed

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "chat/completions"


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("weather", city={"enum": ["Rome", "Łódź"]}, days={"type": "integer", "maximum": 9}),
    tool("now"),
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


def test_a_required_call_is_one_of_the_tools_with_arguments_of_its_schema(
    daemon: RunningDaemon,
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        named: set[str] = set()
        for seed in range(6):
            asked = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "seed": seed}
            asked |= {"parallel_tool_calls": False}
            (choice,) = (await got(client, CHAT, **asked))["choices"]
            message = choice["message"]
            assert (choice["finish_reason"], message["content"]) == ("tool_calls", None)
            (call,) = message["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            named.add(call["function"]["name"])
            if call["function"]["name"] == "weather":
                assert arguments["city"] in ("Rome", "Łódź")
                assert arguments["days"] <= 9
            else:
                assert arguments == {}
            pieces = await streamed(client, CHAT, **asked)
            deltas = [piece["choices"][0]["delta"] for piece in pieces]
            (again,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
            assert again[0]["index"] == 0
            assert again[0]["function"] == call["function"]
            assert "".join(delta.get("content") or "" for delta in deltas) == ""
            assert pieces[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert named == {"weather", "now"}

    run(daemon, use)


def test_a_named_tool_is_the_one_that_is_called(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        choice = {"type": "function", "function": {"name": "now"}}
        body = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice, "n": 3}
        for one in (await got(client, CHAT, **body, max_tokens=100))["choices"]:
            calls = one["message"]["tool_calls"]
            assert {call["function"]["name"] for call in calls} == {"now"}
            assert len({call["id"] for call in calls}) == len(calls)

    run(daemon, use)


def test_tools_that_may_be_called_leave_text_alone(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for choice in ("auto", "none", None):
            body = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice, "max_tokens": 30}
            (one,) = (await got(client, CHAT, **body, temperature=0))["choices"]
            assert one["message"]["content"]
            assert "tool_calls" not in one["message"]
            pieces = await streamed(client, CHAT, **body, seed=3)
            text = "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces)
            (one,) = (await got(client, CHAT, **body, seed=3))["choices"]
            assert one["message"]["content"] == text

    run(daemon, use)


def test_a_conversation_with_calls_and_results_goes_on(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        function = {"name": "now", "arguments": "{}"}
        messages = [
            *HELLO,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        ]
        body = await got(client, CHAT, messages=messages, tools=TOOLS, max_tokens=5)
        assert body["usage"]["prompt_tokens"] > len("noon")

    run(daemon, use)


@pytest.mark.parametrize("strict", [True, False])
def test_a_response_format_is_kept_to(daemon: RunningDaemon, strict: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}

    async def use(client: httpx.AsyncClient) -> None:
        for more in ({}, {"tools": TOOLS}):
            for seed in range(4):
                body = {"messages": HELLO, "response_format": wanted, "seed": seed, **more}
                (choice,) = (await got(client, CHAT, **body, max_tokens=200))["choices"]
                message = choice["message"]
                if "tool_calls" not in message:
                    assert json.loads(message["content"])["answer"] in ("yes", "no")

    run(daemon, use)


def test_a_json_object_is_one(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        body = {"messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 20}
        (choice,) = (await got(client, CHAT, **body))["choices"]
        assert choice["message"]["content"].startswith("{")

    run(daemon, use)


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"tool_choice": "required"}, "invalid_request", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "invalid_body", None),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "invalid_request",
            "tool_choice",
        ),
        ({"tools": [{"type": "function"}]}, "invalid_body", "tools.0.function"),
        ({"tools": [tool("x y")]}, "invalid_body", "tools.0.function.name"),
        ({"tools": [tool("x", y={"type": "nonsense"})]}, "E_GRAMMAR", None),
        ({"tools": [tool("x", y={"enum": ["z" * 70_000]})]}, "E_LIMIT", None),
    ],
)
def test_what_is_wrong_with_tools_is_said(
    daemon: RunningDaemon, more: dict[str, Any], code: str, param: str | None
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        response = await ask(client, CHAT, messages=HELLO, **more)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, code), error
        assert param is None or error["param"] == param

    run(daemon, use)


def test_a_body_of_any_depth_is_its_own_senders_trouble(daemon: RunningDaemon) -> None:
    """Other requests of the same app, on the same connection, go on."""
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"x": deep}}

    async def use(client: httpx.AsyncClient) -> None:

        others = [
            asyncio.create_task(ask(client, CHAT, messages=HELLO, max_tokens=20)) for _ in range(8)
        ]
        bad = await ask(client, CHAT, messages=[{**HELLO[0], "name": deep}])
        assert bad.status_code == 400
        for other in others:
            assert (await other).status_code == 200

    run(daemon, use)

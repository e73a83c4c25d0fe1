"""Anthropic's interface, and llama-server's names, over a real daemon on the simulated backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import events, with_gateway

HELLO = [{"role": "user", "content": "hello"}]
ASKED: dict[str, Any] = {"model": "simulated", "max_tokens": 8, "temperature": 0, "messages": HELLO}


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


async def got(client: httpx.AsyncClient, path: str = "messages", **body: Any) -> Any:
    response = await client.post(f"/v1/{path}", json={**ASKED, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_message_is_the_same_at_once_and_as_events(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        whole = await got(client)
        assert (whole["type"], whole["role"], whole["model"]) == (
            "message",
            "assistant",
            "simulated",
        )
        (block,) = whole["content"]
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("max_tokens", None)
        assert whole["usage"]["output_tokens"] == 8
        response = await client.post("/v1/messages", json={**ASKED, "stream": True})
        said = events(response)
        kinds = [event["type"] for event in said]
        assert kinds[:3] == ["message_start", "ping", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert set(kinds[3:-3]) == {"content_block_delta"}
        assert [f"event: {kind}" for kind in kinds] == [
            line for line in response.text.splitlines() if line.startswith("event: ")
        ]
        assert said[0]["message"]["content"] == []
        assert "".join(event["delta"]["text"] for event in said[3:-3]) == block["text"]
        assert said[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        assert said[-2]["usage"]["output_tokens"] == 8

    with_gateway(daemon.host, use)


def test_a_stop_sequence_is_named_and_not_part_of_the_text(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        text = (await got(client))["content"][0]["text"]
        stops = ["never said", text[2:4]]
        stopped = await got(client, stop_sequences=stops)
        said = stopped["content"][0]["text"] if stopped["content"] else ""
        assert said == text[: text.index(text[2:4])]
        assert stopped["stop_reason"] == "stop_sequence"
        assert stopped["stop_sequence"] == text[2:4]

    with_gateway(daemon.host, use)


def test_usage_tells_cached_tokens_apart_and_counting_counts_both(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        long = [{"role": "user", "content": "a text longer than two blocks of sixteen tokens"}]
        first = (await got(client, messages=long))["usage"]
        again = (await got(client, messages=long))["usage"]
        count = await got(client, "messages/count_tokens", messages=long)
        assert again["cache_read_input_tokens"] >= 32
        for usage in (first, again):
            total = usage["input_tokens"] + usage["cache_read_input_tokens"]
            assert count == {"input_tokens": total}

    with_gateway(daemon.host, use)


def test_blocks_are_read_as_the_text_they_hold(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        plain = await got(client, system="Be terse.")
        blocks = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        parts = await got(
            client,
            system=[{"type": "text", "text": "Be terse.", "cache_control": {"type": "ephemeral"}}],
            messages=[{"role": "user", "content": blocks}],
        )
        assert parts["content"] == plain["content"]

    with_gateway(daemon.host, use)


TOOL = {
    "name": "weather",
    "description": "How it is there.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_demanded_tool_is_used_with_input_of_its_schema(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        choice = {"type": "any", "disable_parallel_tool_use": True}
        asked: dict[str, Any] = {"tools": [TOOL], "max_tokens": 200, "tool_choice": choice}
        whole = await got(client, **asked)
        (block,) = whole["content"]
        assert (whole["stop_reason"], block["type"]) == ("tool_use", "tool_use")
        assert (block["name"], list(block["input"])) == ("weather", ["city"])
        response = await client.post("/v1/messages", json={**ASKED, **asked, "stream": True})
        said = events(response)
        start, delta, stop = [e for e in said if e["type"].startswith("content_block_")]
        assert start["content_block"]["type"] == "tool_use"
        assert start["content_block"]["input"] == {}
        assert json.loads(delta["delta"]["partial_json"])["city"] in ("Rome", "Oslo")
        assert stop["index"] == start["index"] == 0
        assert said[-2]["delta"]["stop_reason"] == "tool_use"
        answer = {"type": "tool_result", "tool_use_id": block["id"], "content": "sunny"}
        messages = [
            *HELLO,
            {"role": "assistant", "content": whole["content"]},
            {"role": "user", "content": [answer]},
        ]
        more = await got(client, "messages/count_tokens", messages=messages, tools=[TOOL])
        fewer = await got(client, "messages/count_tokens", tools=[TOOL])
        bare = await got(client, "messages/count_tokens")
        assert more["input_tokens"] > fewer["input_tokens"] > bare["input_tokens"]
        free = await got(client, tools=[TOOL], tool_choice={"type": "none"})
        assert free["content"][0]["type"] == "text"

    with_gateway(daemon.host, use)


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"max_tokens": None}, 400, "invalid_request_error"),
    ({"max_tokens": 0}, 400, "invalid_request_error"),
    ({"messages": []}, 400, "invalid_request_error"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_request_error"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        400,
        "invalid_request_error",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_request_error"),
    ({"system": [{"type": "document"}]}, 400, "invalid_request_error"),
    ({"tools": [{"name": "x"}]}, 400, "invalid_request_error"),
    ({"tools": [{"type": "web_search_1", "name": "x"}]}, 400, "invalid_request_error"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "y"}}, 400, "invalid_request_error"),
    ({"temperature": 1.5}, 400, "invalid_request_error"),
    ({"stop_sequences": ["x" * 300]}, 400, "invalid_request_error"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "invalid_request_error"),
    ({"model": "nobody-knows-it"}, 404, "not_found_error"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_anthropics_shape(daemon: RunningDaemon, stream: bool) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for body, status, kind in WRONG:
            response = await client.post("/v1/messages", json={**ASKED, **body, "stream": stream})
            assert response.status_code == status, (body, response.text)
            told = response.json()
            assert (told["type"], told["error"]["type"]) == ("error", kind)
            assert told["error"]["message"]
        missing = await client.post(
            "/v1/messages/count_tokens", json={**ASKED, "model": "nobody-knows-it"}
        )
        assert (missing.status_code, missing.json()["type"]) == (404, "error")
        wrong = await client.get("/v1/messages")
        assert (wrong.status_code, wrong.json()["type"]) == (405, "error")

    with_gateway(daemon.host, use)


# --------------------------------------------------------------------------- llama-server's names


def test_llama_servers_names_say_what_the_daemon_does(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).json() == {"status": "ok"}
        await got(client)
        props = (await client.get("/props")).json()
        assert props["model_alias"] == "simulated"
        assert props["default_generation_settings"]["n_ctx"] > 0
        assert props["is_sleeping"] is False
        slots = (await client.get("/slots")).json()
        assert [slot["is_processing"] for slot in slots if slot["app"] == "http"] == [False]
        figures = await client.get("/metrics")
        assert figures.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = dict(line.rsplit(" ", 1) for line in figures.text.splitlines() if line[0] != "#")
        assert float(lines["llamacpp:tokens_predicted_total"]) >= 8
        assert float(lines["llamacpp:requests_processing"]) == 0
        assert any(name.startswith("pagedd_") for name in lines)

    with_gateway(daemon.host, use)


def test_health_is_503_while_nobody_would_be_served(tmp_path: Path) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        away = await client.get("/health")
        assert away.status_code == 503
        assert away.json()["error"]["type"] == "unavailable_error"
        assert int(away.headers["retry-after"]) >= 1

    with_gateway(f"unix://{tmp_path}/pagedd.sock", use)


def test_the_client_library_is_told_which_string_stopped_a_sample(daemon: RunningDaemon) -> None:
    with daemon.connect() as client:
        free = client.complete("x", max_tokens=8, temperature=0.0)
        assert free.samples[0].stop is None
        stops = ["never said", free.text[3]]
        stopped = client.complete("x", max_tokens=8, temperature=0.0, stop=stops)
        assert stopped.samples[0].stop == free.text[3]

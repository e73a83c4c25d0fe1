"""Ollama's interface over a real daemon on the simulated backend."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pagedd_http.chatting import Conversation
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import with_gateway

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "num_predict": 8}
MODEL = {"model": "simulated"}


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


async def got(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    response = await client.post(f"/api/{path}", json={**MODEL, "stream": False, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(client: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    response = await client.post(f"/api/{path}", json={**MODEL, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def text_of(reply: Any) -> str:
    return str(reply["message"]["content"] if "message" in reply else reply["response"])


def test_generate_and_chat_say_the_same_at_once_and_piece_by_piece(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        asks: list[tuple[str, dict[str, Any]]] = [
            ("generate", {"prompt": "hello"}),
            ("generate", {"prompt": "hello", "raw": True}),
            ("chat", {"messages": HELLO}),
        ]
        for path, asked in asks:
            whole = await got(client, path, options=GREEDY, **asked)
            *pieces, last = await streamed(client, path, options=GREEDY, **asked)
            assert "".join(map(text_of, [*pieces, last])) == text_of(whole)
            assert pieces
            assert not any(piece["done"] for piece in pieces)
            for end in (whole, last):
                assert (end["done"], end["done_reason"]) == (True, "length")
                assert (end["model"], end["eval_count"]) == ("simulated", 8)
                assert end["prompt_eval_count"] >= 5
                spans = [end[f"{name}_duration"] for name in ("load", "prompt_eval", "eval")]
                assert all(isinstance(span, int) and span >= 0 for span in spans)
                assert end["total_duration"] >= end["eval_duration"] > 1_000_000

    with_gateway(daemon.host, use)


def test_generate_with_a_system_prompt_is_the_chat_of_both(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        system = [{"role": "system", "content": "Be terse."}]
        first = await got(client, "generate", prompt="hello", system="Be terse.", options=GREEDY)
        second = await got(client, "chat", messages=[*system, *HELLO], options=GREEDY)
        assert first["response"] == second["message"]["content"]
        assert first["prompt_eval_count"] == second["prompt_eval_count"]

    with_gateway(daemon.host, use)


def test_options_and_formats_hold(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        asked = {"prompt": "x", "raw": True}
        seeded = {"seed": 7, "num_predict": 12}
        first = await got(client, "generate", **asked, options=seeded)
        again = await got(client, "generate", **asked, options={**seeded, "num_ctx": 64})
        text = first["response"]
        assert again["response"] == text
        stopped = await got(client, "generate", **asked, options={**seeded, "stop": [text[3]]})
        assert stopped["response"] == text[: text.index(text[3])]
        assert stopped["done_reason"] == "stop"
        schema = {
            "type": "object",
            "properties": {"ok": {"const": True}},
            "required": ["ok"],
            "additionalProperties": False,
        }
        for path, more in (("generate", asked), ("chat", {"messages": HELLO})):
            made = await got(client, path, **more, format=schema)
            assert json.loads(text_of(made)) == {"ok": True}
        free = await got(client, "generate", **asked, format="json", options={"num_predict": 4})
        assert free["response"].startswith("{")

    with_gateway(daemon.host, use)


def test_logprobs_come_with_their_text(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "options": GREEDY}
        whole = await got(client, "chat", **asked)
        assert len(whole["logprobs"]) == 8
        assert len(whole["logprobs"][0]["top_logprobs"]) == 2
        pieces = await streamed(client, "chat", **asked)
        assert [one for piece in pieces for one in piece.get("logprobs", ())] == whole["logprobs"]

    with_gateway(daemon.host, use)


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_calls_of_tools_are_objects_and_no_text(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama has no way to demand a call, and noise makes none by itself."""
    demanding = functools.partial(Conversation, required=True, parallel=False)
    monkeypatch.setattr("pagedd_http.ollama.bodies.Conversation", demanding)

    async def use(client: httpx.AsyncClient) -> None:
        for stream in (False, True):
            asked = {"messages": HELLO, "tools": [TOOL], "options": {"seed": 3}}
            if stream:
                replies = await streamed(client, "chat", **asked)
            else:
                replies = [await got(client, "chat", **asked)]
            (calls,) = [r["message"]["tool_calls"] for r in replies if "tool_calls" in r["message"]]
            (call,) = calls
            assert call["function"]["name"] == "weather"
            assert call["function"]["arguments"]["city"] in ("Rome", "Oslo")
            assert "".join(map(text_of, replies)) == ""
            assert replies[-1]["done_reason"] == "stop"
            answered = [
                *HELLO,
                {"role": "assistant", "content": "", "tool_calls": calls},
                {"role": "tool", "tool_name": "weather", "content": "sunny"},
            ]
            again = await got(client, "chat", messages=answered, tools=[TOOL])
            assert again["prompt_eval_count"] > replies[-1]["prompt_eval_count"]

    with_gateway(daemon.host, use)


def test_models_are_listed_and_shown(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.get("/api/version")).json()["version"].count(".") == 2
        (listed,) = [
            model
            for model in (await client.get("/api/tags")).json()["models"]
            if model["name"] == "simulated"
        ]
        assert len(listed["digest"]) == 64
        (running,) = (await client.get("/api/ps")).json()["models"]
        assert (running["model"], running["digest"]) == ("simulated", listed["digest"])
        assert running["context_length"] > 0
        for field in ("model", "name"):
            shown = await client.post("/api/show", json={field: "simulated:latest"})
            assert shown.json()["details"] == listed["details"]

    with_gateway(daemon.host, use)


def test_a_model_kept_for_longer_than_there_are_years_expires_in_a_hundred(
    daemon: RunningDaemon,
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        await got(client, "generate", keep_alive=1e12)
        (running,) = (await client.get("/api/ps")).json()["models"]
        assert running["expires_at"].startswith("21")
        await got(client, "generate", keep_alive="10m")

    with_gateway(daemon.host, use)


def test_nothing_to_say_loads_or_unloads_the_model() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        async def there() -> list[str]:
            return [model["name"] for model in (await client.get("/api/ps")).json()["models"]]

        async def gone() -> None:
            while await there():
                pass

        assert await there() == []
        asks: list[tuple[str, dict[str, Any]]] = [("generate", {}), ("chat", {"messages": []})]
        for path, empty in asks:
            unloaded = await got(client, path, keep_alive=0, **empty)
            assert (unloaded["done"], unloaded["done_reason"]) == (True, "unload")
            assert await there() == [], "what was not loaded was loaded to be unloaded"
            (loaded,) = await streamed(client, path, keep_alive="10m", **empty)
            assert (loaded["done"], loaded["done_reason"]) == (True, "load")
            assert await there() == ["simulated"]
            await got(client, path, keep_alive="0s", **empty)
            await gone()

    with running_daemon(model="simulated") as asleep:
        with asleep.connect() as app:
            app.unload()
        with_gateway(asleep.host, use)


def test_looking_never_wakes_a_sleeping_model() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        looks = [
            *[f"/api/{name}" for name in ("version", "tags", "ps")],
            *["/health", "/props", "/slots", "/metrics", "/v1/models"],
        ]
        for path in looks:
            assert (await client.get(path)).status_code == 200, path
        assert (await client.get("/props")).json()["is_sleeping"] is True
        with asleep.control() as control:
            assert (control.status()["state"], control.status()["models"]) == ("asleep", [])
        shown = await client.post("/api/show", json=MODEL)
        assert shown.status_code in (200, 404)  # a simulated model is listed once it is loaded
        with asleep.control() as control:
            assert control.status()["state"] == "asleep"

    with running_daemon(model="simulated") as asleep:
        with asleep.connect() as app:
            app.unload()
        with_gateway(asleep.host, use)


WRONG: list[tuple[str, dict[str, Any], int]] = [
    ("generate", {"model": ""}, 400),
    ("generate", {"prompt": 5}, 400),
    ("generate", {"prompt": "x", "options": {"top_k": "5"}}, 400),
    ("generate", {"prompt": "x", "options": {"temperature": -1}}, 400),
    ("generate", {"prompt": "x", "suffix": "y"}, 400),
    ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, 400),
    ("generate", {"prompt": "x", "images": ["aGk="]}, 400),
    ("generate", {"prompt": "x", "context": [1]}, 400),
    ("generate", {"prompt": "x", "format": "xml"}, 400),
    ("generate", {"prompt": "x", "format": {"type": "nothing"}}, 400),
    ("generate", {"prompt": "x", "keep_alive": "soon"}, 400),
    ("generate", {"prompt": "x" * 9000}, 400),
    ("generate", {"prompt": "x", "model": "nobody-knows-it"}, 404),
    ("chat", {"messages": "hello"}, 400),
    ("chat", {"messages": [{"content": "hello"}]}, 400),
    ("chat", {"messages": [{**HELLO[0], "images": ["aGk="]}]}, 400),
    ("chat", {"messages": HELLO, "model": "nobody-knows-it"}, 404),
    ("show", {"model": "nobody-knows-it"}, 404),
    ("show", {"model": ""}, 400),
    ("pull", {}, 403),
    ("nothing", {}, 404),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_ollamas_shape(daemon: RunningDaemon, stream: bool) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for path, body, status in WRONG:
            asked = {**MODEL, "stream": stream, **body}
            response = await client.post(f"/api/{path}", json=asked)
            assert response.status_code == status, (path, body, response.text)
            assert list(response.json()) == ["error"]
            assert response.json()["error"]
        pulled = await client.post("/api/pull", json={"model": "some one"})
        assert "pagedd pull 'some one'" in pulled.json()["error"]
        away = await client.get("/api/generate")
        assert (away.status_code, list(away.json())) == (405, ["error"])

    with_gateway(daemon.host, use)

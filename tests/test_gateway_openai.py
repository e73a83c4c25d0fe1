"""OpenAI's interface over a real daemon on the simulated backend."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import httpx
import pytest

from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import ask, events, got, run, streamed

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


# ------------------------------------------------------------------------------------------ models


def test_models_are_listed_and_shown_by_name(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        names = [model["id"] for model in listed["data"]]
        assert "simulated" in names
        shown = (await client.get("/v1/models/simulated")).json()
        assert (shown["object"], shown["id"], shown["loaded"]) == ("model", "simulated", True)
        missing = await client.get("/v1/models/nobody/knows:it")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"

    run(daemon, use)


# ------------------------------------------------------------------------------------- completions


def test_a_completion_is_the_same_at_once_and_piece_by_piece(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        whole = await got(client, "completions", prompt="hello", **GREEDY)
        assert whole["object"] == "text_completion"
        assert whole["model"] == "simulated"
        (choice,) = whole["choices"]
        assert choice["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == 8
        pieces = await streamed(client, "completions", prompt="hello", **GREEDY)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        assert len({piece["id"] for piece in pieces}) == 1
        assert all("usage" not in piece for piece in pieces)

    run(daemon, use)


def test_every_prompt_gets_its_samples_in_order(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        several = await got(client, "completions", prompt=["one", "two"], n=2, seed=5, max_tokens=6)
        texts = {choice["index"]: choice["text"] for choice in several["choices"]}
        assert sorted(texts) == [0, 1, 2, 3]
        alone = await got(client, "completions", prompt="two", n=2, seed=5, max_tokens=6)
        assert [choice["text"] for choice in alone["choices"]] == [texts[2], texts[3]]
        assert several["usage"]["prompt_tokens"] == 6
        ids = [[ord(c) for c in text] for text in ("one", "two")]
        pieces = await streamed(client, "completions", prompt=ids, n=2, seed=5, max_tokens=6)
        again = dict.fromkeys(range(4), "")
        for piece in pieces:
            for choice in piece["choices"]:
                again[choice["index"]] += choice["text"]
        assert again == texts

    run(daemon, use)


def test_echo_and_logprobs_tell_of_prompt_and_text_token_by_token(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        asked = {"prompt": "hé", "echo": True, "logprobs": 2, **GREEDY}
        (choice,) = (await got(client, "completions", **asked))["choices"]
        told = choice["logprobs"]
        assert choice["text"].startswith("hé")
        assert len(told["tokens"]) == len(told["token_logprobs"]) == 3 + 8
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert len(told["top_logprobs"][-1]) == 2
        assert told["text_offset"][:2] == [0, 1]
        pieces = [p["choices"][0] for p in await streamed(client, "completions", **asked)]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            parts = [piece["logprobs"][name] for piece in pieces if piece["logprobs"]]
            assert list(chain.from_iterable(parts)) == told[name]

    run(daemon, use)


def test_stop_seed_bias_and_best_of_do_what_they_say(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        first = await got(client, "completions", prompt="x", seed=7, max_tokens=12)
        again = await got(client, "completions", prompt="x", seed=7, max_tokens=12)
        text = first["choices"][0]["text"]
        assert again["choices"][0]["text"] == text
        stopped = await got(client, "completions", prompt="x", seed=7, max_tokens=12, stop=text[3])
        assert stopped["choices"][0]["text"] == text[: text.index(text[3])]
        assert stopped["choices"][0]["finish_reason"] == "stop"
        bias = {str(ord("q")): 100}
        forced = await got(client, "completions", prompt="x", logit_bias=bias, **GREEDY)
        assert forced["choices"][0]["text"] == "q" * 8
        best = await got(client, "completions", prompt="x", best_of=4, n=2, seed=1, max_tokens=4)
        assert len(best["choices"]) == 2
        assert best["usage"]["completion_tokens"] == 16

    run(daemon, use)


def test_usage_says_what_was_cached_and_comes_last_where_asked_for(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        prompt = "a prefix that is longer than two blocks of sixteen tokens"
        asked = {"prompt": prompt, "stream_options": {"include_usage": True}, **GREEDY}
        await got(client, "completions", prompt=prompt, **GREEDY)
        *pieces, last = await streamed(client, "completions", **asked)
        assert all(piece["usage"] is None for piece in pieces)
        assert last["choices"] == []
        usage = last["usage"]
        assert usage["prompt_tokens"] == len(prompt)
        assert usage["total_tokens"] == len(prompt) + 8
        assert 32 <= usage["prompt_tokens_details"]["cached_tokens"] < len(prompt)

    run(daemon, use)


# -------------------------------------------------------------------------------------------- chat


def test_a_chat_is_the_same_at_once_and_piece_by_piece(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        whole = await got(client, "chat/completions", messages=HELLO, **GREEDY)
        assert whole["object"] == "chat.completion"
        (choice,) = whole["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] == "length"
        pieces = await streamed(client, "chat/completions", messages=HELLO, **GREEDY)
        assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
        deltas = [piece["choices"][0]["delta"] for piece in pieces]
        assert deltas[0]["role"] == "assistant"
        assert all("role" not in delta for delta in deltas[1:])
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == choice["message"]["content"]
        assert pieces[-1]["choices"][0]["finish_reason"] == "length"

    run(daemon, use)


def test_parts_of_text_and_developers_are_read_as_templates_know_them(
    daemon: RunningDaemon,
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        plain = [{"role": "system", "content": "Be terse."}, *HELLO]
        parts = [
            {"role": "developer", "content": [{"type": "text", "text": "Be terse."}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
            },
        ]
        first = await got(client, "chat/completions", messages=plain, **GREEDY)
        second = await got(client, "chat/completions", messages=parts, **GREEDY)
        assert first["choices"][0]["message"] == second["choices"][0]["message"]
        assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]

    run(daemon, use)


def test_chat_logprobs_have_bytes_and_alternatives(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, **GREEDY}
        (choice,) = (await got(client, "chat/completions", **asked))["choices"]
        content = choice["logprobs"]["content"]
        assert len(content) == 8
        text = bytes(chain.from_iterable(token["bytes"] for token in content))
        assert text.decode("utf-8", "replace").startswith(choice["message"]["content"][:6])
        assert all(len(token["top_logprobs"]) == 2 for token in content)
        pieces = [p["choices"][0] for p in await streamed(client, "chat/completions", **asked)]
        parts = [piece["logprobs"]["content"] for piece in pieces if piece["logprobs"]]
        assert list(chain.from_iterable(parts)) == content

    run(daemon, use)


# --------------------------------------------------------------------------------------- responses


def test_a_response_is_the_same_at_once_and_as_events(daemon: RunningDaemon) -> None:
    asked = {"input": "hello", "instructions": "Be terse.", "temperature": 0}

    async def use(client: httpx.AsyncClient) -> None:
        whole = await got(client, "responses", max_output_tokens=8, **asked)
        assert (whole["object"], whole["status"]) == ("response", "incomplete")
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
        assert whole["usage"]["output_tokens"] == 8
        text = whole["output"][0]["content"][0]["text"]
        response = await ask(client, "responses", stream=True, max_output_tokens=8, **asked)
        found = events(response)
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        kinds = [event["type"] for event in found]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.incomplete"
        deltas = [e["delta"] for e in found if e["type"] == "response.output_text.delta"]
        assert "".join(deltas) == text
        last = found[-1]["response"]
        assert last["output"][0]["content"] == whole["output"][0]["content"]
        parts = [
            {"role": "developer", "content": "Be terse."},
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "hello"}],
            },
        ]
        again = await got(client, "responses", input=parts, temperature=0, max_output_tokens=8)
        assert again["output"][0]["content"] == whole["output"][0]["content"]
        shape: dict[str, Any] = {
            "type": "object",
            "properties": {"a": {"enum": [1]}},
            "required": ["a"],
        }
        shape["additionalProperties"] = False
        kept = {"format": {"type": "json_schema", "name": "x", "schema": shape, "strict": True}}
        done = await got(client, "responses", input="x", text=kept)
        assert done["output"][0]["content"][0]["text"] == '{"a":1}'
        assert done["status"] == "completed"

    run(daemon, use)


def test_text_becomes_tokens_and_tokens_text(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        told = (await client.post("/tokenize", json={"content": "hé"})).json()
        assert told == {"tokens": [104, 195, 169], "count": 3}
        assert (await client.post("/tokenize", json={"prompt": "hé"})).json() == told
        back = await client.post("/detokenize", json={"tokens": told["tokens"]})
        assert back.json()["content"] == "hé"
        for path, body, status in (
            ("/tokenize", {}, 400),
            ("/tokenize", {"content": "x", "model": "nobody"}, 404),
            ("/detokenize", {"tokens": [-1]}, 400),
            ("/detokenize", {"tokens": [9999]}, 400),
        ):
            response = await client.post(path, json=body)
            assert response.status_code == status, response.text

    run(daemon, use)


# ------------------------------------------------------------------------------------------ errors


WRONG: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("completions", {"prompt": "x", "max_tokens": "5"}, 400, "invalid_body", "max_tokens"),
    ("completions", {"prompt": []}, 400, "invalid_request", "prompt"),
    ("completions", {"prompt": "x", "suffix": "y"}, 400, "invalid_request", "suffix"),
    ("completions", {"prompt": "x", "n": 17}, 400, "invalid_body", "n"),
    ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "invalid_request", "logit_bias"),
    ("completions", {"prompt": [70_000]}, 400, "E_TOKEN_ID", None),
    ("completions", {"prompt": "x" * 9000}, 400, "context_length_exceeded", None),
    ("completions", {"prompt": "x", "model": "gpt-4o"}, 404, "model_not_found", None),
    ("responses", {"input": []}, 400, "invalid_body", None),
    ("responses", {"input": [{"type": "reasoning"}]}, 400, "unsupported_content", "input.0"),
    ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, 400, "unsupported", "tools"),
    ("responses", {"input": "x", "previous_response_id": "y"}, 400, "unsupported", None),
    ("chat/completions", {"messages": []}, 400, "invalid_body", "messages"),
    ("chat/completions", {"messages": [{}]}, 400, "invalid_request", "messages.0.role"),
    ("chat/completions", {"messages": HELLO, "n": 0}, 400, "invalid_body", "n"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "unsupported_content",
        "messages.0.content",
    ),
    (
        "chat/completions",
        {"messages": HELLO, "response_format": {"type": "json_schema"}},
        400,
        "invalid_request",
        "response_format.json_schema",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_openais_shape(daemon: RunningDaemon, stream: bool) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for path, body, status, code, param in WRONG:
            response = await ask(client, path, stream=stream, **body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (status, code), (body, error)
            assert error["type"] == "invalid_request_error"
            assert error["message"]
            assert param is None or error["param"] == param

    run(daemon, use)


def test_paths_methods_and_broken_bodies_are_refused(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for method, path, content, status in (
            ("GET", "/nowhere", b"", 404),
            ("PUT", "/v1/models", b"", 405),
            ("GET", "/v1/completions", b"", 405),
            ("POST", "/v1/completions", b"", 400),
            ("POST", "/v1/completions", b"{", 400),
            ("POST", "/v1/completions", b"[]", 400),
            ("POST", "/v1/completions", b'{"prompt": "\xff"}', 400),
            ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
            ("POST", "/v1/completions", b"[" * 100_000, 400),
            ("POST", "/v1/completions", b'{"temperature": NaN, "prompt": "x"}', 400),
        ):
            response = await client.request(method, path, content=content)
            assert response.status_code == status, (path, content[:20], response.text)
            assert response.json()["error"]["message"]

    run(daemon, use)

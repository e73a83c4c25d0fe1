"""The ``ollama`` package."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import ollama
import pytest

MODEL = "simulated"
HELLO: Any = [{"role": "user", "content": "hello"}]
OPTIONS: Any = {"temperature": 0, "num_predict": 8}
ANSWER: Any = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


def weather(city: str) -> str:
    """Says what it is like in a city.

    Args:
        city: Its name.
    """
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def client(gateway: str) -> ollama.Client:
    return ollama.Client(host=gateway)


def test_models(client: ollama.Client) -> None:
    assert MODEL in [model.model for model in client.list().models]
    (running,) = client.ps().models
    assert running.model == MODEL
    assert client.show(MODEL).capabilities == ["completion", "tools"]


def test_generate(client: ollama.Client) -> None:
    whole = client.generate(MODEL, "hello", options=OPTIONS)
    assert (whole.done_reason, whole.eval_count) == ("length", 8)
    assert whole.total_duration is not None
    pieces = list(client.generate(MODEL, "hello", options=OPTIONS, stream=True))
    assert "".join(piece.response for piece in pieces) == whole.response
    assert pieces[-1].done


def test_chat(client: ollama.Client) -> None:
    whole = client.chat(MODEL, HELLO, options=OPTIONS, keep_alive="5m", think=False)
    pieces = list(client.chat(MODEL, HELLO, options=OPTIONS, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].eval_count == 8
    made = client.chat(MODEL, HELLO, format=ANSWER)
    assert json.loads(made.message.content or "")["answer"] in ("yes", "no")


def test_chat_with_tools(client: ollama.Client) -> None:
    called: Any = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_name": "weather", "content": weather("Rome")},
    ]
    done = client.chat(MODEL, messages, tools=[weather], options=OPTIONS)
    assert done.eval_count == 8


def test_embed(client: ollama.Client) -> None:
    made = client.embed(MODEL, ["hello", "world"])
    assert len(made.embeddings) == 2
    assert list(client.embeddings(MODEL, "hello").embedding)


def test_errors(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as unknown:
        client.chat("nobody-knows-it", HELLO)
    assert unknown.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="pagedd pull"):
        client.pull("some-model")
    with pytest.raises(ollama.ResponseError):
        list(client.generate(MODEL, "x" * 9000, stream=True))


def test_asyncio(gateway: str) -> None:
    async def main() -> None:
        client = ollama.AsyncClient(host=gateway)
        stream = await client.chat(MODEL, HELLO, options=OPTIONS, stream=True)
        pieces = [piece async for piece in stream]
        assert pieces[-1].done_reason == "length"

    asyncio.run(main())

"""The ``anthropic`` package."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

MODEL = "simulated"
HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Says what it is like in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(gateway: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway, api_key="none", max_retries=0)


def test_messages(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 8, "messages": HELLO}
    asked["extra_body"] = {"temperature": 0}
    whole = client.messages.create(**asked, system="Be terse.")
    (block,) = whole.content
    assert block.type == "text"
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 8
    with client.messages.stream(**asked, system="Be terse.") as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.content[0].type == "text"
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 8


def test_tools(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    asked: Any = {"model": MODEL, "max_tokens": 200, "tools": [WEATHER], "tool_choice": choice}
    done = client.messages.create(**asked, messages=HELLO)
    (call,) = done.content
    assert call.type == "tool_use"
    assert done.stop_reason == "tool_use"
    with client.messages.stream(**asked, messages=HELLO) as stream:
        (again,) = stream.get_final_message().content
    assert again.type == "tool_use"
    for one in (call, again):
        assert one.input["city"] in ("Rome", "Oslo")
    answer: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": done.content},
        {"role": "user", "content": [answer]},
    ]
    counted = client.messages.count_tokens(model=MODEL, messages=messages, tools=[WEATHER])
    assert counted.input_tokens > 20


def test_errors(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 8, "messages": HELLO}
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**asked, "model": "nobody-knows-it"})
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**{**asked, "messages": [{"role": "user", "content": "x" * 9000}]})
    image: Any = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    content: Any = [{"type": "image", "source": image}]
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        client.messages.create(**{**asked, "messages": [{"role": "user", "content": content}]})

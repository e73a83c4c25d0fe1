"""The ``openai`` package, and what is built upon it: langchain-openai, litellm, llm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

MODEL = "simulated"
HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says what it is like in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ANSWER: Any = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(gateway: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completions(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "hello", "max_tokens": 5, "temperature": 0}
    done = client.completions.create(**asked, logprobs=2, n=2)
    assert len(done.choices) == 2
    assert done.choices[0].logprobs is not None
    assert done.usage is not None
    assert done.usage.completion_tokens == 10
    stream = client.completions.create(**asked, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


def test_chat(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0}
    done = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].logprobs is not None
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == done.choices[0].message.content
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["hello", "world"]
    made = client.embeddings.create(model=MODEL, input=texts)  # the package asks for base64
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [one.embedding for one in made.data] == [one.embedding for one in plain.data]
    assert made.usage.total_tokens > 2


def test_chat_with_tools(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": [WEATHER]}
    asked["parallel_tool_calls"] = False
    done = client.chat.completions.create(**asked, tool_choice="required")
    choice = done.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    call: Any = choice.message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history: Any = [*HELLO, choice.message, result]
    more = client.chat.completions.create(model=MODEL, messages=history, max_tokens=5)
    assert more.choices[0].message.content
    with client.chat.completions.stream(**asked, tool_choice="required") as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls


def test_response_format(client: openai.OpenAI) -> None:
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": ANSWER, "strict": True},
    }
    done = client.chat.completions.create(model=MODEL, messages=HELLO, response_format=wanted)
    assert json.loads(done.choices[0].message.content or "")["answer"] in ("yes", "no")


def test_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": "hello", "max_output_tokens": 6, "temperature": 0}
    done = client.responses.create(**asked)
    assert done.output_text
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == done.output_text


def test_errors_become_the_packages_own(client: openai.OpenAI, gateway: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-none", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=MODEL, prompt="x", n=100)
    assert wrong.value.param == "n"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="x" * 20_000)
    assert long.value.code == "context_length_exceeded"
    revoked = openai.OpenAI(base_url=f"{gateway}/v1", api_key="pagedd-none", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        revoked.models.list()


def test_langchain(gateway: str) -> None:
    from langchain_openai import ChatOpenAI

    chat: Any = ChatOpenAI(base_url=f"{gateway}/v1", api_key="none", model=MODEL, max_tokens=200)
    assert chat.invoke("hello").usage_metadata["output_tokens"] > 0
    assert "".join(piece.content for piece in chat.stream("hello"))
    tools = chat.bind_tools([WEATHER], tool_choice="weather", parallel_tool_calls=False)
    (call, *_) = tools.invoke("hello").tool_calls
    assert call["args"]["city"] in ("Rome", "Oslo")
    schema = {"title": "answer", "description": "One.", **ANSWER}
    kept = chat.with_structured_output(schema, method="json_schema", strict=True)
    assert kept.invoke("hello")["answer"] in ("yes", "no")


def test_litellm(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    asked: Any = {
        "model": f"openai/{MODEL}",
        "messages": HELLO,
        "api_base": f"{gateway}/v1",
        "api_key": "none",
        "max_tokens": 8,
        "temperature": 0,
    }
    assert litellm.completion(**asked).usage.completion_tokens == 8
    pieces = list(litellm.completion(**asked, stream=True))
    assert pieces[-1].choices[0].finish_reason == "length"
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**asked, "model": "openai/none"}, num_retries=0)


def test_llm(gateway: str, tmp_path: Path) -> None:
    told = f"- model_id: local\n  model_name: {MODEL}\n  api_base: {gateway}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(told)
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    options = ("-o", "max_tokens", "9", "-o", "temperature", "0")
    for more in ((), ("--no-stream",)):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "local", *more, *options, "hello"],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()

"""The whole daemon with the real model: llama.cpp, tokeniser, chat template, several apps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pagedd
from tests.support.daemon import RunningDaemon, running_daemon

pytestmark = pytest.mark.model

POOL_TOKENS = 512


@pytest.fixture(scope="module")
def daemon(smollm2_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(
        model=str(smollm2_path), kv_tokens=POOL_TOKENS, context=POOL_TOKENS - 16, threads=1
    ) as running:
        yield running


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[pagedd.Client]:
    with daemon.connect("end-to-end") as connected:
        yield connected


def test_the_model_says_what_it_is_known_to_say(client: pagedd.Client) -> None:
    done = client.complete("The capital of France is", temperature=0, max_tokens=12)
    assert "Paris" in done.text
    assert client.detokenize(done.samples[0].tokens) == done.text


def test_a_stop_string_cuts_the_text_where_it_begins(client: pagedd.Client) -> None:
    options: pagedd.GenerateOptions = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    whole = client.complete("The capital of France is", **options).text
    stop = whole[6:9]
    options["stop"] = [stop]
    done = client.complete("The capital of France is", **options)
    assert done.text == whole[: whole.find(stop)]
    assert done.samples[0].reason == "stop"
    # Ids may run ahead of text that is held back; what is counted ends before the stop string.
    assert client.detokenize(done.samples[0].tokens[: done.usage.generated_tokens]) == done.text


def test_the_greedy_token_is_the_likeliest(client: pagedd.Client) -> None:
    done = client.complete("One, two, three,", temperature=0, max_tokens=6, logprobs=3)
    sample = done.samples[0]
    assert sample.logprobs is not None
    assert [entry.top[0][0] for entry in sample.logprobs] == list(sample.tokens)
    assert all(entry.logprob == entry.top[0][1] <= 0 for entry in sample.logprobs)


def test_replies_match_the_schema_they_were_asked_for(client: pagedd.Client) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
        },
        "required": ["city", "sizes"],
        "additionalProperties": False,
    }
    asked = [{"role": "user", "content": "Describe a city as JSON."}]
    with client.chat(asked, json_schema=schema, n=3, max_tokens=200, seed=1) as stream:
        done = stream.wait()
    for sample in done.samples:
        reply = json.loads(sample.text)
        assert sample.reason == "stop"
        assert set(reply) == {"city", "sizes"}
        assert len(reply["city"]) <= 20
        assert len(reply["sizes"]) <= 3
    with pytest.raises(pagedd.InvalidRequest) as caught:
        client.complete("x", regex="(((")
    assert caught.value.code == "E_GRAMMAR"
    done = client.complete("Is the sky blue? Answer:", regex=" (yes|no)", temperature=0)
    assert done.text in (" yes", " no")


def test_a_conversation_finds_its_kv_and_a_fork_goes_its_own_way(client: pagedd.Client) -> None:
    chat = client.session(system="You are terse. Answer in one short sentence, always.")
    with chat.say("Name a river in Europe.", max_tokens=24, temperature=0) as first:
        assert first.text()
    with chat.say("Name another one.", max_tokens=24, temperature=0) as second:
        assert second.text()
        assert second.result.usage.cached_tokens >= 32
    branch = chat.fork()
    with branch.say("Name a mountain.", max_tokens=24, temperature=0) as third:
        third.wait()
        assert third.result.usage.cached_tokens > second.result.usage.cached_tokens
    assert (chat.close().turns, branch.close().turns) == (2, 1)


def test_apps_that_need_three_times_the_pool_all_finish(daemon: RunningDaemon) -> None:
    # There are no figures before the model was first asked something.
    before = _stats(daemon)["pager"].get("preemptions_swap", 0)

    def one(number: int) -> pagedd.Completion:
        source = random.Random(number)
        prompt = [source.randrange(1000, 40_000) for _ in range(64)]
        with daemon.connect(f"app-{number % 4}") as client:
            return client.complete(prompt, max_tokens=128, ignore_eos=True, timeout=240)

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(one, range(8)))
    assert [len(d.samples[0].tokens) for d in done] == [128] * 8
    assert {d.samples[0].reason for d in done} == {"length"}
    after = _stats(daemon)
    assert after["pager"]["preemptions_swap"] > before
    assert after["kv"]["gpu"]["used"] == 0


def _stats(daemon: RunningDaemon) -> dict[str, Any]:
    with daemon.control() as control:
        return control.stats()

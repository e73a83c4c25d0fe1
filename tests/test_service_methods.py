"""best_of, beams, echo and prompt log-probabilities: what goes together, and what clients get."""

from __future__ import annotations

from typing import Any

import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.held import Held
from pagedd_daemon.front.wire import parse_data
from tests.support.front import Front, begun, ready, run


def asked(**fields: Any) -> WireError | None:
    """What is wrong with a request, if anything."""
    message = {"v": 1, "verb": "generate", "id": "a", "prompt": "x", **fields}
    try:
        parse_data(message)
    except WireError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("fields", "field", "figures"),
    [
        ({"beam_width": 4, "n": 5}, "n", {"n": 5, "beam_width": 4}),
        ({"beam_width": 4, "stream": True}, "stream", {"beam_width": 4}),
        ({"beam_width": 4, "temperature": 0.7}, "temperature", {"beam_width": 4}),
        ({"beam_width": 4, "top_k": 5}, "top_k", {"beam_width": 4}),
        ({"beam_width": 4, "presence_penalty": 0.5}, "presence_penalty", {"beam_width": 4}),
        ({"beam_width": 4, "logit_bias": {3: 1.0}}, "logit_bias", {"beam_width": 4}),
        ({"beam_width": 4, "stop": ["x"]}, "stop", {"beam_width": 4}),
        ({"beam_width": 4, "regex": "a+"}, "regex", {"beam_width": 4}),
        ({"beam_width": 4, "best_of": 4}, "best_of", {"beam_width": 4}),
        ({"length_penalty": 1.0}, "length_penalty", {}),
        ({"early_stopping": True}, "early_stopping", {}),
        ({"beam_width": 2, "early_stopping": "sometimes"}, "early_stopping", {}),
        ({"best_of": 2, "n": 3}, "n", {"n": 3, "best_of": 2}),
        ({"best_of": 3, "n": 2, "stream": True}, "stream", {"n": 2, "best_of": 3}),
    ],
)
def test_what_does_not_go_together_is_refused_with_field_and_figures(
    fields: dict[str, Any], field: str, figures: dict[str, int]
) -> None:
    error = asked(**fields)
    assert error is not None
    assert error.code == "E_FIELD"
    assert error.details["field"].startswith(field)
    assert figures.items() <= error.details.items()


@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 16, "n": 16, "length_penalty": 0.0, "early_stopping": "never"},
        {"beam_width": 3, "temperature": 0.0, "top_p": 1.0, "stop": [], "stream": False},
        {"best_of": 16, "n": 2, "temperature": 1.0},
        {"best_of": 2, "n": 2, "stream": True},
        {"echo": True, "logprobs": 5, "prompt_logprobs": 0},
    ],
)
def test_what_goes_together_is_taken(fields: dict[str, Any]) -> None:
    assert asked(**fields) is None


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("beam_width", 17, "beam_width"),
        ("best_of", 17, "best_of"),
        ("prompt_logprobs", 21, "logprobs"),
    ],
)
def test_widths_are_bounded_by_the_table_of_limits(field: str, value: int, limit: str) -> None:
    error = asked(**{field: value})
    assert error is not None
    assert error.code == "E_LIMIT"
    assert (error.details["limit"], error.details["value"]) == (limit, value)


def test_the_best_of_some_samples_are_those_with_the_highest_mean() -> None:
    held = Held(4, ranked=True, logprobs=False)
    held.take(0, "a", pack_ids([1, 2]), [[-1.0, []], [-3.0, []]])
    held.take(1, "b", pack_ids([1]), [[-2.0, []]])
    held.take(2, "c", pack_ids([1]), [[-0.5, []]])
    held.take(2, "d", pack_ids([7]), [[-0.7, []]])
    assert held.best(4) == [2, 0, 1, 3]  # the first of equals; one without a token last
    assert held.chunks(2) == [{"text": "cd", "tokens": pack_ids([1, 7])}]


def test_the_client_gets_the_best_samples_when_all_have_ended() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request = client.generate(n=2, best_of=3)
            submit = await engine.hears(m.Submit)
            assert (submit.n, submit.sampling["logprobs"]) == (3, 0)
            for index, logprob in enumerate([-2.0, -1.0, -3.0]):
                logprobs: list[Any] = [(logprob, [])] * 2
                engine.write(submit.rid, f"s{index}", index, logprobs=logprobs)
            engine.close_request(submit.rid, "length", n=3, generated=6)
            done = await client.end(request)
            assert [e["type"] for e in client.events(request)] == [
                "accepted", "chunk", "chunk", "done",
            ]  # fmt: skip
            assert [client.text(request, index) for index in (0, 1)] == ["s1", "s0"]
            assert [one["score"] for one in done["finish"]] == [-1.0, -2.0]
            assert done["usage"]["generated_tokens"] == 6
            assert "logprobs" not in client.events(request)[1]

    run(scenario())


def test_a_search_is_handed_to_the_engine_and_its_texts_come_with_their_scores() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request = client.generate(n=2, beam_width=4, length_penalty=0.5)
            submit = await engine.hears(m.Submit)
            assert submit.n == 2
            assert submit.beams == {"width": 4, "length_penalty": 0.5, "early_stopping": False}
            outputs = [
                m.Output(submit.rid, index, pack_ids(list(text)))
                for index, text in enumerate([b"best", b"next"])
            ]
            ended = [m.Ended(submit.rid, index, "stop", -1.5 - index) for index in range(2)]
            closed = [m.Closed(submit.rid, 3, 0, 8, 1.0, 2.0, 3.0, 4.0)]
            engine.say(m.StepReport(3, outputs=outputs, ended=ended, closed=closed))
            done = await client.end(request)
            assert [client.text(request, index) for index in (0, 1)] == ["best", "next"]
            assert [one["score"] for one in done["finish"]] == [-1.5, -2.5]

    run(scenario())


def test_what_shall_not_be_streamed_comes_at_the_end_in_one_piece() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stream=False, stop=["#"])
            engine.write(rid, "ab")
            engine.write(rid, "c#d")
            await engine.hears(m.Finish)
            engine.close_request(rid, "stop", generated=3)
            await client.end(request)
            chunks = [e for e in client.events(request) if e["type"] == "chunk"]
            assert [chunk["text"] for chunk in chunks] == ["abc"]
            assert "score" not in client.events(request)[-1]["finish"][0]

    run(scenario())


def test_an_echo_is_the_prompt_and_comes_once() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, tokens="añb", echo=True)
            engine.close_request(rid)
            await client.end(request)
            (prompt,) = [e for e in client.events(request) if e["type"] == "prompt"]
            assert (prompt["start"], prompt["text"]) == (0, "añb")
            assert prompt["tokens"] == pack_ids(list("añb".encode()))
            assert "logprobs" not in prompt

    run(scenario())


def test_scores_of_a_prompt_come_in_parts_each_position_once_though_an_engine_dies() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request = client.generate("abcdef", echo=True, logprobs=1)
            submit = await engine.hears(m.Submit)
            assert submit.prompt_logprobs == 1
            entry = (-1.0, [(5, -0.5)])
            engine.say(m.StepReport(1, prompts=[m.PromptScores(submit.rid, 1, [entry] * 2)]))
            await client.until(request, "prompt")
            engine.die()
            engine = await front.source.engine(1)
            submit = await engine.hears(m.Submit)
            assert submit.prompt_logprobs == 1
            for start, count in [(1, 3), (4, 2)]:
                scores = m.PromptScores(submit.rid, start, [entry] * count)
                engine.say(m.StepReport(1, prompts=[scores]))
            engine.write(submit.rid, "x", logprobs=[entry])
            engine.close_request(submit.rid)
            await client.end(request)
            parts = [e for e in client.events(request) if e["type"] == "prompt"]
            assert [part["start"] for part in parts] == [0, 3, 4]
            assert "".join(part["text"] for part in parts) == "abcdef"
            logprobs = [one for part in parts for one in part["logprobs"]]
            assert logprobs == [None] + [[-1.0, [[5, -0.5]]]] * 5

    run(scenario())


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, tokens="a", prompt_logprobs=2)
            engine.close_request(rid)
            await client.end(request)
            (prompt,) = [e for e in client.events(request) if e["type"] == "prompt"]
            assert (prompt["text"], prompt["logprobs"]) == ("", [None])

    run(scenario())

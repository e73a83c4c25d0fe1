"""Requests that generate: what the client gets and what the engine is told."""

from __future__ import annotations

import dataclasses

import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.detokenizer import pack_ids, unpack_ids
from pagedd_daemon.front.limits import DEFAULT_LIMITS
from pagedd_daemon.params import SamplingParams, StopParams
from tests.support.front import Front, begun, ready, run


def test_a_request_is_accepted_streamed_and_done_without_a_gap() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request = client.generate("abc", seed=7, max_tokens=5)
            submit = await engine.hears(m.Submit)
            assert SamplingParams(**submit.sampling).seed == 7
            assert StopParams(**submit.stop).max_tokens == 5
            assert submit.prompt == pack_ids(list(b"abc"))
            assert (submit.klass, submit.n) == (1, 1)
            engine.write(submit.rid, "he")
            engine.write(submit.rid, "y")
            engine.close_request(submit.rid, "length", generated=3)
            done = await client.end(request)
            events = client.events(request)
            assert [e["seq"] for e in events] == [0, 1, 2, 3]
            assert [e["type"] for e in events] == ["accepted", "chunk", "chunk", "done"]
            assert events[0] == {
                "id": request,
                "seq": 0,
                "type": "accepted",
                "prompt_tokens": 3,
                "seed": 7,
                "model": "a",
            }
            assert events[1]["text"] == "he"
            assert events[1]["tokens"] == pack_ids(list(b"he"))
            assert done["finish"] == [{"index": 0, "reason": "length", "text": ""}]
            assert done["usage"] == {
                "prompt_tokens": 3,
                "cached_tokens": 1,
                "generated_tokens": 3,
            }
            assert done["timings"]["ttft_ms"] >= 4.0

    run(scenario())


@pytest.mark.parametrize(
    "parts", [["x#STO", "P#y"], ["x#", "S", "T", "O", "P", "#y"], ["x#STOP#y"]]
)
def test_a_stop_string_over_several_tokens_ends_the_text_and_is_reported_with_its_count(
    parts: list[str],
) -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stop=["#STOP#", "never"])
            for part in parts:
                engine.write(rid, part)
            finish = await engine.hears(m.Finish)
            assert (finish.rid, finish.index, finish.tokens) == (rid, 0, 1)
            engine.write(rid, "computed before the engine knew")
            engine.close_request(rid, "stop", generated=1)
            done = await client.end(request)
            assert client.text(request) == "x"
            assert done["finish"][0]["reason"] == "stop"
            assert done["finish"][0]["stop"] == "#STOP#"
            assert engine.count(m.Finish) == 1

    run(scenario())


def test_no_stop_string_is_honoured_before_min_tokens() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stop=["."], min_tokens=4)
            engine.write(rid, "a.b")
            engine.write(rid, ".c")  # straddles: the fourth token is the second full stop
            engine.write(rid, "d.e")
            finish = await engine.hears(m.Finish)
            assert finish.tokens == 6
            engine.close_request(rid, "stop")
            await client.end(request)
            assert client.text(request) == "a.b.cd"

    run(scenario())


def test_a_character_split_at_min_tokens_comes_out_whole() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stop=["."], min_tokens=2)
            data = "a€b.".encode()
            engine.write(rid, data[:2])
            engine.write(rid, data[2:])
            finish = await engine.hears(m.Finish)
            assert finish.tokens == 5
            engine.close_request(rid, "stop")
            await client.end(request)
            assert client.text(request) == "a€b"

    run(scenario())


def test_bytes_of_an_unfinished_character_are_held_back_and_come_with_done() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            engine.write(rid, "é".encode()[:1])
            chunk = await client.until(request, "chunk")
            assert (chunk["text"], chunk["tokens"]) == ("", pack_ids([0xC3]))
            engine.close_request(rid)
            done = await client.end(request)
            assert done["finish"][0]["text"] == "\ufffd"

    run(scenario())


def test_samples_are_independent_and_done_comes_once() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, n=2, stop=["!"])
            engine.write(rid, "one!", index=0)
            engine.write(rid, "two", index=1)
            await engine.hears(m.Finish)
            engine.close_request(rid, "length", n=2, generated=6)
            done = await client.end(request)
            assert client.text(request, 0) == "one"
            assert client.text(request, 1) == "two"
            assert [f["reason"] for f in done["finish"]] == ["stop", "length"]

    run(scenario())


def test_usage_counts_no_token_behind_a_stop_string_that_the_engine_has_not_heard_of() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stop=["!"], max_tokens=4)
            engine.write(rid, "ab!d")
            engine.close_request(rid, "length", generated=4)  # it ended before `Finish` came
            done = await client.end(request)
            assert client.text(request) == "ab"
            assert done["usage"]["generated_tokens"] == 2
            (app,) = (await front.status())["apps"]
            assert app["generated_tokens"] == 2

    run(scenario())


def test_logprobs_are_cut_with_the_tokens() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stop=["."], logprobs=1)
            entry = (-0.5, [(97, -0.5)])
            engine.write(rid, "a.b", logprobs=[entry] * 3)
            chunk = await client.until(request, "chunk")
            assert len(chunk["logprobs"]) == len(unpack_ids(chunk["tokens"])) == 1

    run(scenario())


def test_max_tokens_is_cut_to_the_context_and_reaching_it_is_reason_context() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request = client.generate(b"x" * 990, max_tokens=256)
            submit = await engine.hears(m.Submit)
            assert submit.stop["max_tokens"] == 10
            engine.close_request(submit.rid, "length")
            assert (await client.end(request))["finish"][0]["reason"] == "context"

    run(scenario())


def test_a_request_that_cannot_fit_is_refused_with_the_figures() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, _ = await ready(front)
            error = await client.end(client.generate(b"x" * 1000))
            assert error["code"] == "E_TOO_LONG"
            assert error["details"] == {"prompt_tokens": 1000, "context_tokens": 1000}
            error = await client.end(client.ask(r.Generate, tokens=pack_ids([1, 258])))
            assert error["code"] == "E_TOKEN_ID"
            assert error["details"] == {"token": 258, "vocab_size": 258}
            error = await client.end(client.generate("a", logit_bias={300: 1.0}))
            assert error["code"] == "E_TOKEN_ID"

    run(scenario())


def test_a_prompt_larger_than_the_whole_pool_never_fits() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.ready = dataclasses.replace(
                front.source.ready, context_tokens=64, pool_tokens=64
            )
            client, _ = await ready(front)
            error = await client.end(client.generate(b"x" * 64))
            assert error["code"] == "E_NEVER_FITS"
            assert error["details"] == {"need_tokens": 65, "pool_tokens": 64}

    run(scenario())


def test_a_refusal_of_the_engine_reaches_the_client() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            details = {"need_tokens": 5, "pool_tokens": 4}
            engine.say(m.StepReport(1, rejected=[m.Rejected(rid, "E_NEVER_FITS", "no", details)]))
            error = await client.end(request)
            assert (error["code"], error["details"]) == ("E_NEVER_FITS", details)

    run(scenario())


def test_too_many_requests_at_once_are_refused_and_the_rest_goes_on() -> None:
    async def scenario() -> None:
        limits = dataclasses.replace(DEFAULT_LIMITS, requests_per_connection=2, requests_total=3)
        async with Front(limits=limits) as front:
            client, engine = await ready(front)
            first, rid = await begun(client, engine)
            await begun(client, engine)
            error = await client.end(client.generate(id="third"))
            assert (error["code"], error["details"]["limit"]) == (
                "E_BUSY",
                "requests_per_connection",
            )
            other = front.connect()
            await begun(other, engine)
            error = await other.end(other.generate())
            assert error["details"]["limit"] == "requests_total"
            engine.close_request(rid)
            await client.end(first)
            client.generate(id="third")  # an id that was refused at the door may come again
            await client.until("third", "accepted")

    run(scenario())


def test_a_model_without_a_tokeniser_streams_ids_and_refuses_text() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.texts["a"].pieces = None
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            engine.write(rid, b"\x01\x02")
            chunk = await client.until(request, "chunk")
            assert (chunk["text"], chunk["tokens"]) == ("", pack_ids([1, 2]))
            error = await client.end(client.ask(r.Generate, prompt="text"))
            assert error["code"] == "E_NO_TOKENIZER"

    run(scenario())


def test_users_and_their_apps_have_namespaces_of_their_own() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            roots = []
            for app, uid in (("x", 1000), ("y", 1000), ("x", 2000), ("x", 1000)):
                client = front.connect(app, uid=uid)
                client.generate()
                roots.append((await engine.hears(m.Submit)).root)
            assert len(set(roots)) == 3
            assert roots[0] == roots[3], "the same app again finds what it left"
            assert {len(root) for root in roots} == {32}

    run(scenario())

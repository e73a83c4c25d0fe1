"""Conversations whose token ids the daemon keeps."""

from __future__ import annotations

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.detokenizer import unpack_ids
from pagedd_daemon.front.errors import WireError
from tests.support.front import Client, FakeEngine, Front, run


async def opened(front: Front, **fields: object) -> tuple[Client, FakeEngine, str]:
    """A connection with a session, and the engine."""
    client = front.connect()
    await client.end(client.ask(r.Load))
    result = await client.end(client.ask(r.SessionOpen, **fields))
    return client, front.source.engines[0], result["session"]


def written(submit: m.Submit) -> str:
    """The prompt as text."""
    return bytes(list(unpack_ids(submit.prompt))).decode()


async def turn(
    client: Client, engine: FakeEngine, session: str, content: str, reply: str, **fields: object
) -> str:
    """A whole turn; the prompt it made, as text."""
    request = client.ask(r.SessionSay, session=session, content=content, **fields)
    submit = await engine.hears(m.Submit)
    engine.write(submit.rid, reply)
    engine.close_request(submit.rid, "stop")
    assert (await client.end(request))["type"] == "done"
    return written(submit)


async def closed(client: Client, session: str) -> tuple[int, int]:
    result = await client.end(client.ask(r.SessionClose, session=session))
    return result["turns"], result["rewrites"]


def test_a_turn_goes_on_from_the_ids_of_the_turns_before() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front, system="S")
            prompt = await turn(client, engine, session, "one", "first")
            assert prompt == "<system>S</><user>one</><assistant>"
            prompt = await turn(client, engine, session, "two", "second")
            assert prompt == "<system>S</><user>one</><assistant>first</><user>two</><assistant>"
            assert await closed(client, session) == (2, 0)
            gone = client.ask(r.SessionSay, session=session, content="x")
            assert (await client.end(gone))["code"] == "E_SESSION"

    run(scenario())


def test_the_reply_is_kept_as_it_was_generated_and_never_tokenised_again() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            await turn(client, engine, session, "one", "first. and more", stop=[". "])
            prompt = await turn(client, engine, session, "two", "x")
            assert prompt == "<user>one</><assistant>first</><user>two</><assistant>"

    run(scenario())


def test_a_template_that_rewrites_a_reply_costs_a_rewrite_and_is_counted() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            front.source.texts["a"].strips = True
            await turn(client, engine, session, "one", " padded ")
            prompt = await turn(client, engine, session, "two", "plain")
            assert prompt == "<user>one</><assistant>padded</><user>two</><assistant>"
            await turn(client, engine, session, "three", "plain")
            assert await closed(client, session) == (3, 1)

    run(scenario())


def test_one_turn_at_a_time() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            client.ask(r.SessionSay, session=session, content="one")
            await engine.hears(m.Submit)
            second = client.ask(r.SessionSay, session=session, content="two")
            error = await client.end(second)
            assert (error["code"], error["retryable"]) == ("E_BUSY", True)

    run(scenario())


def test_a_cancelled_or_failed_turn_leaves_the_session_as_it_was() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            await turn(client, engine, session, "one", "first")

            request = client.ask(r.SessionSay, session=session, content="lost")
            rid = (await engine.hears(m.Submit)).rid
            engine.write(rid, "half a re")
            await client.until(request, "chunk")
            token = client.connection.token
            front.control(r.Cancel(id="c", token=token, target=request), client)
            engine.close_request(rid, "cancelled")
            await client.end(request)

            front.source.texts["a"].error = WireError("E_TEMPLATE", "no")
            request = client.ask(r.SessionSay, session=session, content="refused")
            assert (await client.end(request))["code"] == "E_TEMPLATE"
            front.source.texts["a"].error = None

            request = client.ask(r.SessionSay, session=session, content="x" * 2000)
            error = await client.end(request)
            assert error["code"] == "E_TOO_LONG"
            assert error["details"]["context_tokens"] == 1000

            prompt = await turn(client, engine, session, "two", "second")
            assert prompt == "<user>one</><assistant>first</><user>two</><assistant>"
            assert await closed(client, session) == (2, 0)

    run(scenario())


def test_a_fork_has_the_history_and_then_a_life_of_its_own() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            await turn(client, engine, session, "one", "first")
            result = await client.end(client.ask(r.SessionFork, session=session))
            branch = result["session"]
            prompt = await turn(client, engine, branch, "left", "x")
            assert prompt == "<user>one</><assistant>first</><user>left</><assistant>"
            prompt = await turn(client, engine, session, "right", "y")
            assert prompt == "<user>one</><assistant>first</><user>right</><assistant>"
            assert await closed(client, branch) == (1, 0)
            assert await closed(client, session) == (2, 0)

    run(scenario())


def test_a_turn_on_another_model_tokenises_the_history_again() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            await turn(client, engine, session, "one", "first")
            request = client.ask(r.SessionSay, session=session, content="two", model="b")
            second = await front.source.engine(1)
            submit = await second.hears(m.Submit)
            text = written(submit)
            assert text == "<user>one</><assistant>first</><user>two</><assistant>"
            second.close_request(submit.rid)
            await client.end(request)

    run(scenario())


def test_sessions_are_of_one_connection_and_limited() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, _, session = await opened(front)
            other = front.connect()
            gone = other.ask(r.SessionFork, session=session)
            assert (await other.end(gone))["code"] == "E_SESSION"
            for _ in range(63):
                await client.end(client.ask(r.SessionOpen))
            error = await client.end(client.ask(r.SessionOpen))
            assert error["code"] == "E_LIMIT"
            assert error["details"]["limit"] == "sessions_per_connection"

    run(scenario())


def test_chat_tokenises_the_whole_conversation() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, _ = await opened(front)
            client.ask(r.Chat, messages=[{"role": "user", "content": "hi"}], n=2)
            submit = await engine.hears(m.Submit)
            assert written(submit) == "<user>hi</><assistant>"
            assert submit.n == 2

    run(scenario())


def test_tokenize_and_detokenize_use_the_models_own_vocabulary() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, _, _ = await opened(front)
            result = await client.end(client.ask(r.Tokenize, text="häh"))
            back = await client.end(client.ask(r.Detokenize, tokens=result["tokens"]))
            assert back["text"] == "häh"
            long = result["tokens"] * 5000
            assert (await client.end(client.ask(r.Detokenize, tokens=long)))["text"] == "häh" * 5000
            error = await client.end(client.ask(r.Detokenize, tokens=b"\xff\xff\x00\x00"))
            assert error["code"] == "E_TOKEN_ID"

    run(scenario())


async def error_of(client: Client, request: str) -> tuple[str, dict[str, object]]:
    event = await client.end(request)
    return event["code"], event["details"]


def test_a_reply_that_was_cut_short_counts_once_it_is_committed_with_its_very_ids() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            request = client.ask(r.SessionSay, session=session, content="one")
            rid = (await engine.hears(m.Submit)).rid
            engine.write(rid, "half a re")
            await client.until(request, "chunk")
            token = client.connection.token
            busy = client.ask(r.SessionCommit, session=session)
            assert (await error_of(client, busy))[0] == "E_BUSY"
            front.control(r.Cancel(id="c", token=token, target=request), client)
            engine.close_request(rid, "cancelled")
            await client.end(request)
            result = await client.end(client.ask(r.SessionCommit, session=session))
            assert (result["turns"], result["tokens"]) == (
                1,
                len("<user>one</><assistant>half a re"),
            )
            again = client.ask(r.SessionCommit, session=session)
            assert (await error_of(client, again))[0] == "E_COMMIT"
            prompt = await turn(client, engine, session, "two", "x")
            assert prompt == "<user>one</><assistant>half a re</><user>two</><assistant>"

    run(scenario())


def test_a_reply_that_is_not_to_count_is_replaced_by_the_next_until_one_is_committed() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            for reply in ("first", "second"):
                prompt = await turn(client, engine, session, "one", reply, commit=False)
                assert prompt == "<user>one</><assistant>"
            await client.end(client.ask(r.SessionCommit, session=session))
            prompt = await turn(client, engine, session, "two", "x")
            assert prompt == "<user>one</><assistant>second</><user>two</><assistant>"
            assert await closed(client, session) == (2, 0)

    run(scenario())


def test_a_session_ends_after_its_time_to_live_and_a_turn_is_a_use() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front, ttl=20.0)
            front.clock.advance(19)
            await turn(client, engine, session, "one", "first")
            front.clock.advance(19)
            slow = client.ask(r.SessionSay, session=session, content="slow")
            submit = await engine.hears(m.Submit)
            front.clock.advance(30)
            engine.close_request(submit.rid, "stop")
            await client.end(slow)
            await turn(client, engine, session, "two", "x")
            front.clock.advance(21)
            for verb in (r.SessionFork, r.SessionCommit, r.SessionClose):
                code, details = await error_of(client, client.ask(verb, session=session))
                assert (code, details) == ("E_EXPIRED", {"ttl_s": 20.0})
            lasting = await client.end(client.ask(r.SessionOpen))
            front.clock.advance(23 * 3600)
            await client.end(client.ask(r.SessionFork, session=lasting["session"]))

    run(scenario())


async def pinning(client: Client, session: str, pinned: bool | None) -> dict[str, object]:
    result = await client.end(client.ask(r.SessionPin, session=session, pinned=pinned))
    return {name: result[name] for name in ("pinned", "tokens", "max_tokens")}


def test_a_pinned_sessions_kv_is_held_from_turn_to_turn_and_let_go_with_it() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            await turn(client, engine, session, "one", "first")
            length = len("<user>one</><assistant>first")
            most = front.source.ready.ram_tokens // 2
            told = await pinning(client, session, True)
            assert told == {"pinned": True, "tokens": length, "max_tokens": most}
            held = await engine.hears(m.Submit)
            assert held.hold
            assert len(unpack_ids(held.prompt)) == length
            client.ask(r.SessionSay, session=session, content="two")
            submit = await engine.hears(m.Submit)
            assert submit.hold
            engine.write(submit.rid, "second")
            engine.close_request(submit.rid, "stop")
            assert (await engine.hears(m.Drop)).rid == held.rid
            assert (await pinning(client, session, None))["pinned"]
            assert not (await pinning(client, session, False))["pinned"]
            assert (await engine.hears(m.Drop)).rid == submit.rid
            await client.end(client.ask(r.SessionClose, session=session))

    run(scenario())


def test_what_may_be_pinned_is_limited_and_said_with_the_figures() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine, session = await opened(front)
            most = front.source.ready.ram_tokens // 2
            other = (await client.end(client.ask(r.SessionOpen)))["session"]
            await turn(client, engine, session, "one", "x" * (most // 2))
            await turn(client, engine, other, "one", "x" * (most // 2))
            await pinning(client, session, True)
            await engine.hears(m.Submit)
            code, details = await error_of(
                client, client.ask(r.SessionPin, session=other, pinned=True)
            )
            assert code == "E_LIMIT"
            assert (details["limit"], details["max"]) == ("pinned_tokens", most)
            # Growing above the limit is no error: it is pinned no longer.
            await turn(client, engine, session, "two", "x" * (most // 2))
            assert not (await pinning(client, session, None))["pinned"]

    run(scenario())

"""How requests end before they are done, and what a client that lost events gets again."""

from __future__ import annotations

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.limits import DEFAULT_LIMITS
from pagedd_daemon.front.service import SLOW_FACTOR, SLOW_S
from tests.support.front import Front, begun, ready, run


def test_cancel_ends_the_stream_with_done_and_a_finished_one_is_not_there() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            cancel = r.Cancel(id="c", token=client.connection.token, target=request)
            (reply,) = front.control(cancel, client)
            assert reply["cancelled"] is True
            await engine.hears(m.Cancel, lambda cancel: cancel.rid == rid)
            engine.close_request(rid, "cancelled")
            assert (await client.end(request))["finish"][0]["reason"] == "cancelled"
            (reply,) = front.control(cancel, client)
            assert reply["cancelled"] is False

    run(scenario())


def test_cancel_while_the_prompt_is_tokenised_ends_it_at_once() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            gate = front.source.texts["a"].hold()
            request = client.ask(r.Generate, prompt="hello", n=2)
            await front.source.texts["a"].called()
            cancel = r.Cancel(id="c", token=client.connection.token, target=request)
            front.control(cancel, client)
            done = await client.end(request)
            assert [f["reason"] for f in done["finish"]] == ["cancelled"] * 2
            gate.set()
            await begun(client, engine)  # and what the helper then says changes nothing
            assert engine.count(m.Submit) == 1
            assert len(client.events(request)) == 1

    run(scenario())


def test_cancel_by_app_and_of_all_reaches_only_the_callers_own_user() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            other = front.connect("other")
            foreign = front.connect("app", uid=2000)
            mine, rid = await begun(client, engine)
            _, other_rid = await begun(other, engine)
            theirs, _ = await begun(foreign, engine)
            front.control(r.Cancel(id="c", app="app"))
            assert (await engine.hears(m.Cancel)).rid == rid
            front.control(r.Cancel(id="d", all=True))
            assert (await engine.hears(m.Cancel)).rid == other_rid
            engine.close_request(rid, "cancelled")
            await client.end(mine)
            assert engine.count(m.Cancel) == 2
            assert foreign.events(theirs)[-1]["type"] == "accepted"

    run(scenario())


def test_a_deadline_ends_the_request_with_an_error_and_cancels_it() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, deadline_ms=500)
            front.clock.advance(0.499)
            assert client.events(request)[-1]["type"] == "accepted"
            front.clock.advance(0.002)
            error = await client.end(request)
            assert (error["code"], error["retryable"]) == ("E_DEADLINE", True)
            assert (await engine.hears(m.Cancel)).rid == rid
            engine.write(rid, "late")
            engine.close_request(rid, "cancelled")
            other, _ = await begun(client, engine)
            await client.until(other, "accepted")
            assert client.events(request)[-1] == error

    run(scenario())


def test_a_resend_gives_every_later_event_again_and_starts_nothing() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, id="x", seed=1)
            for part in ("a", "b", "c"):
                engine.write(rid, part)
            await client.until("x", "chunk", 3)
            first = list(client.events(request))
            client.generate("abc", id="x", seed=1, after=1)
            assert client.events("x")[4:] == first[2:]
            engine.close_request(rid)
            await client.until("x", "done")
            client.generate("abc", id="x", seed=1, after=2)
            assert [e["seq"] for e in client.events("x")[-2:]] == [3, 4]
            assert engine.count(m.Submit) == 1

    run(scenario())


def test_a_long_stream_is_resent_as_it_was() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, id="x", logprobs=0)
            for number in range(300):
                engine.write(rid, bytes([97 + number % 26]), logprobs=[[-1.0, []]])
            await client.until(request, "chunk", 300)
            sent = list(client.events("x"))
            for after in (-1, 0, 126, 127, 128, 255, 299, 300, 301):
                front.transport.events.clear()
                client.generate("abc", id="x", logprobs=0, after=after)
                assert client.events("x") == sent[after + 1 :]

    run(scenario())


def test_the_same_id_for_another_request_is_a_duplicate() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            await begun(client, engine, id="x")
            client.generate("other", id="x")
            error = await client.end("x")
            assert error["code"] == "E_DUPLICATE"

    run(scenario())


def test_a_client_that_stops_reading_is_paused_and_goes_on_when_it_reads() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            _, first = await begun(client, engine)
            client.connection.lagging = True
            front.service.lagging(client.connection, True)
            assert (await engine.hears(m.Pause)).rid == first
            _, second = await begun(client, engine)
            assert (await engine.hears(m.Pause)).rid == second
            client.connection.lagging = False
            front.service.lagging(client.connection, False)
            assert (await engine.hears(m.Unpause)).rid == first
            assert (await engine.hears(m.Unpause)).rid == second
            front.clock.advance(SLOW_S * 2)
            assert engine.count(m.Cancel) == 0

    run(scenario())


def test_a_client_that_does_not_read_for_ten_minutes_is_given_up() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, _ = await begun(client, engine)
            client.connection.lagging = True
            front.service.lagging(client.connection, True)
            front.transport.backlog = 2**21
            front.clock.advance(SLOW_S + 1)
            error = await client.end(request)
            assert (error["code"], error["details"]) == ("E_SLOW", {"backlog_bytes": 2**21})
            await engine.hears(m.Cancel)

    run(scenario())


def test_a_client_that_asks_on_and_never_reads_is_given_up_by_its_backlog() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, _ = await begun(client, engine)
            client.connection.lagging = True
            front.service.lagging(client.connection, True)
            front.transport.backlog = SLOW_FACTOR * DEFAULT_LIMITS.output_bytes_per_connection + 1
            refused = client.generate()
            assert (await client.end(refused))["code"] == "E_SLOW"
            assert (await client.end(request))["code"] == "E_SLOW"

    run(scenario())


def test_a_connection_that_is_gone_has_its_requests_cancelled() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            front.service.closed(client.connection)
            assert (await engine.hears(m.Cancel)).rid == rid
            engine.close_request(rid, "cancelled")
            other = front.connect()
            await begun(other, engine)
            assert client.events(request)[-1]["type"] == "accepted"
            assert front.service.models.current is not None
            assert front.service.models.current.leases == 1

    run(scenario())


def test_a_connection_that_is_gone_while_its_prompt_is_tokenised_submits_nothing() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            gate = front.source.texts["a"].hold()
            client.ask(r.Generate, prompt="hello")
            await front.source.texts["a"].called()
            front.service.closed(client.connection)
            gate.set()
            await begun(front.connect(), engine)
            assert engine.count(m.Submit) == 1

    run(scenario())

"""One model at a time: loading, switching, keeping and unloading it, and who waits for what."""

from __future__ import annotations

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.gate import AT_ONCE
from tests.support.front import Client, FakeEngine, Front, run


async def serve(engine: FakeEngine) -> int:
    """Take the next request of an engine and close it; its number."""
    rid = (await engine.hears(m.Submit)).rid
    engine.close_request(rid)
    return rid


async def loaded(front: Front, client: Client) -> FakeEngine:
    await client.end(client.ask(r.Load))
    return front.source.engines[-1]


def test_requests_wait_for_the_model_that_start_up_loads() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.automatic = False
            front.service.preload(lambda error: None)
            client = front.connect()
            request = client.generate()
            engine = await front.source.engine(0)
            assert (await front.status())["state"] == "loading"
            engine.say(m.Loading(0.5))
            engine.say(front.source.ready)
            await serve(engine)
            await client.end(request)
            assert (await front.status())["state"] == "ready"
            assert front.source.loads == ["a"]

    run(scenario())


def test_without_a_model_loaded_or_configured_a_request_is_told_so() -> None:
    async def scenario() -> None:
        async with Front(default=None) as front:
            client = front.connect()
            error = await client.end(client.generate())
            assert (error["code"], error["retryable"]) == ("E_NO_MODEL", True)
            assert (await front.status())["state"] == "asleep"
            assert front.source.engines == []

    run(scenario())


def test_an_unknown_model_is_refused_and_the_loaded_one_stays() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            await loaded(front, client)
            error = await client.end(client.generate(model="nonsense"))
            assert error["code"] == "E_MODEL"
            assert (await front.status())["models"][0]["name"] == "a"

    run(scenario())


def test_a_model_that_does_not_load_fails_everybody_who_waits_for_it_and_nobody_else() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.automatic = False
            client = front.connect()
            first, second = client.generate(), client.generate()
            other = client.generate(model="b")
            engine = await front.source.engine(0)
            await front.source.resolved()
            details = {"path": "/x"}
            engine.say(m.Failed("E_MODEL", "truncated", details))
            for request in (first, second):
                error = await client.end(request)
                assert (error["code"], error["details"]) == ("E_MODEL", details)
            assert engine.stopped
            (await front.source.engine(1)).say(front.source.ready)
            await serve(front.source.engines[1])
            assert (await client.end(other))["type"] == "done"

    run(scenario())


def test_requests_behind_those_that_a_failed_load_refuses_have_the_model_loaded_again() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.automatic = False
            client = front.connect()
            waiting = [client.generate() for _ in range(AT_ONCE)]
            behind = client.generate()  # at the gate: it asks for the model when another is refused
            (await front.source.engine(0)).die(-9)
            for request in waiting:
                assert (await client.end(request))["code"] == "E_ENGINE"
            (await front.source.engine(1)).say(front.source.ready)
            await serve(front.source.engines[1])
            assert (await client.end(behind))["type"] == "done"

    run(scenario())


def test_an_engine_that_dies_while_loading_fails_those_who_wait() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.automatic = False
            client = front.connect()
            request = client.generate()
            (await front.source.engine(0)).die(-9)
            error = await client.end(request)
            assert error["code"] == "E_ENGINE"
            assert (await front.status())["state"] == "degraded"

    run(scenario())


def test_an_engine_that_dies_as_soon_as_it_is_ready_fails_those_who_wait() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.automatic = False
            client = front.connect()
            request = client.generate()
            engine = await front.source.engine(0)
            await engine.hears(m.Configure)
            # Both are there before anybody who waits for the first goes on.
            front.service.models.engine_said(engine, front.source.ready)
            front.service.models.engine_gone(engine, -9)
            assert (await client.end(request))["code"] == "E_ENGINE"
            assert (await front.status())["state"] == "degraded"

    run(scenario())


def test_a_switch_waits_for_live_streams_and_serves_in_order_of_arrival() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            engine = await loaded(front, client)
            live = client.generate()
            rid = (await engine.hears(m.Submit)).rid
            b1 = client.generate(model="b")
            await front.source.resolved()
            a2 = client.generate(model="a")  # behind b1: a stream of requests for a cannot starve b
            b2 = client.generate(model="b")
            await front.source.resolved()
            assert engine.count(m.Submit) == 1
            assert front.source.loads == ["a"]
            engine.close_request(rid)
            await client.end(live)
            second = await front.source.engine(1)
            await serve(second)
            await serve(second)  # b2 came before the switch, so it costs no other one
            await client.end(b1)
            await client.end(b2)
            third = await front.source.engine(2)
            await serve(third)
            assert (await client.end(a2))["type"] == "done"
            assert front.source.loads == ["a", "b", "a"]
            assert engine.stopped
            assert second.stopped

    run(scenario())


def test_a_request_without_a_model_goes_to_the_one_that_will_be_loaded() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            engine = await loaded(front, client)
            live = client.generate()
            rid = (await engine.hears(m.Submit)).rid
            client.generate(model="b")
            await front.source.resolved()
            any_model = client.generate()
            engine.close_request(rid)
            await client.end(live)
            second = await front.source.engine(1)
            await serve(second)
            await serve(second)
            await client.end(any_model)
            assert client.events(any_model)[0]["model"] == "b"
            assert front.source.loads == ["a", "b"]

    run(scenario())


def test_a_request_that_is_cancelled_while_it_waits_for_its_model_loads_nothing() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            engine = await loaded(front, client)
            live = client.generate()
            rid = (await engine.hears(m.Submit)).rid
            waiting = client.generate(model="b")
            await front.source.resolved()
            front.control(r.Cancel(id="c", token=client.connection.token, target=waiting), client)
            done = await client.end(waiting)
            assert done["finish"][0]["reason"] == "cancelled"
            engine.close_request(rid)
            await client.end(live)
            assert front.source.loads == ["a"]
            assert not engine.stopped

    run(scenario())


def test_the_model_is_unloaded_when_keep_alive_has_passed_and_asking_does_not_wake_it() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            engine = await loaded(front, client)
            assert (await front.status())["models"][0]["expires_s"] == 300.0
            front.clock.advance(299)
            request = client.generate()
            rid = (await engine.hears(m.Submit)).rid
            for count in range(1, 21):  # a live stream keeps it
                front.clock.advance(50)
                engine.write(rid, "a")
                await client.until(request, "chunk", count)
            engine.close_request(rid)
            await client.end(request)
            front.clock.advance(299)
            assert (await front.status())["state"] == "ready"
            front.clock.advance(2)
            await engine.ended()
            assert (await front.status())["state"] == "asleep"
            assert (await front.status())["models"] == []
            await front.answer(r.Stats(id="t"))
            front.control(r.Ping(id="p"))
            await client.end(client.ask(r.Models))
            assert len(front.source.engines) == 1
            again = client.generate()
            await serve(await front.source.engine(1))
            await client.end(again)

    run(scenario())


def test_a_request_says_how_long_its_model_stays() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            engine = await loaded(front, client)
            for keep_alive, expires in (("10m", 600.0), (-1, None), (5, 5.0)):
                request = client.generate(keep_alive=keep_alive)
                await serve(engine)
                await client.end(request)
                assert (await front.status())["models"][0]["expires_s"] == expires
            request = client.generate(keep_alive=0)
            await serve(engine)
            await client.end(request)
            front.clock.advance(0)
            await engine.ended()

    run(scenario())


def test_a_model_kept_for_ever_stays() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            await client.end(client.ask(r.Load, keep_alive=-1))
            assert front.clock.pending == 0
            front.clock.advance(1e9)
            assert (await front.status())["state"] == "ready"

    run(scenario())


def test_load_answers_when_the_model_serves_and_unload_when_its_memory_is_given_back() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            result = await client.end(client.ask(r.Load, model="b"))
            assert result["model"]["name"] == "b"
            assert result["model"]["loaded"] is True
            engine = front.source.engines[0]
            live = client.generate()
            rid = (await engine.hears(m.Submit)).rid
            unload = client.ask(r.Unload)
            later = client.generate()
            assert client.events(unload) == []
            engine.close_request(rid)
            await client.end(live)
            assert (await client.end(unload))["unloaded"] == "b"
            assert engine.stopped
            await serve(await front.source.engine(1))  # what came after it wakes the configured one
            await client.end(later)
            assert client.events(later)[0]["model"] == "a"

    run(scenario())


def test_unload_without_a_model_says_so() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            assert (await client.end(client.ask(r.Unload)))["unloaded"] is None

    run(scenario())


def test_models_lists_all_and_marks_the_loaded_one() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client = front.connect()
            await loaded(front, client)
            result = await client.end(client.ask(r.Models))
            assert [(x["name"], x["loaded"]) for x in result["models"]] == [
                ("a", True),
                ("b", False),
                ("c", False),
            ]

    run(scenario())


def test_a_daemon_that_stops_refuses_those_who_wait_and_stops_the_engine() -> None:
    async def scenario() -> None:
        front = Front()
        client = front.connect()
        engine = await loaded(front, client)
        live = client.generate()
        await engine.hears(m.Submit)
        waiting = client.generate(model="b")
        await front.source.resolved()
        front.service.drain()
        refused = client.generate()
        assert (await client.end(refused))["code"] == "E_DRAINING"
        await front.service.stop(0)
        for request in (live, waiting):
            assert (await client.end(request))["code"] == "E_DRAINING"
        assert engine.stopped
        await front.service.idle()

    run(scenario())


def test_a_daemon_that_stops_while_it_loads_ends_the_engine_it_started() -> None:
    async def scenario() -> None:
        front = Front()
        front.source.automatic = False
        client = front.connect()
        request = client.generate()
        engine = await front.source.engine(0)
        await front.service.stop(0)
        assert (await client.end(request))["code"] == "E_DRAINING"
        assert engine.stopped

    run(scenario())

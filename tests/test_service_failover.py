"""Engines die: live requests go on in the next one, and the client sees a pause."""

from __future__ import annotations

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.detokenizer import unpack_ids
from pagedd_daemon.front.failover import POISON
from pagedd_daemon.front.models import LOAD_MOST_S
from pagedd_daemon.front.watchdog import FIRST_S, FLOOR_S, Watchdog
from tests.support.front import Client, Clock, FakeEngine, Front, begun, ready, run


def tokens(client: Client, request: str, index: int = 0) -> str:
    """What was sent of a sample, as text (ids are bytes)."""
    chunks = [e for e in client.events(request) if e["type"] == "chunk" and e["index"] == index]
    return bytes(t for chunk in chunks for t in unpack_ids(chunk["tokens"])).decode()


def said(ids: bytes) -> bytes:
    """Ids that are bytes, as bytes."""
    return bytes(list(unpack_ids(ids)))


async def wrote(client: Client, engine: FakeEngine, request: str, rid: int, text: str) -> None:
    """The engine reports tokens, and the client has them."""
    before = len([e for e in client.events(request) if e["type"] == "chunk"])
    engine.write(rid, text)
    await client.until(request, "chunk", before + 1)


def test_a_stream_goes_on_behind_the_tokens_it_had_and_its_numbers_have_no_gap() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, max_tokens=9)
            engine.say(m.StepReport(1, started=[(rid, 2)]))
            await wrote(client, engine, request, rid, "hello")
            engine.die(-11)
            second = await front.source.engine(1)
            again = await second.hears(m.Submit)
            assert (again.n, again.index, again.generated) == (1, 0, 5)
            assert said(again.prompt) == b"abchello"
            assert again.stop["max_tokens"] == 9
            assert again.rid != rid
            second.say(m.StepReport(1, started=[(again.rid, 0)]))
            second.write(again.rid, " you")
            second.close_request(again.rid, generated=4)
            done = await client.end(request)
            assert tokens(client, request) == client.text(request) == "hello you"
            assert [e["seq"] for e in client.events(request)] == list(range(4))
            usage = {"prompt_tokens": 3, "cached_tokens": 2, "generated_tokens": 9}
            assert done["usage"] == usage
            status = await front.status()
            assert (status["state"], status["degraded"]) == ("ready", [])
            assert status["engine_deaths"] == 1

    run(scenario())


def test_tokens_whose_text_is_held_back_are_not_lost() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stop=["stop"])
            await wrote(client, engine, request, rid, "go st")
            assert client.text(request) == "go "
            engine.die()
            second = await front.source.engine(1)
            again = await second.hears(m.Submit)
            assert said(again.prompt) == b"abcgo st"
            second.write(again.rid, "op and more")
            finish = await second.hears(m.Finish)
            assert (finish.rid, finish.tokens) == (again.rid, 3)
            second.close_request(again.rid, "stop")
            done = await client.end(request)
            finish_told = {"index": 0, "reason": "stop", "text": "", "stop": "stop"}
            assert done["finish"][0] == finish_told
            assert client.text(request) == "go "

    run(scenario())


def test_samples_go_on_each_with_its_own_tokens_and_ended_ones_stay_ended() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, n=3)
            for index, text in enumerate(("one", "twotwo", "three")):
                engine.write(rid, text, index)
            engine.say(m.StepReport(2, ended=[m.Ended(rid, 1, "stop")]))
            await client.until(request, "chunk", 3)
            await wrote(client, engine, request, rid, "!")
            engine.die()
            second = await front.source.engine(1)
            parts = [await second.hears(m.Submit) for _ in range(2)]
            told = {p.index: said(p.prompt) for p in parts}
            assert told == {0: b"abcone!", 2: b"abcthree"}
            assert all(p.n == 1 for p in parts)
            for part in parts:
                second.write(part.rid, "+", part.index)
                second.say(
                    m.StepReport(
                        2,
                        ended=[m.Ended(part.rid, part.index, "length")],
                        closed=[m.Closed(part.rid, 3, 0, 1, 1.0, 2.0, 3.0, 4.0)],
                    )
                )
            done = await client.end(request)
            reasons = [finish["reason"] for finish in done["finish"]]
            assert reasons == ["length", "stop", "length"]
            assert [tokens(client, request, i) for i in range(3)] == ["one!+", "twotwo", "three+"]
            assert done["usage"]["generated_tokens"] == 5 + 6 + 6

    run(scenario())


def test_a_request_nothing_was_seen_of_begins_anew_with_all_its_samples() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            _, rid = await begun(client, engine, n=2, seed=5)
            engine.die()
            again = await (await front.source.engine(1)).hears(m.Submit)
            assert (again.n, again.generated, again.sampling["seed"]) == (2, 0, 5)
            assert again.rid != rid

    run(scenario())


def test_what_comes_or_is_cancelled_while_there_is_no_engine_ends_as_it_should() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            gone, rid = await begun(client, engine)
            await wrote(client, engine, gone, rid, "xy")
            kept, _ = await begun(client, engine)
            front.source.automatic = False
            engine.die()
            second = await front.source.engine(1)
            front.control(r.Cancel(id="c", token=client.connection.token, target=gone), client)
            done = await client.end(gone)
            assert done["finish"][0]["reason"] == "cancelled"
            assert done["usage"]["generated_tokens"] == 2
            new = client.generate("new")
            second.say(front.source.ready)
            told = [await second.hears(m.Submit) for _ in range(2)]
            assert [said(t.prompt) for t in told] == [b"abc", b"new"]
            for submit in told:
                second.close_request(submit.rid)
            for request in (kept, new):
                assert (await client.end(request))["type"] == "done"
            assert front.service.models.current is not None
            assert front.service.models.current.leases == 0

    run(scenario())


def test_a_sample_the_front_has_ended_is_not_asked_for_again() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine, stop=["."])
            await wrote(client, engine, request, rid, "end. more")
            engine.die()
            done = await client.end(request)
            assert done["finish"][0]["reason"] == "stop"
            assert done["usage"]["generated_tokens"] == 3

    run(scenario())


def test_a_request_that_three_engines_died_with_is_poison_and_others_go_on() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            poison, _ = await begun(client, engine)
            for number in range(1, POISON):
                engine.die()
                engine = await front.source.engine(number)
                await engine.hears(m.Submit)
            other, _ = await begun(client, engine)
            engine.die()
            error = await client.end(poison)
            assert (error["code"], error["retryable"]) == ("E_POISON", False)
            assert error["details"] == {"deaths": POISON}
            engine = await front.source.engine(POISON)
            submit = await engine.hears(m.Submit)
            engine.close_request(submit.rid)
            assert (await client.end(other))["type"] == "done"
            assert front.defeats == 0

    run(scenario())


async def _die_five_times(front: Front) -> tuple[Client, str]:
    client, engine = await ready(front)
    request = ""
    for number in range(1, 6):
        request, _ = await begun(client, engine)
        engine.die()
        if number < 5 or front.source.can_fall:
            engine = await front.source.engine(number)
            await engine.hears(m.Submit)
    return client, request


def test_engines_that_die_and_die_are_replaced_by_another_kind_and_clients_are_told() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.can_fall = True
            await _die_five_times(front)
            assert front.source.fallen
            assert front.defeats == 0
            assert "computing on the CPU" in front.connect().hello["notice"]
            assert any("computing on the CPU" in s for s in (await front.status())["degraded"])

    run(scenario())


def test_engines_that_die_and_die_with_no_other_kind_end_the_daemon() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, request = await _die_five_times(front)
            error = await client.end(request)
            assert (error["code"], error["retryable"]) == ("E_ENGINE", True)
            assert front.defeats == 1

    run(scenario())


def test_deaths_spread_over_time_end_nothing() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            for number in range(1, 9):
                request, rid = await begun(client, engine)
                front.clock.advance(20)
                engine.die()
                engine = await front.source.engine(number)
                rid = (await engine.hears(m.Submit)).rid
                engine.close_request(rid)
                await client.end(request)
            assert front.defeats == 0

    run(scenario())


def test_an_engine_that_dies_with_nobody_using_it_is_loaded_by_the_next_request() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            engine.die(-11)
            await front.settled(lambda: True)
            while front.service.models.current is not None:
                await front.source.resolved()
            status = await front.status()
            assert status["state"] == "degraded"
            assert "signal 11" in status["degraded"][0]
            assert len(front.source.engines) == 1
            await begun(client, await _next(front, client))

    run(scenario())


async def _next(front: Front, client: Client) -> FakeEngine:
    load = client.ask(r.Load)
    engine = await front.source.engine(1)
    await client.end(load)
    return engine


def test_a_model_that_cannot_be_loaded_again_ends_its_streams_with_the_reason() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, _ = await begun(client, engine)
            front.source.automatic = False
            engine.die()
            second = await front.source.engine(1)
            second.say(m.Failed("E_MODEL", "the file is gone", {"path": "/x"}))
            error = await client.end(request)
            assert (error["code"], error["details"]) == ("E_MODEL", {"path": "/x"})

    run(scenario())


def test_an_engine_that_dies_while_it_takes_over_is_replaced_as_well() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            await wrote(client, engine, request, rid, "ab")
            front.source.automatic = False
            engine.die()
            (await front.source.engine(1)).die()
            front.source.automatic = True
            third = await front.source.engine(2)
            again = await third.hears(m.Submit)
            assert again.generated == 2

    run(scenario())


def test_an_engine_that_is_never_ready_is_given_up_and_followed_by_another() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            await wrote(client, engine, request, rid, "ab")
            front.source.automatic = False
            engine.die()
            stuck = await front.source.engine(1)
            await stuck.hears(m.Configure)
            front.source.automatic = True
            front.clock.advance(LOAD_MOST_S)
            assert (await (await front.source.engine(2)).hears(m.Submit)).generated == 2
            assert stuck.stopped

    run(scenario())


# ------------------------------------------------------------------------------- the watchdog


def test_an_engine_that_makes_no_step_is_replaced_at_the_bound_and_not_before() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            engine.say(m.Snapshot({"progress": 1, "median_step_s": 0.01}))
            request, rid = await begun(client, engine)
            await wrote(client, engine, request, rid, "ab")
            for _ in range(int(FLOOR_S) - 1):
                front.clock.advance(1.0)
            assert (await front.answer(r.Ping(id="p")))["healthy"] is False
            assert len(front.source.engines) == 1
            front.clock.advance(1.0)
            again = await (await front.source.engine(1)).hears(m.Submit)
            assert again.generated == 2

    run(scenario())


def test_steps_are_progress_and_so_is_a_counter_that_rises_but_not_one_that_stands() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            watchdog = front.service.watchdog
            for number in range(1, 12):
                for _ in range(9):
                    front.clock.advance(1.0)
                await wrote(client, engine, request, rid, "a")
                assert watchdog.silent_s == 0.0
                engine.say(m.Snapshot({"progress": number, "median_step_s": 0.01}))
            for _ in range(8):
                front.clock.advance(1.0)
                engine.say(m.Snapshot({"progress": 11, "median_step_s": 0.01}))
            assert watchdog.silent_s == 8.0
            assert len(front.source.engines) == 1

    run(scenario())


def test_a_clock_that_jumps_fires_nothing() -> None:
    class Late(Clock):
        """Whose timers run late: the lid was closed, or the daemon was stopped."""

        def sleep(self, seconds: float) -> None:
            self.now += seconds
            due, self._timers = self._timers, []
            for _, _, timer in due:
                timer.callback()

    fired: list[float] = []
    clock = Late()
    watchdog = Watchdog(clock, lambda: True, fired.append)
    watchdog.counted(1, 0.01)
    watchdog.watch()
    for _ in range(4):
        clock.sleep(7200.0)
    assert (watchdog.silent_s, watchdog.healthy, fired) == (8.0, False, [])
    watchdog.stepped()
    assert watchdog.healthy
    for _ in range(5):
        clock.sleep(7200.0)
    assert fired == [10.0]


def test_idle_is_healthy_and_nothing_ticks() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            engine.close_request(rid)
            await client.end(request)
            front.clock.advance(2.0)
            assert front.clock.pending == 1  # the model's keep-alive
            front.clock.advance(FIRST_S * 2)
            assert front.service.watchdog.healthy
            assert len(front.source.engines) == 1

    run(scenario())


def test_slow_steps_have_a_longer_bound() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            assert front.service.watchdog.bound_s == FIRST_S
            request, rid = await begun(client, engine)
            engine.say(m.Snapshot({"progress": 1, "median_step_s": 1.0}))
            await wrote(client, engine, request, rid, "ab")
            assert front.service.watchdog.bound_s == 40.0

    run(scenario())

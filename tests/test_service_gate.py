"""Programs that ask, and take back, more than anybody can do: what others notice of it."""

from __future__ import annotations

import asyncio
from array import array

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.calls import FORESEEN
from pagedd_daemon.front.gate import AT_ONCE, JUST_S, WASTED, WASTED_PER_S
from pagedd_daemon.front.identity import Program
from tests.support.front import Client, FakeEngine, Front, begun, ready, run

STORM = Program("/usr/bin/storm")
EDITOR = Program("/usr/bin/editor")


async def take_back(front: Front, client: Client, engine: FakeEngine) -> None:
    """Ask, and cancel when the engine has it."""
    request, rid = await begun(client, engine)
    cancel(front, client, request)
    await engine.hears(m.Cancel)
    engine.close_request(rid, "cancelled", generated=0)
    await client.end(request)


def cancel(front: Front, client: Client, request: str) -> None:
    front.control(r.Cancel(id="c", token=client.connection.token, target=request), client)


def test_a_program_has_a_few_texts_at_the_helpers_and_others_do_not_wait_for_the_rest() -> None:
    async def scenario() -> None:
        async with Front() as front:
            _, engine = await ready(front)
            helpers = front.source.texts["a"]
            answers = helpers.hold()
            asked: list[str] = []
            edited = asyncio.Event()

            async def tokenize(text: str, special: bool, bos: bool) -> array[int]:
                asked.append(text)
                if text == "one":
                    edited.set()
                await answers.wait()
                return array("i", list(text.encode()))

            helpers.tokenize = tokenize  # type: ignore[method-assign]
            storm = [front.connect(f"name-{i}", program=STORM) for i in range(3 * AT_ONCE)]
            for client in storm:
                client.ask(r.Generate, prompt="many")
            front.connect("editor", program=EDITOR).ask(r.Generate, prompt="one")
            await edited.wait()
            assert asked == ["many"] * AT_ONCE + ["one"]
            answers.set()
            for _ in range(3 * AT_ONCE + 1):
                await engine.hears(m.Submit)
            assert asked.count("many") == 3 * AT_ONCE

    run(scenario())


def test_what_is_taken_back_before_its_turn_is_never_begun() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            text = front.source.texts["a"]
            answers = text.hold()
            requests = [client.ask(r.Generate, prompt=f"p{i}") for i in range(2 * AT_ONCE)]
            for request in requests[AT_ONCE:]:
                cancel(front, client, request)
                assert (await client.end(request))["finish"][0]["reason"] == "cancelled"
            answers.set()
            for request in requests[:AT_ONCE]:
                await client.until(request, "accepted")
            last = client.generate("last")
            await client.until(last, "accepted")
            assert engine.count(m.Submit) <= AT_ONCE + 1
            assert not any(client.events(request)[:-1] for request in requests[AT_ONCE:])

    run(scenario())


def test_a_program_that_takes_back_all_it_asks_waits_and_no_other_program_does() -> None:
    async def scenario() -> None:
        async with Front() as front:
            _, engine = await ready(front)
            storm = front.connect("storm", program=STORM)
            for _ in range(WASTED):
                await take_back(front, storm, engine)
            before = engine.count(m.Submit)
            waiting = storm.generate("waits")
            for _ in range(50):
                cancel(front, storm, storm.generate("in vain"))
            renamed = front.connect("another name", program=STORM).generate("waits, too")
            editor = front.connect("editor", program=EDITOR)
            await editor.until(editor.generate("at once"), "accepted")
            assert engine.count(m.Submit) <= before + 1
            assert not storm.events(waiting)
            front.clock.advance(1.1 / WASTED_PER_S)
            await storm.until(waiting, "accepted")
            submitted = [await engine.hears(m.Submit) for _ in range(3)]
            assert len(submitted) == 3, "the editor's, and both that waited"
            assert renamed

    run(scenario())


def test_a_program_that_reads_some_of_a_reply_before_it_cancels_never_waits() -> None:
    async def scenario() -> None:
        async with Front() as front:
            _, engine = await ready(front)
            client = front.connect("editor", program=EDITOR)
            for _ in range(2 * WASTED):
                request, rid = await begun(client, engine)
                engine.write(rid, "x")
                await client.until(request, "chunk")
                cancel(front, client, request)
                await engine.hears(m.Cancel)
                engine.close_request(rid, "cancelled")
                await client.end(request)

    run(scenario())


def test_a_batch_that_is_killed_while_it_waits_costs_its_program_nothing() -> None:
    async def scenario() -> None:
        async with Front() as front:
            _, engine = await ready(front)
            batch = front.connect("batch", program=STORM)
            for _ in range(2 * WASTED):
                await begun(batch, engine)
            front.clock.advance(JUST_S)
            front.service.closed(batch.connection)
            client = front.connect("chat", program=STORM)
            await client.until(client.generate(), "accepted")

    run(scenario())


def test_connections_that_end_before_their_answer_count_like_cancels() -> None:
    async def scenario() -> None:
        async with Front() as front:
            _, engine = await ready(front)
            for _ in range(WASTED):
                client = front.connect("storm", program=STORM)
                _, rid = await begun(client, engine)
                front.service.closed(client.connection)
                await engine.hears(m.Cancel)
                engine.close_request(rid, "cancelled", generated=0)
            client = front.connect("storm", program=STORM)
            waiting = client.generate()
            assert not client.events(waiting)
            front.clock.advance(1.1 / WASTED_PER_S)
            await client.until(waiting, "accepted")

    run(scenario())


def test_a_cancel_that_overtakes_its_request_holds_for_it() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            replies = front.control(
                r.Cancel(id="c", token=client.connection.token, target="early"), client
            )
            assert replies[0]["cancelled"] is False
            done = await client.end(client.generate(id="early"))
            assert done["finish"][0]["reason"] == "cancelled"
            assert engine.count(m.Submit) == 0
            again = client.generate(id="early")
            assert [event["type"] for event in client.events(again)] == ["done", "done"]
            request, rid = await begun(client, engine)
            engine.close_request(rid)
            assert (await client.end(request))["type"] == "done"

    run(scenario())


def test_cancels_of_what_is_over_or_never_comes_are_forgotten() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request, rid = await begun(client, engine)
            engine.close_request(rid)
            await client.end(request)
            cancel(front, client, request)
            for number in range(FORESEEN):
                cancel(front, client, f"never{number}")
            peer = front.service._calls.peers[client.connection]
            assert len(peer.foreseen) == FORESEEN
            cancel(front, client, "one more")
            assert len(peer.foreseen) == FORESEEN
            assert request not in peer.foreseen

    run(scenario())

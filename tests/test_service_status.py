"""What status, stats and ping say, and what they cost."""

from __future__ import annotations

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.accounts import REMEMBER_S, Account
from pagedd_daemon.front.journal import Journal, Remembered
from tests.support.front import Client, FakeEngine, Front, run

FIGURES = {
    "kv": {
        tier: {"blocks_total": 10, "used": 3, "cached": 2, "free": 5}
        for tier in ("gpu", "ram", "disk")
    },
    "split": {"token_state": 40, "reserved": 2, "internal": 6, "external": 0},
    "sequences": {"running": 2, "swapped": 1, "ids_total": 256},
    "requests": {"running": 1, "waiting": 1, "paused": 0},
    "apps": {
        "1": {
            "running": 1,
            "waiting": 0,
            "kv_gpu_tokens": 48,
            "kv_ram_tokens": 16,
            "kv_disk_tokens": 0,
            "share": 0.25,
        }
    },
    "pager": {"stored_pages": 7},
    "memory": {"weights": 1, "kv_pool": 2, "ram_tier": 3},
}


async def ready(front: Front) -> tuple[Client, FakeEngine]:
    client = front.connect("app", "interactive")
    await client.end(client.ask(r.Load))
    return client, front.source.engines[0]


def test_status_of_a_busy_engine_waits_for_fresh_figures_and_has_every_field() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            client.generate()
            rid = (await engine.hears(m.Submit)).rid
            engine.write(rid, "abc", steps=17)
            await client.until("r1", "chunk")
            engine.figures = None
            replies = front.control(r.Status(id="s"))
            await engine.hears(m.AskSnapshot)
            assert replies == []
            engine.say(m.Snapshot(FIGURES))
            stats = front.control(r.Stats(id="t"))
            assert stats == []  # one question for both
            await front.settled(lambda: bool(replies and stats))
            (status,) = replies
            assert status["version"] == "1.2.3"
            assert status["state"] == "ready"
            assert status["steps"] == 17
            assert (status["backend"], status["device"]) == ("simulated", "CPU")
            assert status["models"] == [
                {
                    "name": "a",
                    "size_bytes": 1,
                    "context_tokens": 1000,
                    "block_tokens": 16,
                    "expires_s": 300.0,
                }
            ]
            assert status["kv"] == FIGURES["kv"]
            assert status["split"] == FIGURES["split"]
            assert status["sequences"] == FIGURES["sequences"]
            assert status["requests"] == FIGURES["requests"]
            (app,) = status["apps"]
            assert (app["app"], app["class"], app["connections"]) == ("app", "interactive", 1)
            assert app["kv"] == {"gpu": 48, "ram": 16, "disk": 0}
            assert (app["weight"], app["share_percent"]) == (1.0, 25.0)
            assert (app["running"], app["waiting"], app["generated_tokens"]) == (1, 0, 3)
            assert stats[0]["pager"] == {"stored_pages": 7}

    run(scenario())


def test_an_engine_that_does_not_answer_in_time_delays_status_and_no_more() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            client.generate()
            await engine.hears(m.Submit)
            engine.figures = None
            replies = front.control(r.Status(id="s"))
            front.clock.advance(0.11)
            assert replies[0]["kv"]["gpu"] == {
                "blocks_total": 0,
                "used": 0,
                "cached": 0,
                "free": 0,
            }

    run(scenario())


def test_the_block_map_is_asked_of_the_engine_only_for_those_who_want_it() -> None:
    blocks = {"gpu": {"every": 1, "cells": b"\x11\x00"}}

    async def scenario() -> None:
        async with Front() as front:
            _, engine = await ready(front)
            engine.figures = None
            maps = front.control(r.Stats(id="t", blocks=True))
            assert (await engine.hears(m.AskSnapshot)).blocks  # though it is idle
            engine.say(m.Snapshot(FIGURES))  # of its own accord
            plain = front.control(r.Stats(id="u"))
            await front.settled(lambda: bool(plain))
            assert "blocks" not in plain[0]
            assert maps == []
            engine.say(m.Snapshot({**FIGURES, "blocks": blocks}))
            await front.settled(lambda: bool(maps))
            assert maps[0]["blocks"] == blocks
            assert maps[0]["kv"] == FIGURES["kv"]
            late = front.control(r.Stats(id="v", blocks=True))
            front.clock.advance(0.11)
            await front.settled(lambda: bool(late))
            assert late[0]["blocks"] == blocks  # as fresh as it gets
            assert engine.count(m.AskSnapshot) == 2

    run(scenario())


def test_an_engine_that_has_been_idle_since_its_figures_came_is_not_asked() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request = client.generate()
            rid = (await engine.hears(m.Submit)).rid
            engine.close_request(rid, generated=1)
            await client.end(request)
            await front.status()  # asked before the engine's figures of its idleness have come
            status = await front.status()
            assert status["requests"] == {"running": 0, "waiting": 0, "paused": 0}
            assert engine.count(m.AskSnapshot) == 1
            (ping,) = front.control(r.Ping(id="p"))
            assert (ping["steps"], ping["state"]) == (2, "ready")
            assert front.clock.pending == 1  # keep_alive; nothing ticks

    run(scenario())


def test_an_app_is_listed_with_its_figures_for_a_while_after_it_has_left() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            request = client.generate()
            rid = (await engine.hears(m.Submit)).rid
            engine.write(rid, "abcd")
            engine.close_request(rid, generated=4, prompt=3)
            await client.end(request)
            front.service.closed(client.connection)
            front.clock.advance(REMEMBER_S - 1)
            status = await front.status()
            (app,) = status["apps"]
            assert (app["connections"], app["class"]) == (0, client.connection.priority)
            assert (app["prompt_tokens"], app["cached_tokens"], app["generated_tokens"]) == (
                3,
                1,
                4,
            )
            assert app["hit_percent"] == 33.3
            assert app["ttft_ms"] == 4.0
            front.clock.advance(2)
            status = await front.status()
            assert status["apps"] == []
            stats = await front.answer(r.Stats(id="t"))
            assert stats["tokens"] == {"prompt": 3, "cached": 1, "generated": 4}
            assert stats["requests"]["finished"] == 1

    run(scenario())


def test_an_unloaded_model_leaves_no_figures_behind() -> None:
    async def scenario() -> None:
        async with Front() as front:
            client, engine = await ready(front)
            engine.say(m.Snapshot(FIGURES))
            request = client.generate()
            engine.close_request((await engine.hears(m.Submit)).rid)
            await client.end(request)
            engine.figures = FIGURES
            assert (await front.status())["kv"] == FIGURES["kv"]
            await client.end(client.ask(r.Unload))
            status = await front.status()
            assert status["kv"]["gpu"]["blocks_total"] == 0
            assert (status["steps"], status["backend"]) == (0, None)

    run(scenario())


def test_requests_the_engine_does_not_have_yet_wait() -> None:
    async def scenario() -> None:
        async with Front() as front:
            front.source.automatic = False
            client = front.connect()
            client.generate()
            client.generate()
            status = await front.status()
            assert status["requests"]["waiting"] == 2
            assert status["apps"][0]["waiting"] == 2

    run(scenario())


def test_shutdown_is_answered_at_once_and_passed_on() -> None:
    async def scenario() -> None:
        async with Front() as front:
            (reply,) = front.control(r.Shutdown(id="x"))
            assert reply["type"] == "result"
            front.control(r.Shutdown(id="y", drain=False))
            assert front.shutdowns == [True, False]

    run(scenario())


def test_tokens_per_second_are_those_of_the_last_ten_seconds() -> None:
    account = Account("app", 1)
    for second in range(100, 120):
        account.generated(30, second + 0.5)
    assert account.tokens_per_s(120.0) == 30.0
    assert account.tokens_per_s(125.0) == 15.0
    assert account.tokens_per_s(1000.0) == 0.0


def test_finished_journals_are_forgotten_oldest_first_over_the_budget() -> None:
    remembered = Remembered(budget_bytes=400, per_user_bytes=400)
    journals = []
    for number in range(4):
        journal = Journal(f"r{number}")
        journal.append({"id": "", "seq": 0, "type": "result", "text": "x" * 150})
        remembered.add(journal, uid=1)
        journals.append(journal)
    assert [journal.forgotten for journal in journals] == [True, True, False, False]
    assert remembered.size_bytes <= 400
    remembered.forget(journals[2])
    assert remembered.size_bytes == journals[3].size_bytes

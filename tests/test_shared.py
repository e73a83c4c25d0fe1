"""A daemon that several users share: what each sees and may do, and what none can take from others.

The users are numbers here; `test_shared_users.py` has real ones.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.access import OVERFLOW_UID, Access
from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.auth import Authenticator, Credentials
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.journal import Journal, Remembered
from pagedd_daemon.front.limits import DEFAULT_LIMITS, USERS, for_several_users, names
from pagedd_daemon.front.listener import directory_trouble
from tests.support.front import Client, Front, begun, run
from tests.support.transport import WAIT_MS, Served, connected
from tests.support.transport import Client as Socket

OWNER, ANN, BOB = 990, 1001, 1002
SHARED = Access(shared=True, owner=OWNER)
ALONE = Access(owner=OWNER)


async def two(front: Front) -> tuple[Client, Client]:
    """Ann's and Bob's connection, the model loaded."""
    owner = front.connect("admin", uid=OWNER)
    load = owner.ask(r.Load)
    await front.source.engine(0)
    await owner.end(load)
    front.service.closed(owner.connection)
    return front.connect("editor", uid=ANN), front.connect("editor", uid=BOB)


# ------------------------------------------------------------------------------------ who is let in


def test_a_shared_daemon_admits_every_user_that_can_be_told_from_others() -> None:
    assert [SHARED.admits(uid) for uid in (OWNER, 0, ANN, OVERFLOW_UID)] == [
        True,
        True,
        True,
        False,
    ]
    assert [ALONE.admits(uid) for uid in (OWNER, 0, ANN, OVERFLOW_UID)] == [True] + [False] * 3


def test_a_daemon_of_a_group_serves_its_members_and_administrators() -> None:
    access = Access(shared=True, group=50, owner=OWNER)
    assert access.belongs(ANN, {7, 50})
    assert not access.belongs(BOB, {7, 51})
    assert access.belongs(OWNER, set())
    assert access.belongs(0, set())
    assert SHARED.belongs(BOB, set())


def test_a_user_with_too_many_connections_is_told_to_come_back_and_others_are_let_in() -> None:
    authenticator = Authenticator(SHARED, lambda uid: uid == ANN)

    def status(uid: int) -> bytes:
        address = str(Credentials(uid, 1, 77)).encode()
        return authenticator.answer(
            [b"1.0", b"7", b"pagedd", b"localhost:" + address, b"", b"NULL"]
        )[2]

    assert [status(uid) for uid in (ANN, BOB, OVERFLOW_UID)] == [b"300", b"200", b"400"]


def test_connections_that_say_nothing_count_for_their_user_too(tmp_path: Path) -> None:
    limits = replace(DEFAULT_LIMITS, connections_per_user=2, handshake_ms=300)
    folder = tmp_path / "run"
    with Served(folder, limits, access=Access(shared=True)) as served, ExitStack() as clients:
        said = clients.enter_context(connected(folder))
        for at in range(3):
            mute = clients.enter_context(Socket(folder / "nothing"))
            opened = mute.sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            mute.sock.connect(f"ipc://{folder / 'pagedd.sock'}")
            assert opened.poll(WAIT_MS), at
            mute.sock.disable_monitor()
            opened.close(0)
        late = clients.enter_context(Socket(folder / "nothing"))
        refused = late.sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        late.sock.connect(f"ipc://{folder / 'pagedd.sock'}")
        assert refused.poll(WAIT_MS)
        late.sock.disable_monitor()
        refused.close(0)
        assert served.transport._authenticator.refusals >= 1
        assert said.call("models")["type"] == "result"


@pytest.mark.parametrize(
    ("mode", "gid", "access", "said"),
    [
        (0o700, 5, ALONE, None),
        (0o710, 5, ALONE, "open to others"),
        (0o711, 5, SHARED, None),
        (0o755, 5, SHARED, None),
        (0o700, 5, SHARED, "cannot be entered"),
        (0o731, 5, SHARED, "can be written"),
        (0o710, 50, Access(shared=True, group=50), None),
        (0o750, 50, Access(shared=True, group=50), None),
        (0o710, 51, Access(shared=True, group=50), "belongs to group 51"),
        (0o711, 50, Access(shared=True, group=50), "open to others"),
        (0o770, 50, Access(shared=True, group=50), "open to others"),
        (0o700, 50, Access(shared=True, group=50), "cannot be entered by group 50"),
    ],
)
def test_the_socket_directory_is_open_to_those_who_are_served_and_no_others(
    mode: int, gid: int, access: Access, said: str | None
) -> None:
    trouble = directory_trouble(mode, gid, access)
    assert (trouble is None) if said is None else (trouble is not None and said in trouble[0])


# ----------------------------------------------------------------------------------- what each sees


def test_nobody_sees_the_apps_and_counters_of_another_user_but_administrators_do() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            ann, bob = await two(front)
            engine = front.source.engines[0]
            engine.figures = {"pager": {"steps": 3}, "backend": {"x": 1}, "memory": {"y": 2}}
            request, rid = await begun(ann, engine)
            engine.write(rid, "hello")
            engine.close_request(rid, generated=5)
            await ann.end(request)
            front.service.closed(bob.connection)
            front.connect("secret-plans", uid=BOB)

            def apps(event: Any) -> list[tuple[str, int]]:
                return [(row["app"], row["uid"]) for row in event["apps"]]

            for uid, expected in (
                (ANN, [("editor", ANN)]),
                (BOB, [("editor", BOB), ("secret-plans", BOB)]),
                (1003, []),
            ):
                assert apps(await front.answer(r.Status(id="s"), uid=uid)) == expected
                stats = await front.answer(r.Stats(id="s"), uid=uid)
                assert apps(stats) == expected
                assert stats["tokens"]["generated"] == (5 if uid == ANN else 0)
                assert stats["requests"]["finished"] == (1 if uid == ANN else 0)
                assert stats["pager"] == stats["backend"] == stats["memory"] == {}
                assert stats["energy_joules"] == {}
                listed = await front.answer(r.AppsList(id="l"), uid=uid)
                assert {app["app"] for app in listed["apps"]} == {app for app, _ in expected}
                shown = await front.answer(r.AppsShow(id="w", app="editor"), uid=uid)
                assert {row["uid"] for row in shown["connected"]} <= {uid}
            for uid in (OWNER, 0):
                everything = [
                    ("admin", OWNER),
                    ("editor", ANN),
                    ("editor", BOB),
                    ("secret-plans", BOB),
                ]
                assert apps(await front.answer(r.Status(id="s"), uid=uid)) == everything
                stats = await front.answer(r.Stats(id="s"), uid=uid)
                assert stats["tokens"]["generated"] == 5
                assert stats["pager"] == {"steps": 3}

    run(scenario())


def test_counters_of_an_app_that_left_stay_its_users() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            ann, bob = await two(front)
            engine = front.source.engines[0]
            request, rid = await begun(ann, engine)
            engine.close_request(rid, generated=5)
            await ann.end(request)
            front.service.closed(ann.connection)
            front.service.closed(bob.connection)
            front.clock.advance(120.0)
            for uid, finished in ((ANN, 1), (BOB, 0), (OWNER, 1)):
                stats = await front.answer(r.Stats(id="s"), uid=uid)
                assert (stats["apps"], stats["requests"]["finished"]) == ([], finished)

    run(scenario())


# ------------------------------------------------------------------------------------- who may what


FOR_ADMINISTRATORS: list[r.ControlRequest] = [
    r.Shutdown(id="c"),
    r.Metrics(id="c"),
    r.Stats(id="c", blocks=True),
    r.Reload(id="c"),
    r.AppsSet(id="c", app="editor", settings={"weight": 100.0}),
]


@pytest.mark.parametrize("request_", FOR_ADMINISTRATORS, ids=lambda request: request.verb)
def test_what_all_would_feel_or_see_is_for_administrators(request_: r.ControlRequest) -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            with pytest.raises(WireError) as refused:
                front.control(request_, uid=ANN)
            assert refused.value.code == "E_FORBIDDEN"
            assert front.shutdowns == []
            for uid in (OWNER, 0):
                answer = await front.answer(request_, uid=uid)
                assert answer.get("code") != "E_FORBIDDEN"

    run(scenario())


def test_models_are_loaded_and_unloaded_by_hand_and_by_path_by_administrators_alone() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            ann, _ = await two(front)
            for kind, fields in (
                (r.Load, {"model": "b"}),
                (r.Load, {}),
                (r.Unload, {}),
                (r.Generate, {"prompt": "x", "model": "/home/ann/bomb.gguf"}),
                (r.Generate, {"prompt": "x", "model": "../bomb.gguf"}),
                (r.Tokenize, {"text": "x", "model": "~/bomb"}),
            ):
                end = await ann.end(ann.ask(kind, **fields))
                assert (end["code"], end["retryable"]) == ("E_FORBIDDEN", False)
                assert end["details"] == {"uid": ANN, "owner": OWNER}
            assert front.source.loads == ["a"]
            for uid in (OWNER, 0):
                admin = front.connect("admin", uid=uid)
                assert (await admin.end(admin.ask(r.Unload)))["type"] == "result"

    run(scenario())


def test_how_long_the_model_stays_is_not_for_one_of_several_users_to_say() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            ann, _ = await two(front)
            engine = front.source.engines[0]
            request, rid = await begun(ann, engine, keep_alive=0)
            engine.close_request(rid)
            await ann.end(request)
            assert front.service.models.expires_s == 300.0
            assert not engine.stopped

    run(scenario())


def test_nobody_cancels_what_another_user_asked() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            ann, bob = await two(front)
            engine = front.source.engines[0]
            request, rid = await begun(ann, engine)
            for uid in (BOB, OWNER, 0):
                for asked in (r.Cancel(id="c", all=True), r.Cancel(id="c", app="editor")):
                    assert (await front.answer(asked, uid=uid))["cancelled"] is False
            end = await bob.end(bob.ask(r.SessionOpen))
            stolen = await ann.end(ann.ask(r.SessionFork, session=end["session"]))
            assert stolen["code"] == "E_SESSION"
            assert (await front.answer(r.Cancel(id="c", all=True), uid=ANN))["cancelled"] is True
            await engine.hears(m.Cancel, lambda cancel: cancel.rid == rid)
            assert not [e for e in ann.events(request) if e["type"] == "error"]

    run(scenario())


def test_the_same_app_of_two_users_has_two_namespaces_and_two_shares() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            ann, bob = await two(front)
            engine = front.source.engines[0]
            ann.generate()
            first = await engine.hears(m.App)
            bob.generate()
            second = await engine.hears(m.App)
            assert (first.uid, second.uid) == (ANN, BOB)
            assert (first.name, first.scope) == (second.name, second.scope)
            assert first.root != second.root

    run(scenario())


# ------------------------------------------------------------------------------ limits of each user


def test_a_user_may_take_a_part_and_all_together_the_whole() -> None:
    limits = for_several_users()
    for name in names():
        if name.endswith("_per_user"):
            assert getattr(limits, name) * USERS == getattr(DEFAULT_LIMITS, name)
        else:
            assert getattr(limits, name) == getattr(DEFAULT_LIMITS, name)


def test_requests_of_a_user_at_its_limit_leave_room_for_another() -> None:
    async def scenario() -> None:
        limits = replace(DEFAULT_LIMITS, requests_per_user=2, requests_total=3)
        async with Front(limits=limits, access=SHARED) as front:
            ann, bob = await two(front)
            engine = front.source.engines[0]
            await begun(ann, engine)
            other = front.connect("chat", uid=ANN)
            await begun(other, engine)
            end = await other.end(other.generate())
            details = {"limit": "requests_per_user", "value": 2, "max": 2}
            assert (end["code"], end["details"]) == ("E_BUSY", details)
            request, rid = await begun(bob, engine)
            engine.close_request(rid)
            await bob.end(request)

    run(scenario())


def test_texts_of_a_user_at_its_limit_leave_room_for_another() -> None:
    async def scenario() -> None:
        size = 4 * 100  # of token ids
        limits = replace(DEFAULT_LIMITS, request_bytes_per_user=size + 20)
        async with Front(limits=limits, access=SHARED) as front:
            ann, bob = await two(front)
            engine = front.source.engines[0]
            await begun(ann, engine, tokens="x" * 100, id="a")
            end = await ann.end(ann.generate("x" * 100, id="b"))
            assert (end["code"], end["details"]["limit"]) == ("E_BUSY", "request_bytes_per_user")
            await begun(bob, engine, tokens="x" * 100, id="a")

    run(scenario())


def test_sessions_of_a_user_at_its_limit_leave_room_for_another() -> None:
    async def scenario() -> None:
        limits = replace(DEFAULT_LIMITS, sessions_per_user=2)
        async with Front(limits=limits, access=SHARED) as front:
            ann, bob = front.connect(uid=ANN), front.connect(uid=BOB)
            ends = [await ann.end(ann.ask(r.SessionOpen)) for _ in range(2)]
            other = front.connect("chat", uid=ANN)
            end = await other.end(other.ask(r.SessionOpen))
            assert end["details"] == {"limit": "sessions_per_user", "value": 3, "max": 2}
            assert (await bob.end(bob.ask(r.SessionOpen)))["type"] == "result"
            await ann.end(ann.ask(r.SessionClose, session=ends[0]["session"]))
            assert (await other.end(other.ask(r.SessionOpen)))["type"] == "result"

    run(scenario())


def test_pinned_sessions_of_a_user_at_its_limit_leave_room_for_another() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            front.source.ready = replace(front.source.ready, ram_tokens=2 * USERS * 40)
            ann, bob = await two(front)
            engine = front.source.engines[0]

            async def said(client: Client, words: str) -> str:
                """A session of 21 tokens more than it was told."""
                session = str((await client.end(client.ask(r.SessionOpen)))["session"])
                say = client.ask(r.SessionSay, session=session, content=words)
                rid = (await engine.hears(m.Submit)).rid
                engine.write(rid, "y")
                engine.close_request(rid)
                await client.end(say)
                return session

            first, second = await said(ann, "x" * 8), await said(ann, "x" * 8)
            pinned = await ann.end(ann.ask(r.SessionPin, session=first, pinned=True))
            assert (pinned["pinned"], pinned["max_tokens"]) == (True, 40)
            await engine.hears(m.Submit, lambda submit: submit.hold)
            refused = await ann.end(ann.ask(r.SessionPin, session=second, pinned=True))
            assert refused["code"] == "E_LIMIT"
            assert (refused["details"]["limit"], refused["details"]["max"]) == ("pinned_tokens", 40)
            third = await said(bob, "x" * 8)
            pinned = await bob.end(bob.ask(r.SessionPin, session=third, pinned=True))
            assert pinned["pinned"] is True

    run(scenario())


def test_remembered_events_of_a_user_push_out_none_of_another() -> None:
    remembered = Remembered(budget_bytes=800, per_user_bytes=400)

    def finished(uid: int) -> Journal:
        journal = Journal("r")
        journal.append({"id": "", "seq": 0, "type": "result", "text": "x" * 150})
        remembered.add(journal, uid)
        return journal

    bobs = finished(BOB)
    anns = [finished(ANN) for _ in range(5)]
    assert not bobs.forgotten
    assert [journal.forgotten for journal in anns] == [True, True, True, False, False]
    assert remembered.size_bytes == 3 * bobs.size_bytes
    others = [finished(2000 + at) for at in range(2)]
    assert not bobs.forgotten  # who has most gives way
    assert sum(journal.forgotten for journal in anns) == 4
    assert not any(journal.forgotten for journal in others)
    assert remembered.size_bytes <= 800


def test_the_owner_of_a_daemon_of_its_own_may_do_all() -> None:
    access = Access()
    assert access.administers(os.geteuid())
    assert access.view(os.geteuid()) is access.view(os.geteuid() + 1) is None
    access.require(os.geteuid(), "do that")


def test_a_users_prefixes_are_found_again_after_a_restart_and_by_no_other_user() -> None:
    key = bytes(range(32))

    def root(uid: int) -> bytes:
        """What a daemon that has just started names the pages of the user's editor by."""
        return Apps(secret=key).message(Account("editor", uid, key="1")).root

    assert root(ANN) == root(ANN)
    assert len({root(ANN), root(BOB), root(0), root(OWNER)}) == 4

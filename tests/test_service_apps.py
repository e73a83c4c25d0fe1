"""What an app may: its class, its limits, its namespace, and how that is changed while it runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.config_file import load, parse
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.identity import Program
from tests.support.front import FakeEngine, Front, ready, run

EDITOR = Program("/usr/bin/editor", "app-editor-1.scope")
OTHER = Program("/usr/bin/other")


def apps_of(text: str) -> Apps:
    return Apps(parse(text, "config.toml"))


async def submitted(engine: FakeEngine) -> tuple[m.App, m.Submit]:
    """The next request the engine gets, and what it was told of its app."""
    app = await engine.hears(m.App)
    return app, await engine.hears(m.Submit)


def test_the_engine_knows_an_app_by_user_program_and_name() -> None:
    async def scenario() -> None:
        config = "[apps.ed]\nweight = 3\nmax_running = 2\nkv_floor = 64\nkv_ceiling = 128\n"
        async with Front(apps=apps_of(config)) as front:
            _, engine = await ready(front)
            front.connect("ed", program=EDITOR).generate()
            app, submit = await submitted(engine)
            assert (app.uid, app.scope, app.name) == (1000, "app-editor-1.scope", "ed")
            assert (app.weight, app.max_running) == (3.0, 2)
            assert (app.kv_floor_tokens, app.kv_ceiling_tokens) == (64, 128)
            assert (submit.app, submit.root) == (app.key, app.root)
            front.connect("ed", program=OTHER).generate()
            other, _ = await submitted(engine)
            assert other.key != app.key
            assert other.scope == "/usr/bin/other"

    run(scenario())


def test_a_claimed_class_is_capped_by_the_ceiling() -> None:
    async def scenario() -> None:
        config = '[apps.batch]\nclass = "background"\n[apps.ed]\nclass = "interactive"\n'
        async with Front(apps=apps_of(config)) as front:
            _, engine = await ready(front)
            for app, claimed, klass in (
                ("batch", "interactive", 2),
                ("batch", "background", 2),
                ("ed", "interactive", 0),
                ("ed", "normal", 1),
            ):
                front.connect(app, claimed).generate()
                assert (await submitted(engine))[1].klass == klass
            rows = {row["app"]: row for row in (await front.status())["apps"]}
            assert (rows["batch"]["class"], rows["ed"]["class"]) == ("background", "interactive")

    run(scenario())


def test_settings_for_a_program_are_not_had_by_taking_its_name() -> None:
    async def scenario() -> None:
        config = '[apps.ed]\nweight = 5\nexecutable = "/usr/bin/editor"\n'
        async with Front(apps=apps_of(config)) as front:
            _, engine = await ready(front)
            front.connect("ed", program=OTHER).generate()
            assert (await submitted(engine))[0].weight == 1.0
            front.connect("ed", program=EDITOR).generate()
            assert (await submitted(engine))[0].weight == 5.0

    run(scenario())


def test_unknown_apps_of_one_program_have_two_interactive_samples_under_all_their_names() -> None:
    async def scenario() -> None:
        async with Front() as front:
            _, engine = await ready(front)
            asked = []
            for number in range(4):
                client = front.connect(f"name{number}", "interactive", program=OTHER)
                request = client.generate()
                asked.append((client, request, (await submitted(engine))[1]))
            assert [submit.klass for _, _, submit in asked] == [0, 0, 1, 1]
            front.connect("elsewhere", "interactive", program=EDITOR).generate()
            assert (await submitted(engine))[1].klass == 0
            client, request, submit = asked[0]
            engine.close_request(submit.rid)
            await client.end(request)
            client.generate()
            assert (await submitted(engine))[1].klass == 0, "the first has made room"
            client.generate(n=2)
            assert (await submitted(engine))[1].klass == 1

    run(scenario())


def test_more_waiting_requests_than_an_app_may_have_are_refused() -> None:
    async def scenario() -> None:
        async with Front(apps=apps_of("[apps.app]\nmax_queued = 1\n")) as front:
            client, engine = await ready(front)
            client.generate()
            first = (await engine.hears(m.Submit)).rid
            error = await client.end(client.generate())
            assert error["code"] == "E_BUSY"
            assert error["details"] == {"limit": "max_queued", "value": 1, "max": 1}
            engine.say(m.StepReport(steps=1, started=[(first, 0)]))
            engine.write(first, "x")
            await client.until("r1", "chunk")
            client.generate()
            assert (await engine.hears(m.Submit)).rid > first

    run(scenario())


def test_an_apps_deadline_holds_for_requests_without_one() -> None:
    async def scenario() -> None:
        async with Front(apps=apps_of("[apps.app]\ndeadline_ms = 500\n")) as front:
            client, engine = await ready(front)
            late = client.generate()
            await engine.hears(m.Submit)
            own = client.generate(deadline_ms=5000)
            front.clock.advance(0.6)
            assert (await client.end(late))["code"] == "E_DEADLINE"
            assert [e["type"] for e in client.events(own)] == ["accepted"]

    run(scenario())


def test_apps_that_share_a_group_share_prefixes_and_others_do_not() -> None:
    async def scenario() -> None:
        config = '[apps.a]\nshare = "g"\n[apps.b]\nshare = "g"\n[apps.c]\n'
        async with Front(apps=apps_of(config)) as front:
            _, engine = await ready(front)
            roots = {}
            for name, uid in (("a", 1000), ("b", 1000), ("c", 1000), ("a", 2000)):
                front.connect(name, uid=uid).generate()
                roots[name, uid] = (await submitted(engine))[1].root
            assert roots["a", 1000] == roots["b", 1000]
            assert len(set(roots.values())) == 3

    run(scenario())


def test_a_change_holds_at_once_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"

    async def scenario() -> None:
        async with Front(apps=Apps(load(path), path)) as front:
            client, engine = await ready(front)
            client.generate()
            assert (await submitted(engine))[0].weight == 1.0
            asked = r.AppsSet(id="s", app="app", settings={"weight": 4, "class": "normal"})
            answer = await front.answer(asked, uid=os.geteuid())
            assert answer["known"] is True
            assert (answer["settings"]["weight"], answer["settings"]["class"]) == (4.0, "normal")
            assert (await engine.hears(m.App)).weight == 4.0, "its live requests profit, too"
            listed = await front.answer(r.AppsList(id="l"))
            assert [app["app"] for app in listed["apps"]] == ["app"]
            (row,) = listed["apps"][0]["connected"]
            assert row["weight"] == 4.0

    run(scenario())
    assert load(path).apps["app"].weight == 4.0


def test_a_wrong_change_is_refused_with_its_reason_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"

    async def scenario() -> None:
        async with Front(apps=Apps(load(path), path)) as front:
            asked = r.AppsSet(id="s", app="app", settings={"wieght": 4})
            answer = await front.answer(asked, uid=os.geteuid())
            assert (answer["type"], answer["code"]) == ("error", "E_CONFIG")
            assert "apps.app.wieght: expected weight" in answer["message"]
            shown = await front.answer(r.AppsShow(id="t", app="app"))
            assert shown["known"] is False
            assert shown["settings"]["interactive_samples"] == 2

    run(scenario())
    assert not path.exists()


def test_another_user_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Front(apps=Apps(None, tmp_path / "config.toml")) as front:
            asked = r.AppsSet(id="s", app="app", settings={"weight": 4})
            with pytest.raises(WireError) as caught:
                front.control(asked, uid=os.geteuid() + 1)
            assert caught.value.code == "E_FORBIDDEN"

    run(scenario())

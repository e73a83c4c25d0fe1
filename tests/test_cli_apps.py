"""``pagedd apps`` against a real daemon, and what it does to apps that are connected."""

from __future__ import annotations

import json
import os
import sys

import pytest

import pagedd
from pagedd.cli._apps import parse_settings
from tests.support.daemon import running_daemon


def test_settings_are_made_shown_and_kept() -> None:
    with running_daemon() as daemon:
        done = daemon.command(
            "apps", "set", "editor", "class=normal", "weight=2.5", "max_running=3"
        )
        assert done.returncode == 0, done.stderr
        with daemon.connect("editor", "interactive") as client:
            client.generate([1, 2, 3], max_tokens=4).text()
            (row,) = [a for a in client.status()["apps"] if a["app"] == "editor"]
            assert (row["class"], row["weight"]) == ("normal", 2.5)
            program = row["program"]
            assert program == os.path.realpath(sys.executable) or "." in program
            listed = daemon.command("apps", "list")
            assert "editor" in listed.stdout
            shown = json.loads(daemon.command("apps", "show", "editor", "--json").stdout)
            assert (shown["known"], shown["settings"]["max_running"]) == (True, 3)
            assert shown["connected"][0]["connections"] == 1
            client.set_app("editor", {"max_running": None})
            assert client.app("editor")["settings"]["max_running"] == 0
            assert [app["app"] for app in client.apps() if app["known"]] == ["editor"]
        assert "WEIGHT" in daemon.command("ps").stdout
        file = daemon.folder / "config_home" / "pagedd" / "config.toml"
        assert "weight = 2.5" in file.read_text()


def test_a_wrong_setting_is_refused_with_its_name_and_what_was_expected() -> None:
    with running_daemon(load=False) as daemon:
        done = daemon.command("apps", "set", "editor", "weight=-1", "colour=red")
        assert done.returncode == 78
        assert "apps.editor.weight: expected greater than 0" in done.stderr
        assert "apps.editor.colour: expected a setting that exists" in done.stderr
        with daemon.control() as control, pytest.raises(pagedd.RequestError) as caught:
            control.set_app("editor", {"class": "urgent"})
        assert caught.value.code == "E_CONFIG"


def test_a_wrong_file_keeps_the_daemon_from_starting_and_names_every_mistake() -> None:
    with running_daemon(load=False) as daemon:
        file = daemon.folder / "bad.toml"
        file.write_text("[serve]\nkv_tokens = -1\n[apps.x]\nweight = 0\n")
        done = daemon.command("serve", "--config", str(file), "--backend", "simulated")
        assert done.returncode == 78
        assert f"{file}:2 serve.kv_tokens: expected" in done.stderr
        assert f"{file}:4 apps.x.weight: expected" in done.stderr


def test_options_of_the_command_line_come_before_those_of_the_file() -> None:
    with running_daemon(load=False) as outer:
        file = outer.folder / "serve.toml"
        file.write_text("[serve]\nkv_tokens = 1024\nkeep_alive = 120\n")
        with running_daemon(config=str(file)) as daemon, daemon.control() as control:
            status = control.status()
            assert status["models"][0]["context_tokens"] == 1024 - 16
            assert status["models"][0]["expires_s"] <= 120
        with (
            running_daemon(config=str(file), kv_tokens=2048) as daemon,
            daemon.control() as control,
        ):
            assert control.status()["models"][0]["context_tokens"] == 2048 - 16


def test_values_are_numbers_words_or_taken_away() -> None:
    given = ["a=1", "b=2.5", "c=word", "d=", "e=x=y", "f=.5"]
    parsed = parse_settings(given)
    assert parsed == {"a": 1, "b": 2.5, "c": "word", "d": None, "e": "x=y", "f": 0.5}

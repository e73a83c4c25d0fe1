"""``config.toml``: what is right, what is wrong and where, and how it is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagedd_daemon.front.config import ConfigError, Settings
from pagedd_daemon.front.config_file import change_app, key_lines, load, parse
from pagedd_daemon.front.config_model import ConfigFile

GOOD = """\
# mine
[serve]
kv_tokens = 8192
keep_alive = "10m"

[apps.editor]   # the important one
class = "interactive"
weight = 3
kv_floor = 1024
executable = "/usr/bin/editor"

[apps."night.batch"]
class = "background"
max_running = 2
max_queued = 8
deadline_ms = 60000
share = "work"
"""


def test_a_file_is_read_with_all_it_says_and_a_missing_one_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(GOOD)
    config = load(tmp_path / "config.toml")
    assert config.serve.kv_tokens == 8192
    assert config.serve.keep_alive == 600.0
    editor, batch = config.apps["editor"], config.apps["night.batch"]
    assert (editor.ceiling, editor.weight, editor.kv_floor) == ("interactive", 3.0, 1024)
    assert (batch.ceiling, batch.max_running, batch.share) == ("background", 2, "work")
    assert config.unknown.interactive_samples == 2
    assert load(tmp_path / "none.toml") == ConfigFile()


def test_every_mistake_is_named_at_once_with_its_line_and_what_was_expected() -> None:
    text = (
        "[serve]\n"
        "kv_tokens = -1\n"
        "colour = 3\n"
        "[apps.editor]\n"
        'class = "urgent"\n'
        "weight = 0\n"
        'max_running = "two"\n'
        "[apps.other]\n"
        "wieght = 2\n"
        '[apps."a b"]\n'
    )
    with pytest.raises(ConfigError) as caught:
        parse(text, "config.toml")
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "config.toml:2 serve.kv_tokens",
        "config.toml:3 serve.colour",
        "config.toml:5 apps.editor.class",
        "config.toml:6 apps.editor.weight",
        "config.toml:7 apps.editor.max_running",
        "config.toml:9 apps.other.wieght",
        "config.toml:10 apps.a b",
    ]
    assert lines[0].endswith("expected greater than or equal to 0")
    assert lines[1].endswith("expected a setting that exists")
    assert lines[5].endswith("expected weight, perhaps: nothing has this name")
    assert "'interactive', 'normal' or 'background'" in lines[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[apps.a]\nkv_floor = 20\nkv_ceiling = 10\n",
            "c.toml:2 apps.a.kv_floor: expected at most",
        ),
        (
            '[apps.a]\nshare = "x"\nkv_ceiling = 64\n[apps.b]\nshare = "x"\nkv_ceiling = 32\n',
            "c.toml:6 apps.b.kv_ceiling: expected 64 as for a",
        ),
        (
            "[serve]\nkv_tokens = 100\n[apps.a]\nkv_floor = 60\n[apps.b]\nkv_floor = 60\n",
            "c.toml:2 serve.kv_tokens: expected at least 120",
        ),
        ("[apps\n", "c.toml: "),
        ("apps = 3\n", "c.toml:1 apps: expected"),
    ],
)
def test_settings_that_contradict_are_refused_where_they_stand(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.toml")
    assert str(caught.value).startswith(said)


def test_a_change_keeps_comments_and_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(GOOD)
    config = change_app(path, "editor", {"weight": 2, "kv_floor": None, "class": "normal"})
    assert (config.apps["editor"].weight, config.apps["editor"].kv_floor) == (2.0, 0)
    text = path.read_text()
    assert text == GOOD.replace("weight = 3", "weight = 2").replace(
        'class = "interactive"', 'class = "normal"'
    ).replace("kv_floor = 1024\n", "")


def test_a_change_of_an_app_without_settings_adds_them(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"
    change_app(path, "editor", {"weight": 2.5})
    assert load(path).apps["editor"].weight == 2.5
    assert path.stat().st_mode & 0o077 == 0
    assert [p.name for p in path.parent.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    "settings",
    [{"weight": -1}, {"wieght": 1}, {"class": "urgent"}, {"kv_floor": 9, "kv_ceiling": 3}],
)
def test_a_change_that_would_be_wrong_changes_nothing(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError):
        change_app(path, "editor", settings)
    assert path.read_text() == GOOD
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_a_file_that_is_wrong_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[serve]\nkv_tokens = -1\n")
    with pytest.raises(ConfigError, match=r"serve\.kv_tokens"):
        change_app(path, "editor", {"weight": 1})


def test_lines_of_keys_are_found_in_every_way_to_write_them() -> None:
    text = 'a.b = 1\n[x."y z"]\n# k = 1\nk = "="\n[ p . q ]\nlist = [\n  1,\n]\n'
    assert key_lines(text) == {
        ("a",): 1,
        ("a", "b"): 1,
        ("x",): 2,
        ("x", "y z"): 2,
        ("x", "y z", "k"): 4,
        ("p",): 5,
        ("p", "q"): 5,
        ("p", "q", "list"): 6,
    }


def test_more_ram_than_the_machine_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ram_gb is 1e\+06, and this machine has"):
        Settings(tmp_path, ram_bytes=10**15)


def test_the_disk_tier_has_a_size_and_a_folder_and_none_by_default() -> None:
    config = parse('[disk]\nbudget_gb = 1.5\npath = "/srv/kv"\n', "config.toml")
    settings = config.as_settings()
    assert (settings["disk_bytes"], settings["disk_folder"]) == (1_500_000_000, Path("/srv/kv"))
    assert ConfigFile().as_settings()["disk_bytes"] == 0
    for wrong in ("budget_gb = -1", 'path = "relative"', "budget_gb = nan"):
        with pytest.raises(ConfigError, match=r"config.toml:2 disk\."):
            parse(f"[disk]\n{wrong}\n", "config.toml")

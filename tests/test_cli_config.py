"""``pagedd config``, and the page that is written from the same models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import make_docs
from pagedd_daemon.front.config_model import settings
from tests.support.cli import Ran, run

GOOD = '[serve]\nkeep_alive = "10m"  # long\n\n[apps."night.batch"]\nclass = "background"\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PAGEDD_HOST", f"unix://{tmp_path}/none.sock")
    path = tmp_path / "pagedd" / "config.toml"
    path.parent.mkdir()
    return path


def test_the_page_in_docs_is_what_the_models_say() -> None:
    assert make_docs.PAGE.read_text() == make_docs.page(), "run packaging/dev/make_docs.py"


def test_every_setting_has_a_sentence_a_type_and_a_default() -> None:
    every = list(settings())
    assert len(every) >= 25
    for setting in every:
        assert setting.text.endswith("."), setting
        assert setting.type, setting
        assert setting.default, setting
        counts = setting.type.startswith("whole number")
        assert setting.unit or not counts, f"{setting.key} has no unit"


def test_the_command_line_has_the_same_defaults_as_the_file() -> None:
    from pagedd.cli import _serve
    from pagedd_daemon.front.config_model import ServeSettings

    by_name = {p.name: p for p in _serve.serve.params}
    with _serve.serve.make_context("serve", []) as context:
        for name, field in ServeSettings.model_fields.items():
            assert by_name[name].get_default(context) is not None or field.default is None
            assert context.params[name] == field.default, name


def test_what_is_shown_names_value_unit_and_origin(file: Path) -> None:
    file.write_text(GOOD)
    document = run("config", "show", "--json").document()
    rows = {row["key"]: row for row in document["settings"]}
    assert (rows["serve.keep_alive"]["value"], rows["serve.keep_alive"]["from"]) == (600, "line 2")
    assert rows["serve.drain"] | {"text": ""} == {
        "key": "serve.drain",
        "value": 30.0,
        "default": "30s",
        "unit": "seconds",
        "type": "seconds, or a text like 5m or 1h30m; negative: for ever",
        "holds": "at once",
        "from": "default",
        "text": "",
    }
    assert rows["apps.night.batch.class"]["value"] == "background"
    one = run("config", "show", "serve.drain").out
    assert one.splitlines()[1].split() == ["serve.drain", "30", "seconds", "at", "once", "default"]
    assert "SIGTERM" in one


def test_a_file_that_is_wrong_is_shown_with_every_mistake_and_exits_78(file: Path) -> None:
    file.write_text("[sevre]\n[serve]\nkeep_alve = 3\nkv_tokens = -1\n[apps.a]\nclass = 1\n")
    failed = run("config", "check", "--json")
    assert failed.status == 78
    mistakes = failed.document()["error"]["details"]["mistakes"]
    assert [m.removeprefix(f"{file}:").partition(" expected")[0] for m in mistakes] == [
        "1 sevre:",
        "3 serve.keep_alve:",
        "4 serve.kv_tokens:",
        "6 apps.a.class:",
    ]
    assert "keep_alive, perhaps" in mistakes[1]
    assert "serve, perhaps" in mistakes[0]
    assert run("config", "check").status == 78


def test_a_right_file_and_a_missing_one_are_right(file: Path) -> None:
    assert run("config", "check").status == 0
    file.write_text(GOOD)
    assert run("config", "check").out == f"{file}: right\n"


def test_a_misspelt_setting_or_verb_gets_the_nearest_one(file: Path) -> None:
    failed = run("config", "show", "serve.keep_alve")
    assert (failed.status, "did you mean 'serve.keep_alive'?" in failed.err) == (78, True)
    for words, near in ((("confg",), "config"), (("config", "shwo"), "show"), (("stauts",), "st")):
        failed = run(*words)
        assert failed.status == 64
        assert f"did you mean '{near}" in failed.err


def test_set_changes_the_file_and_keeps_its_comments(file: Path) -> None:
    file.write_text(GOOD)
    done = run("config", "set", "serve.keep_alive=", "apps.night.batch.weight=2", "serve.drain=5s")
    assert done.status == 0
    assert "no daemon was told" in done.out
    assert file.read_text() == (
        '[serve]\ndrain = "5s"\n\n[apps."night.batch"]\nclass = "background"\nweight = 2\n'
    )


@pytest.mark.parametrize(
    ("setting", "status"), [("serve.drian=5s", 78), ("serve.drain=soon", 78), ("drain=5s", 64)]
)
def test_a_wrong_change_changes_nothing(file: Path, setting: str, status: int) -> None:
    file.write_text(GOOD)
    assert run("config", "set", setting).status == status
    assert file.read_text() == GOOD


def test_without_the_daemons_libraries_it_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pagedd_daemon.front.config_model", None)
    failed: Ran = run("config", "show")
    assert failed.status == 69
    assert "pip install 'pagedd[cpu]'" in failed.err

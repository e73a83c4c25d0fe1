"""A measurement that misses what it must reach cannot pass unnoticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import publish
from benchmarks.report import RESULTS, Report, Row, machine_slug, meets
from benchmarks.stages import run


@pytest.mark.parametrize(
    ("value", "must", "ok"),
    [
        (0.95, ">= 0.95", True),
        (0.9499, ">= 0.95", False),
        (1384, "<= 1,384", True),
        (1385, "<= 1,384", False),
        (300, "== 300", True),
        (299, "== 300", False),
        (1, "> 1", False),
        (0.5, "<1", True),
        (-2, ">= -2.5", True),
        (12.0, "", True),
        (math.nan, ">= 0", False),
        (math.nan, "<= 0", False),
    ],
)
def test_a_requirement_is_read_as_it_is_written(value: float, must: str, ok: bool) -> None:
    assert meets(value, must) is ok


@pytest.mark.parametrize("must", ["0.95", ">= ", "about 3", ">= 1 or so", "=> 1"])
def test_a_requirement_that_cannot_be_read_is_an_error(must: str) -> None:
    with pytest.raises(ValueError, match="not a requirement"):
        meets(1.0, must)


def test_a_run_that_reaches_everything_exits_0(tmp_path: Path) -> None:
    report = Report("bench-test", quick=False)
    report.add(Row("speed", 1.0, "of raw", ">= 0.95"))
    report.add(Row("only told", 3.0, "s"))
    assert report.finish(tmp_path) == 0


def test_a_row_that_misses_exits_1_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("bench-test", quick=True)
    report.add(Row("speed", 0.9, "of raw", ">= 0.95"))
    assert report.finish(tmp_path) == 1
    assert "MISSED: speed: 0.9 of raw, must be >= 0.95" in capsys.readouterr().out


def test_the_result_file_has_the_agreed_form(tmp_path: Path) -> None:
    report = Report("bench-test", quick=True)
    report.add(Row("speed", 0.9, "of raw", ">= 0.95", note="median of 3"))
    report.finish(tmp_path)
    document = json.loads((tmp_path / f"bench-test-{machine_slug()}.json").read_text())
    assert set(document) == {"command", "machine", "date", "commit", "quick", "rows"}
    assert document["command"] == "make bench-test QUICK=1"
    assert document["quick"] is True
    assert document["rows"] == [
        {
            "what": "speed",
            "value": 0.9,
            "unit": "of raw",
            "must": ">= 0.95",
            "note": "median of 3",
            "ok": False,
        }
    ]


def test_the_page_of_figures_says_what_the_result_files_say() -> None:
    page = publish.PAGE.read_text()
    assert publish.published(page, RESULTS) == page, "run `python -m benchmarks.publish`"


def test_a_row_of_an_earlier_commit_says_so() -> None:
    row = {"what": "speed", "value": 2.0, "unit": "x", "must": "", "ok": True}
    rows = [{**row, "note": "quick"}, {**row, "commit": "abc"}, {**row, "commit": "def"}]
    head = {"command": "make bench-test", "machine": "m", "date": "d", "commit": "def"}
    *_, first, second, third = publish.table({**head, "rows": rows}, "x.json").splitlines()
    assert [line.split(" | ")[-1] for line in (first, second, third)] == [
        "quick |",
        "at commit `abc` |",
        " |",
    ]


def test_a_quick_run_is_not_published(tmp_path: Path) -> None:
    for quick in (True, False):
        report = Report("bench-cpu", quick=quick)
        report.add(Row("speed", 0.9, "of raw", ">= 0.95"))
        report.write(tmp_path)
        tables = publish.tables(tmp_path)
        assert ("| speed | 0.9 of raw (**missed**) | >= 0.95 |  |" in tables) is not quick


def _stage(name: str, value: float) -> dict[str, Callable[[Report], None]]:
    return {name: lambda report: report.add(Row(f"figure of {name}", value, "s"))}


def test_a_stage_replaces_its_own_rows_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAGEDD_QUICK", raising=False)
    whole = Report("bench-test", quick=False, machine=("m", "a machine"))
    whole.add(Row("figure of one", 0.5, "s"))  # as written before there were stages
    path = whole.write(tmp_path)
    for name, value in [("one", 1.0), ("two", 2.0), ("one", 3.0)]:
        run("bench-test", _stage(name, value), machine=("m", "a machine"), results=tmp_path)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["stage"], row["value"]) for row in rows] == [("two", 2.0), ("one", 3.0)]
    assert all(row["commit"] for row in rows)


def test_stages_may_have_rows_of_the_same_name(tmp_path: Path) -> None:
    def compiled(value: float) -> Callable[[Report], None]:
        return lambda report: report.add(Row("compiled late", value, "", "== 0"))

    for name, value in [("one", 1.0), ("two", 2.0), ("one", 0.0)]:
        stages = {name: compiled(value)}
        run("bench-test", stages, machine=("m", "a machine"), results=tmp_path)
    rows = json.loads((tmp_path / "bench-test-m.json").read_text())["rows"]
    assert [(row["stage"], row["value"]) for row in rows] == [("two", 2.0), ("one", 0.0)]


def test_a_quick_run_of_stages_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEDD_QUICK", "1")
    missed = {"one": lambda report: report.add(Row("figure", 1.0, "s", ">= 2"))}
    assert run("bench-test", missed, machine=("m", "a machine"), results=tmp_path) == 1
    assert list(tmp_path.iterdir()) == []

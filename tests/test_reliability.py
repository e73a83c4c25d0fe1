"""docs/reliability.md: each fault is shown by tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
_SHOWN_BY = re.compile(r"`(test_\w+\.py)`(?: \(([^)]*)\))?")
"""A file, and after it words that the names of tests in it hold, one test after another."""


def rows(page: str) -> list[list[str]]:
    """The faults: what happens, what the user sees, what shows it."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == 3 and row[0] != "fault"]


def names_in(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)


def missing(shown_by: str) -> list[str]:
    """What a last column names that is not there."""
    gone = []
    for name, words in _SHOWN_BY.findall(shown_by):
        path = ROOT / "tests" / name
        if not path.is_file():
            gone.append(name)
            continue
        for phrase in filter(None, re.split(r",\s*", words)):
            wanted = re.sub(r"\W+", "_", phrase.strip())
            if not any(wanted in test for test in names_in(path)):
                gone.append(f"{name} ({phrase})")
    return gone


def test_every_fault_is_shown_by_tests_that_exist() -> None:
    faults = rows(PAGE.read_text(encoding="utf-8"))
    assert len(faults) > 50
    assert [(row[0], gone) for row in faults if (gone := missing(row[2]))] == []


def test_every_fault_says_what_the_user_sees_and_what_shows_it() -> None:
    for fault, seen, shown_by in rows(PAGE.read_text(encoding="utf-8")):
        assert seen, fault
        assert "`" in shown_by, fault


@pytest.mark.parametrize(
    ("shown_by", "gone"),
    [
        ("`test_reliability.py` (every fault is shown by, says what the user)", []),
        ("`test_reliability.py` (no such promise)", ["test_reliability.py (no such promise)"]),
        ("`test_reliability.py`, `test_nothing.py`", ["test_nothing.py"]),
    ],
)
def test_what_is_not_there_is_found(shown_by: str, gone: list[str]) -> None:
    assert missing(shown_by) == gone

"""How the command line writes figures, tables and text it does not trust."""

from __future__ import annotations

import json

import pytest

from pagedd.cli import _output as out


def test_columns_line_up_and_no_line_ends_in_spaces() -> None:
    text = out.table(["NAME", "N", "END"], [["a", "1", ""], ["longer", "100", "x"]], right="N")
    assert text.splitlines() == [
        "NAME       N   END",
        "a          1",
        "longer   100   x",
    ]


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\r", "\x9b31m", "\x7f", "\b"])
def test_what_a_terminal_would_obey_is_made_harmless(text: str) -> None:
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in out.printable(text))
    assert "\x1b" not in out.table(["NAME"], [[text]])


def test_line_ends_tabs_and_all_scripts_stay() -> None:
    assert out.printable("a\tb\nGrüße 你好 🙂") == "a\tb\nGrüße 你好 🙂"


def test_numbers_json_has_no_word_for_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    out.print_json({"top": [float("-inf"), 1.5], "text": "ü"})
    assert json.loads(capsys.readouterr().out) == {"top": [None, 1.5], "text": "ü"}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (98_362_432, "98.4 MB"),
        (4_000_000_000_000, "4.0 TB"),
    ],
)
def test_sizes_are_in_decimal_units(count: int | None, text: str) -> None:
    assert out.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m"), (61, "1m 1s"), (3600, "1h"), (5400, "1h 30m"), (90_000, "1d 1h")],
)
def test_durations_have_the_two_largest_units(seconds: float, text: str) -> None:
    assert out.duration(seconds) == text


def test_a_model_without_an_end_stays_for_ever() -> None:
    assert out.until(None) == "for ever"
    assert out.until(300) == "in 5m"


def test_nested_figures_get_dotted_names() -> None:
    assert out.flat({"a": {"b": 1, "c": 2.5}, "d": [1]}) == [("a.b", "1"), ("a.c", "2.500")]

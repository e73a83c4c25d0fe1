"""How things look on a terminal. One way each: a document, a table, a size, a duration.

Tables are plain text without box drawing or colour, so they read the same in a pipe.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
_CONTROL_BUT_LAYOUT = {code: _CONTROL[code] for code in _CONTROL if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """Text a model or a peer wrote, without what a terminal would obey: escape sequences can
    move the cursor, rename the window or answer as if typed."""
    return text.translate(_CONTROL_BUT_LAYOUT)


def print_json(document: object) -> None:
    """One document. What JSON has no number for, a log-probability of -inf, becomes null."""
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(document), parse_constant=lambda _: None)
        text = json.dumps(finite, indent=2, ensure_ascii=False)
    click.echo(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns three spaces apart, as ``docker ps`` and ``ollama ps`` have them.

    Args:
        header: Column names.
        rows: Cells.
        right: Names of the columns to align right, separated by spaces.
    """
    aligned_right = [name in right.split() for name in header]
    lines = [list(header), *([cell.translate(_CONTROL) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "   ".join(
            cell.rjust(width) if flag else cell.ljust(width)
            for cell, width, flag in zip(line, widths, aligned_right, strict=True)
        ).rstrip()
        for line in lines
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, the values aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}   {value}".rstrip() for name, value in pairs)


def size(count: float | None) -> str:
    """Bytes, in decimal units as disks and other model servers have them."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def tokens(count: float | None) -> str:
    """A number of tokens in at most five characters."""
    if count is None:
        return "-"
    if count < 10_000:
        return f"{count:.0f}"
    return f"{count / 1000:.0f}k" if count < 10_000_000 else f"{count / 1_000_000:.0f}M"


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """The two largest units."""
    whole = round(seconds)
    for unit, smaller, length, fraction in (
        ("d", "h", 86400, 3600),
        ("h", "m", 3600, 60),
        ("m", "s", 60, 1),
    ):
        if whole >= length:
            rest = whole % length // fraction
            return f"{whole // length}{unit}" + (f" {rest}{smaller}" if rest else "")
    return f"{whole}s"


def until(expires_s: float | None) -> str:
    """When a model will be unloaded."""
    if expires_s is None or math.isinf(expires_s):
        return "for ever"
    return f"in {duration(expires_s)}"


def flat(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every figure of a nested map with its dotted name; lists are left to ``--json``."""
    pairs: list[tuple[str, str]] = []
    for name, value in document.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            pairs.append(
                (f"{prefix}{name}", f"{value:.3f}" if type(value) is float else str(value))
            )
    return pairs


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that ``word`` may have been meant to be."""
    near = difflib.get_close_matches(word, known, n=1)
    return near[0] if near else None


def stderr_is_terminal() -> bool:
    """Whether a person looks at standard error."""
    return sys.stderr.isatty()

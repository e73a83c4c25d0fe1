"""Writes docs/configuration.md from the models that ``config.toml`` is checked against.

``python packaging/dev/make_docs.py`` writes it; a test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "daemon"), str(ROOT / "clients" / "python"), str(ROOT / "kvpager")]

from pagedd_daemon.front.config_model import TABLES, Setting, settings  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"

TEMPLATE = Path(__file__).with_name("configuration.md.in")
"""The page with ``@TABLES@`` where the tables go."""


def page() -> str:
    """The whole page."""
    parts: list[str] = []
    every = list(settings())
    for table, model in TABLES.items():
        text = (model.__doc__ or "").split(": ", 1)[1].replace("``", "`")
        parts.append(f"## [{table}]\n\n{text[0].upper()}{text[1:]}\n\n")
        parts.append("| setting | type | unit | default | a change holds | meaning |\n")
        parts.append("|---|---|---|---|---|---|\n")
        parts += [_row(setting) for setting in every if setting.table == table]
        parts.append("\n")
    tables = "".join(parts).rstrip("\n")
    return TEMPLATE.read_text(encoding="utf-8").replace("@TABLES@", tables)


def _row(s: Setting) -> str:
    return f"| `{s.key}` | {s.type} | {s.unit} | {s.default} | {s.holds} | {s.text} |\n"


def main() -> int:
    """Write it."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

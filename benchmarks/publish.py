"""``python -m benchmarks.publish``: the tables of docs/benchmarks.md, made from the result files.

So no figure in that page is typed by hand, and a test compares the two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, shown

PAGE = ROOT / "docs" / "benchmarks.md"
TARGETS = (
    *("bench-cpu", "bench-desktop", "bench-gateway", "bench-gpu", "bench-service"),
    "chaos",
    "soak",
)
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"


def table(document: Mapping[str, Any], source: str) -> str:
    """One result file as a section in Markdown."""
    lines = [
        f"## {document['command'].removeprefix('make ')}",
        "",
        f"`{document['command']}` on {document['machine']}, {document['date']}, commit "
        f"`{document['commit']}` ([{source}](../benchmarks/results/{source})).",
        "",
        "| what | value | must | how |",
        "|---|---|---|---|",
    ]
    for row in document["rows"]:
        value = f"{shown(row['value'])} {row['unit']}"
        missed = "" if row["ok"] else " (**missed**)"
        notes = [row.get("note", "")]
        if (commit := row.get("commit", document["commit"])) != document["commit"]:
            notes.append(f"at commit `{commit}`")
        how = "; ".join(note for note in notes if note)
        lines.append(f"| {row['what']} | {value}{missed} | {row['must']} | {how} |")
    return "\n".join(lines) + "\n"


def tables(results: Path) -> str:
    """Every full run of the `TARGETS` in ``results``; quick ones are not for quoting."""
    sections = []
    for path in (path for target in TARGETS for path in sorted(results.glob(f"{target}-*.json"))):
        document = json.loads(path.read_text(encoding="utf-8"))
        if not document["quick"]:
            sections.append(table(document, path.name))
    return "\n".join(sections)


def published(page: str, results: Path) -> str:
    """The page with the tables of these results."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables(results)}\n{END}{after}"


def main() -> int:
    """Rewrite the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(published(page, RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

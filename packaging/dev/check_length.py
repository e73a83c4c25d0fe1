"""Names Python files that have grown past what a person holds in mind; part of ``make check``.

A report and no gate: where a file is better whole, it stays whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("clients", "daemon", "kvpager", "kernels", "packaging", "benchmarks", "tests")
LONG = 450
"""Lines; the house style aims at about 400."""


def long_files(root: Path) -> list[tuple[int, Path]]:
    """Files of more than `LONG` lines, longest first."""
    found: list[tuple[int, Path]] = []
    for folder in FOLDERS:
        for path in (root / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > LONG:
                found.append((lines, path.relative_to(root)))
    return sorted(found, reverse=True)


def main() -> int:
    """Always exit status 0."""
    found = long_files(ROOT)
    for lines, path in found:
        print(f"warning: {path} has {lines} lines (aim: about 400)")
    print(f"file lengths: {len(found)} over {LONG} lines" if found else "file lengths: fine")
    return 0


if __name__ == "__main__":
    sys.exit(main())

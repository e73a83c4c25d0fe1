"""The one form every measurement of this project is reported in.

A measuring target (``bench-*``, ``chaos``, ``soak``) fills a `Report` with rows and ends with
``sys.exit(report.finish())``: that prints a table, writes `results/TARGET-MACHINE.json` and gives
exit status 1, naming each row, if one misses its ``must``. Long ones do so in stages
(`benchmarks.stages`).
"""

from __future__ import annotations

import json
import math
import operator
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_MUST = re.compile(r"(>=|<=|==|>|<)\s*(-?[\d,]+(?:\.\d+)?)")


def meets(value: float, must: str) -> bool:
    """Whether ``value`` is what ``must`` asks for: ``">= 0.95"``, ``"<= 1,384"``, ``"== 300"``.

    An empty ``must`` asks for nothing; a value that is not a number meets none.

    Raises:
        ValueError: ``must`` is not of this form.
    """
    if not must:
        return True
    match = _MUST.fullmatch(must.strip())
    if match is None:
        raise ValueError(f"not a requirement: {must!r}")
    compare, bound = match.groups()
    return not math.isnan(value) and _COMPARE[compare](value, float(bound.replace(",", "")))


@dataclass(frozen=True, slots=True)
class Row:
    """One figure."""

    what: str
    value: float
    unit: str
    must: str = ""
    """What it must reach, read by `meets`; empty for a figure that is only told."""
    note: str = ""
    """The spread, the sample, the parts a ratio is made of."""

    @property
    def ok(self) -> bool:
        """Whether it reached it."""
        return meets(self.value, self.must)


class Report:
    """The rows of one run of one target."""

    def __init__(
        self,
        target: str,
        *,
        quick: bool,
        machine: tuple[str, str] | None = None,
        part: str = "",
    ) -> None:
        """No rows yet.

        Args:
            target: The name of the make target.
            quick: The sample is a smaller one.
            machine: Where it is measured, fit for a file name and in words; None for this CPU.
            part: Of the target, where a part has a result file of its own.
        """
        self.target = target
        self.part = part
        self.quick = quick
        self.machine = machine or (machine_slug(), machine_words())
        self.rows: list[Row] = []
        # In a pipe rich would wrap the table at 80 columns.
        terminal = sys.stdout.isatty()
        self._console = Console(width=None if terminal else 180)

    def add(self, row: Row) -> None:
        """Keep a row, and show at once how it went."""
        self.rows.append(row)
        mark = "ok  " if row.ok else "MISS"
        text = f"{mark} {row.what}: {shown(row.value)} {row.unit}"
        self._console.print(text, style=None if row.ok else "bold red", highlight=False)

    def finish(self, results: Path = RESULTS) -> int:
        """Write the result file, `show` the table, and return the exit status."""
        path = self.write(results)
        self._console.print(f"written to {_relative(path)}", highlight=False)
        return self.show()

    def show(self) -> int:
        """Print the table and what missed; return the exit status."""
        self._console.print(self._table())
        missed = [row for row in self.rows if not row.ok]
        for row in missed:
            self._console.print(
                f"MISSED: {row.what}: {shown(row.value)} {row.unit}, must be {row.must}",
                style="bold red",
                highlight=False,
            )
        return 1 if missed else 0

    def write(self, results: Path = RESULTS) -> Path:
        """Write the result file and return its path."""
        results.mkdir(parents=True, exist_ok=True)
        named = f"{self.target}-{self.part}" if self.part else self.target
        path = results / f"{named}-{self.machine[0]}.json"
        command = f"make {self.target}" + (f" ONLY={self.part}" if self.part else "")
        document = {
            "command": command + (" QUICK=1" if self.quick else ""),
            "machine": self.machine[1],
            "date": datetime.now(timezone.utc).date().isoformat(),
            "commit": commit(),
            "quick": self.quick,
            "rows": [{**asdict(row), "ok": row.ok} for row in self.rows],
        }
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def _table(self) -> Table:
        title = f"{self.target} on {self.machine[1]}" + (" (QUICK)" if self.quick else "")
        table = Table(title=title)
        table.add_column("what")
        table.add_column("value", justify="right")
        table.add_column("unit")
        table.add_column("must")
        table.add_column("ok")
        table.add_column("note", style="dim")
        for row in self.rows:
            ok = "" if not row.must else "yes" if row.ok else "NO"
            style = None if row.ok else "bold red"
            table.add_row(row.what, shown(row.value), row.unit, row.must, ok, row.note, style=style)
        return table


def shown(value: float) -> str:
    """A figure with the digits that mean something."""
    if math.isnan(value):
        return "none"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _cpu_model() -> str:
    """The CPU's name as the kernel gives it, without its marketing marks."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = match.group(1) if match else platform.processor() or platform.machine()
    name = re.sub(r"\((?:R|TM|tm)\)|\bCPU\b|@.*|\b\d+-Core Processor\b", " ", name)
    return " ".join(name.split())


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_slug() -> str:
    """CPU model and core count, fit for a file name: ``amd-epyc-2c``. Never a host's name."""
    model = re.sub(r"[^a-z0-9]+", "-", _cpu_model().lower()).strip("-")
    return f"{model}-{cores()}c"


def machine_words() -> str:
    """The machine as a reader of the figures wants it."""
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return (
        f"{_cpu_model()}, {cores()} cores, {memory} GiB, {platform.system()} {platform.machine()}"
    )


def commit() -> str:
    """The commit that was measured, with a ``+`` where files had been changed since."""
    sha = _git("rev-parse", "--short=12", "HEAD")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return (sha or "unknown") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],  # noqa: S607 - whichever git the developer uses
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

"""Targets that are measured in stages, any of which can be measured again by itself.

A whole run takes half an hour and more; who has changed what one stage measures repeats that one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.report import RESULTS, Report


def run(
    target: str,
    stages: Mapping[str, Callable[[Report], None]],
    chosen: Sequence[str] = (),
    *,
    machine: tuple[str, str] | None = None,
    results: Path = RESULTS,
) -> int:
    """Measure these stages, all if none is ``chosen``; exit status 1 if a row misses its ``must``.

    Each stage is written when it ends. With ``PAGEDD_QUICK`` samples are smaller, and nothing is.
    """
    quick, status = bool(os.environ.get("PAGEDD_QUICK")), 0
    for name in chosen or stages:
        report = Report(target, quick=quick, machine=machine)
        begin = time.monotonic()
        stages[name](report)
        print(f"stage {name}: {time.monotonic() - begin:.0f} s", flush=True)
        if not quick:
            write_merged(report, name, results)
        status |= report.show()
    if quick:
        print("a quick run: no result file is written")
    return status


def write_merged(report: Report, stage: str, results: Path) -> None:
    """Write a stage's rows, in the place of those of its last run, beside those of the others. Each
    row names the commit that it was measured at."""
    path = results / f"{report.target}-{report.machine[0]}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    document = json.loads(report.write(results).read_text(encoding="utf-8"))
    mine = [{**row, "stage": stage, "commit": document["commit"]} for row in document["rows"]]
    again = {row["what"] for row in mine}
    others = [
        {**row, "commit": row.get("commit", before["commit"])}
        for row in before["rows"]
        # Rows of no stage are from before there were any; other stages may have rows of that name.
        if row.get("stage") != stage and ("stage" in row or row["what"] not in again)
    ]
    document["rows"] = others + mine
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

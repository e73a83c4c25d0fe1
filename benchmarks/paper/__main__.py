"""``make bench-paper``: repeat the paper's experiments, judge them, and keep what they showed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.paper.points import Workers
from benchmarks.paper.sections import SECTIONS, Context
from benchmarks.report import RESULTS, ROOT, Report, cores, machine_slug

DATA = RESULTS / "paper-data.json"
QUICK_RESULTS = ROOT / "build" / "bench-paper"
"""A quick run leaves the committed figures alone."""


def main() -> int:
    """Run every section, or those named; exit status 1 if a row misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--processes", type=int, default=min(2, cores()))
    options = parser.parse_args()
    quick = bool(os.environ.get("PAGEDD_QUICK"))
    report = Report("bench-paper", quick=quick)
    context = Context(report, Workers(options.processes), quick)
    for name in options.sections or SECTIONS:
        began = time.monotonic()
        print(f"{name}:", flush=True)
        context.data[name] = SECTIONS[name](context)
        print(f"  {name} took {time.monotonic() - began:.0f} s", flush=True)
    results = QUICK_RESULTS if quick or options.sections else RESULTS
    status = report.finish(results)
    _write_data(context, results / DATA.name)
    return status


def _write_data(context: Context, path: Path) -> None:
    """Keep the curves that `benchmarks.paper.document` draws, next to the rows."""
    document = {
        "report": f"{context.report.target}-{machine_slug()}.json",
        "sections": context.data,
    }
    path.write_text(json.dumps(_rounded(document), indent=1) + "\n", encoding="utf-8")


def _rounded(value: object) -> object:
    """Floats to six significant digits: more is noise in a diff."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


if __name__ == "__main__":
    sys.exit(main())

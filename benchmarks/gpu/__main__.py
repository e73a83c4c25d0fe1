"""``make bench-gpu``: the CUDA engine's figures, in stages of less than eight minutes each.

    PYTHONPATH=clients/python:daemon:kvpager:kernels python -m benchmarks.gpu [--only NAME …]

Each stage checks what it measures before it measures it, and its rows replace those of its last run
in ``benchmarks/results/bench-gpu-MACHINE.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import RESULTS, Report, machine_words


def _stages() -> dict[str, Callable[[Report], None]]:
    # Imported here, since `--help` must not need torch.
    from benchmarks.gpu import checks, constrained, decode, loading, memory, prefill, returning

    return {
        "check": checks.texts_against_cpu,
        "loading": loading.loading,
        "decode": decode.table,
        "trace": decode.trace,
        "prefill": prefill.throughput,
        "idle": prefill.interference,
        "scan": decode.scan,
        "give-back": memory.give_back,
        "swap": memory.swap,
        "returning": returning.returning,
        "constrained": constrained.constrained,
        "energy": prefill.energy,
        "start": _serving("start"),
        "daemon": _serving("through_daemon"),
    }


def _serving(name: str) -> Callable[[Report], None]:
    """A stage that needs the daemon's libraries, which the others do without."""

    def stage(report: Report) -> None:
        from benchmarks.gpu import serving

        getattr(serving, name)(report)

    return stage


def gpu_machine() -> tuple[str, str]:
    """The GPU fit for a file name, and the machine in words."""
    import torch

    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return slug, f"{name} ({memory:.0f} GiB), torch {torch.__version__}; {machine_words()}"


def write_merged(report: Report, stage: str, folder: Path) -> None:
    """Write a stage's rows, in the place of those of its last run, beside those of the others. Each
    row names the commit that it was measured at."""
    path = folder / f"{report.target}-{report.machine[0]}.json"
    others = []
    if path.is_file():
        before = json.loads(path.read_text())
        rows = [row for row in before["rows"] if row.get("stage") != stage]
        others = [{**row, "commit": row.get("commit", before["commit"])} for row in rows]
    document = json.loads(report.write(folder).read_text())
    now = {"stage": stage, "commit": document["commit"]}
    document["rows"] = others + [{**row, **now} for row in document["rows"]]
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """Run the stages; exit status 1 if a row misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a stage; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    options = parser.parse_args()
    import torch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device; torch finds none", file=sys.stderr)
        return 2
    stages = _stages()
    chosen = options.only or list(stages)
    if unknown := set(chosen) - set(stages):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages)}")
    status = 0
    for name in chosen:
        quick = bool(os.environ.get("PAGEDD_QUICK"))
        report = Report("bench-gpu", quick=quick, machine=gpu_machine())
        begin = time.monotonic()
        stages[name](report)
        print(f"stage {name}: {time.monotonic() - begin:.0f} s", flush=True)
        write_merged(report, name, options.out)
        status |= report.show()
    return status


if __name__ == "__main__":
    sys.exit(main())

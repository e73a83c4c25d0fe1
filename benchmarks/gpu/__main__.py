"""``make bench-gpu``: the CUDA engine's figures, in stages of less than eight minutes each.

    PYTHONPATH=clients/python:daemon:kvpager:kernels python -m benchmarks.gpu [--only NAME …]

Each stage checks what it measures before it measures it, and its rows replace those of its last run
in ``benchmarks/results/bench-gpu-MACHINE.json``.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import RESULTS, Report, machine_words
from benchmarks.stages import run


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
        "returning-disk": returning.from_disk,
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
    stages, chosen = _stages(), options.only or ()
    if unknown := set(chosen) - set(stages):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages)}")
    return run("bench-gpu", stages, chosen, machine=gpu_machine(), results=options.out)


if __name__ == "__main__":
    sys.exit(main())

"""Checks every kernel on a GPU, then measures it beside its floor.

    PYTHONPATH=kernels python -m benchmarks.gpu.kernels --out DIR [--only STAGE ...]

Needs torch and triton and nothing else. A failed check ends the run before anything is measured.
Rows are printed as they come, and written to DIR/kernels.json after each stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu import attention, small
from benchmarks.gpu.pools import Arena
from benchmarks.gpu.timing import copy_bandwidth
from tests.support.kernel_checks import Target, checks, gpu_checks, lone_checks

Row = dict[str, Any]
ARENA_BYTES = 36 << 30
SWEEPS = ("sweep_decode", "sweep_prefill", "sweep_products")


def check() -> Iterable[Row]:
    """Every kernel against its reference, bf16 and fp16; compiled side by side."""
    jobs: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        target = Target("cuda", dtype)
        named = checks(target)
        if dtype == torch.float16:  # the same code; a few show that nothing depends on the type
            named = {
                n: c for n, c in named.items() if "group 4" in n or "cap 2" in n or "," not in n
            }
        else:
            named |= gpu_checks(target)
        jobs |= {f"{n} ({str(dtype)[6:]})": c for n, c in named.items()}

    def run(name: str) -> Row:
        try:
            jobs[name]()
        except Exception as error:
            traceback.print_exc()
            return {"check": name, "ok": False, "why": f"{type(error).__name__}: {error}"}
        return {"check": name, "ok": True}

    with ThreadPoolExecutor(12) as pool:
        yield from pool.map(run, list(jobs))
    alone = lone_checks(Target("cuda", torch.bfloat16))
    jobs |= alone
    yield from map(run, alone)


def stages(arena: Arena, ceiling: float) -> dict[str, Callable[[], Iterable[Row]]]:
    """What is measured, in order."""
    return {
        "decode": partial(attention.decode_grid, arena, ceiling),
        "ragged": partial(attention.ragged, arena, ceiling),
        "every_length": partial(attention.every_length, arena),
        "against": partial(attention.against_others, arena),
        "prefill": partial(attention.prefill, arena),
        "elementwise": partial(small.elementwise, arena),
        "copies": partial(small.block_copies, arena, ceiling),
        "sampling": small.sampling,
        "products": partial(small.products, ceiling),
        "sweep_decode": partial(attention.sweep_decode, arena, ceiling),
        "sweep_prefill": partial(attention.sweep_prefill, arena),
        "sweep_products": partial(small.sweep_products, ceiling),
    }


def _shown(row: Row) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )


class Report:
    """Rows by stage; on disk after each."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kernels.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.stages: dict[str, list[Row]] = {}
        self.machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def run(self, name: str, rows: Callable[[], Iterable[Row]]) -> list[Row]:
        """Print and keep the rows of one stage; what goes wrong in it ends only the stage."""
        print(f"== {name}", flush=True)
        start, kept = time.perf_counter(), []
        try:
            for row in rows():
                kept.append(row)
                print(_shown(row), flush=True)
        except Exception as error:
            traceback.print_exc()
            kept.append({"stage failed": f"{type(error).__name__}: {error}"})
        print(f"   {name} took {time.perf_counter() - start:.0f} s", flush=True)
        self.stages[name] = kept
        self.path.write_text(json.dumps({"machine": self.machine, "stages": self.stages}, indent=1))
        return kept


def summary(stages: dict[str, list[Row]]) -> list[str]:
    """The figures that have a bar, short enough for the end of a terminal."""
    totals = (32768, 65536, 131072, 524288)
    lines = [
        f"decode {_shown(row)}"
        for row in stages.get("decode", [])
        if row.get("group") == 4 and row["batch"] * row["context"] in totals
    ]
    for name in ("ragged", "every_length", "against", "prefill", "elementwise", "sampling"):
        lines += [f"{name} {_shown(row)}" for row in stages.get(name, [])]
    for name in SWEEPS:
        seen: set[object] = set()
        for row in stages.get(name, []):
            case = tuple(row.get(k) for k in ("step", "batch", "context", "product", "rows"))
            if case not in seen or "chosen" in row:
                lines.append(f"{name} {_shown(row)}")
            seen.add(case)
    failed = [row for rows in stages.values() for row in rows if "stage failed" in row]
    failed += [row for row in stages.get("check", []) if not row["ok"]]
    lines += [f"FAILED {_shown(row)}" for row in failed]
    return lines


def main() -> int:
    """Exit status 1 if a check or a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="stages; 'check' is one")
    parser.add_argument("--no-sweep", action="store_true", help="leave the tuning sweeps out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    report = Report(args.out)
    if not args.only or "check" in args.only:
        rows = report.run("check", check)
        if not all(row.get("ok") for row in rows):
            print("\n".join(summary(report.stages)))
            return 1
    ceiling = copy_bandwidth()
    print(f"copy bandwidth {ceiling / 1e12:.3f} TB/s", flush=True)
    report.stages["ceiling"] = [{"TB/s": ceiling / 1e12}]
    torch.cuda.empty_cache()
    arena = Arena(ARENA_BYTES)
    for name, rows_of in stages(arena, ceiling).items():
        if (name in args.only or not args.only) and not (args.no_sweep and name in SWEEPS):
            report.run(name, rows_of)
    print("\n".join(["", "== summary", f"copy {ceiling / 1e12:.3f} TB/s", *summary(report.stages)]))
    return int(any("stage failed" in row for rows in report.stages.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())

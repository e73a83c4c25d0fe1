"""Points of the sweep, run in worker processes that speak JSON lines.

echo '{"policy": "paged", "shape": "alpaca", "count": 500}' | python -m benchmarks.paper.points
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.paper.model import BLOCK_TOKENS, LatencyModel
from benchmarks.paper.simulate import Outcome, Setting, Simulation
from benchmarks.paper.workload import at_once, lengths, poisson

_ROOT = Path(__file__).resolve().parents[2]
SEED = 2309


@dataclass(frozen=True, slots=True)
class Point:
    """One run, as JSON can say it."""

    policy: str
    shape: str
    """A name `workload.lengths` knows."""
    count: int
    """Requests."""
    rate: float = 0.0
    """Arrivals per second; 0: all at the start, so the queue is never empty until the end."""
    samples: int = 1
    block_tokens: int = BLOCK_TOKENS
    swap: bool = True
    changed: str = ""
    """A coefficient of the latency model that is multiplied by ``factor``."""
    factor: float = 1.0


def run(point: Point) -> Outcome:
    """Run one point in this process."""
    pairs = lengths(point.shape, point.count)
    model = LatencyModel()
    if point.changed:
        model = model.changed(point.changed, point.factor)
    prefix = point.shape.removeprefix("prefix-")
    setting = Setting(
        policy=point.policy,
        model=model,
        block_tokens=point.block_tokens,
        samples=point.samples,
        swap=point.swap,
        prefix_tokens=int(prefix) if prefix != point.shape else 0,
    )
    arrivals = poisson(pairs, point.rate, SEED) if point.rate else at_once(pairs)
    return Simulation(setting, arrivals, saturated=not point.rate).run()


class Workers:
    """Runs points in ``processes`` child processes, the longest-looking first."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self.known: dict[Point, Outcome] = {}
        """Every outcome so far: a point is run once."""

    def run(self, points: Sequence[Point]) -> list[Outcome]:
        """The outcomes of ``points``, in order.

        Raises:
            RuntimeError: A worker died.
        """
        todo = list(dict.fromkeys(p for p in points if p not in self.known))
        todo.sort(key=_effort)
        lock = threading.Lock()
        failed: list[str] = []

        def work() -> None:
            with subprocess.Popen(
                [sys.executable, "-m", __spec__.name],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as child:
                assert child.stdin is not None
                assert child.stdout is not None
                while not failed:
                    with lock:
                        if not todo:
                            break
                        point = todo.pop()
                    child.stdin.write(json.dumps(asdict(point)) + "\n")
                    child.stdin.flush()
                    line = child.stdout.readline()
                    if not line:
                        failed.append(f"the worker died at {point}")
                        break
                    self.known[point] = Outcome(**json.loads(line))
                    _show(point, self.known[point])
                child.stdin.close()

        threads = [threading.Thread(target=work) for _ in range(min(self._processes, len(todo)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise RuntimeError(failed[0])
        return [self.known[point] for point in points]


def _effort(point: Point) -> float:
    return point.count * point.samples * (1 if point.shape.endswith("alpaca") else 4)


def _show(point: Point, outcome: Outcome) -> None:
    rate = f"{point.rate:.3g}/s" if point.rate else "at once"
    print(
        f"  {point.policy:7} {point.shape:10} {point.count:6} requests {rate:>8}"
        f"{f' n={point.samples}' if point.samples > 1 else ''}"
        f"{f' block {point.block_tokens}' if point.block_tokens != BLOCK_TOKENS else ''}"
        f"{f' {point.changed} x {point.factor}' if point.changed else ''}:"
        f" {outcome.normalized_s:.3g} s/token, {outcome.in_flight:.1f} in flight",
        flush=True,
    )


def main() -> None:
    """Serve points on standard input until it ends."""
    # The parent goes on to print; only answers may go to our standard output.
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        outcome = run(Point(**json.loads(line)))
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

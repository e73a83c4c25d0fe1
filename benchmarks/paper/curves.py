"""Normalized latency against request rate, and the rate at which it crosses a level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.paper.points import Point, Workers

LEVELS_S = (0.1, 0.2, 0.5)
"""Seconds per output token at which rates are compared; an unloaded server needs 0.035 to 0.05."""
SHARES = (0.3, 0.6, 0.75, 0.85, 0.92, 0.97, 1.02, 1.1, 1.25, 1.5)
"""Rates to try, as shares of what the policy answers when its queue is never empty."""
QUICK_SHARES = (0.6, 0.9, 1.2, 2.0)


def sweep(
    workers: Workers,
    shape: str,
    policies: Mapping[str, tuple[float, Sequence[float]]],
    seconds: float,
    *,
    quick: bool,
) -> dict[str, list[dict[str, Any]]]:
    """Latency curves over Poisson traces of ``seconds``.

    Args:
        workers: Run the points.
        shape: The workload.
        policies: For each, its saturated throughput in requests/s and further rates to try.
        seconds: Length of every trace, so slower policies see fewer requests.
        quick: Try fewer rates.

    Returns:
        For each policy its points by rate: the fields of `Outcome`, and ``rate``.
    """
    shares = QUICK_SHARES if quick else SHARES
    points: dict[str, list[Point]] = {}
    for policy, (capacity, more) in policies.items():
        rates = sorted({*(_rounded(capacity * share) for share in shares), *more})
        points[policy] = [Point(policy, shape, int(rate * seconds), rate=rate) for rate in rates]
    workers.run([point for curve in points.values() for point in curve])
    return {
        policy: [{"rate": p.rate, **asdict(workers.known[p])} for p in curve]
        for policy, curve in points.items()
    }


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def rate_at(curve: Sequence[Mapping[str, Any]], level_s: float) -> float:
    """The rate at which a curve first crosses ``level_s`` seconds per token.

    Between two points the logarithm of latency is taken as linear. NaN if it never does.
    """
    previous: Mapping[str, Any] | None = None
    for point in curve:
        if point["normalized_s"] > level_s:
            if previous is None:
                return math.nan
            low, high = math.log(previous["normalized_s"]), math.log(point["normalized_s"])
            part = (math.log(level_s) - low) / (high - low)
            return float(previous["rate"] + part * (point["rate"] - previous["rate"]))
        previous = point
    return math.nan

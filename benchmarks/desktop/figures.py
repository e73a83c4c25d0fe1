"""Figures of what apps saw: times to the first token, gaps between tokens, how requests ended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.desktop.player import Record

LEAST_FOR_P99 = 200
"""Requests; of fewer, the 99th percentile is the slowest or the one after it."""


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest rank: the least value that ``share`` of all are no greater than; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def first_tokens_ms(records: Sequence[Record]) -> list[float]:
    """Milliseconds to the first token. A request that was dropped before it had one waited at
    least until then; leaving it out would hide the slowest."""
    ends = ((r.arrivals[0][0] if r.arrivals else r.ended) - r.sent for r in records if answered(r))
    return [1e3 * end for end in ends]


def answered(record: Record) -> bool:
    """Whether it had a first token, or was dropped by the app while it waited for one."""
    return bool(record.arrivals) or record.outcome in ("cancelled", "cut off")


def gaps_ms(records: Sequence[Record]) -> list[float]:
    """Milliseconds between tokens. Tokens that come together share the time since those before."""
    gaps: list[float] = []
    for record in records:
        for (before, _), (at, tokens) in zip(record.arrivals, record.arrivals[1:], strict=False):
            gaps += [1e3 * (at - before) / tokens] * tokens
    return gaps


def spread(values: Sequence[float], requests: int) -> str:
    """``p50 …, p95 …`` and p99 where there are enough ``requests``."""
    shares = (0.5, 0.95, 0.99) if requests >= LEAST_FOR_P99 else (0.5, 0.95)
    return ", ".join(f"p{100 * share:.0f} {percentile(values, share):.0f}" for share in shares)


def outcomes(records: Iterable[Record]) -> Counter[str]:
    """Requests by how they ended."""
    return Counter(record.outcome for record in records)


def generated(records: Iterable[Record]) -> int:
    """Tokens that reached an app."""
    return sum(tokens for record in records for _, tokens in record.arrivals)

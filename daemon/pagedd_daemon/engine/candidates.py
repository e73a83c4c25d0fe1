"""Which tokens come into question for a draw, found without sorting a vocabulary.

Every search first takes the tokens whose logit lies within a *reach* of the largest one, checks
that these are enough, and sorts only them; where they are not enough the reach grows until they
are. So the result never depends on the reach, which each sampler adapts to its text.

All give ids with their logits, most likely first. Ties are broken by the lowest id everywhere. Sums
are float64.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Row: TypeAlias = npt.NDArray[np.float32]
"""Logits of one position, shape ``(vocab,)``."""
Ids: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

NEVER = np.float32(-np.inf)
"""The logit of what may not be drawn."""


def at_least(row: Row, floor: float) -> tuple[Ids, Floats]:
    """The tokens whose logit is at least ``floor`` (never those at -inf), most likely first."""
    limit = np.float32(floor)
    if limit < floor:  # the smallest float32 that is not below, so that comparing is exact
        limit = np.nextafter(limit, np.float32(np.inf))
    ids = (row >= limit).nonzero()[0]
    values = row[ids]
    order = (-values).argsort(kind="stable")
    if values[order[-1]] == NEVER:
        order = order[: int((values != NEVER).sum())]
    return ids[order], values[order].astype(np.float64)


def top_k(row: Row, peak: float, k: int, reach: float) -> tuple[Ids, Floats, float]:
    """The ``k`` most likely tokens, most likely first, and the reach to begin with next time."""
    ids = (row >= peak - reach).nonzero()[0]
    if ids.size < k:
        ids = (row >= peak - 1.5 * reach).nonzero()[0]
    if ids.size < k:
        # A steep or unusual distribution: ask for the k-th logit itself.
        ids = (row >= np.partition(row, row.size - k)[row.size - k]).nonzero()[0]
    values = row[ids]
    if ids.size > 2 * k:
        near = (values >= np.partition(values, ids.size - k)[ids.size - k]).nonzero()[0]
        ids, values = ids[near], values[near]
    order = (-values).argsort(kind="stable")[:k]
    ids, values = ids[order], values[order]
    if values[-1] == NEVER:
        real = int((values != NEVER).sum())
        ids, values = ids[:real], values[:real]
    # A little more than was needed, followed slowly: too far costs sorting, too near a retry.
    needed = 1.1 * (peak - float(values[-1])) + 0.1
    reach = reach + 0.25 * (needed - reach) if needed < reach else needed
    return ids, values.astype(np.float64), reach


def prefix(
    row: Row, peak: float, temperature: float, share: float, reach: float
) -> tuple[Ids, Floats, float]:
    """The fewest tokens, most likely first, whose mass at ``temperature`` is at least ``share``.

    Also the reach to begin with next time.
    """
    target = share * float(np.exp((row.astype(np.float64) - peak) / temperature).sum())
    while True:
        ids, values = at_least(row, peak - reach)
        mass = np.exp((values - peak) / temperature).cumsum()
        if mass[-1] >= target:
            break
        if reach == math.inf:
            # Summed in another order the whole can miss a share of nearly 1 by an ulp.
            target = float(mass[-1])
            break
        reach = reach * 2.0 if reach < 64.0 * max(1.0, temperature) else math.inf
    end = int(mass.searchsorted(target)) + 1
    needed = 1.25 * (peak - float(values[end - 1])) + 0.25
    reach = needed if math.isinf(reach) else reach + 0.25 * (needed - reach)
    return ids[:end], values[:end], reach


def typical(ids: Ids, values: Floats, share: float) -> tuple[Ids, Floats]:
    """Locally typical sampling (arXiv 2202.00666) over tokens sorted most likely first.

    Keeps tokens in order of how near their surprise is to the entropy until their mass exceeds
    ``share``; like llama.cpp, at least one, and more than the share rather than exactly it.
    """
    logs = values - values[0]
    logs -= math.log(float(np.exp(logs).sum()))
    mass = np.exp(logs)
    # A token too unlikely for float64 has mass 0: 0 * log is 0 here, as in the limit.
    entropy = -float((mass * logs).sum())
    order = np.abs(-logs - entropy).argsort(kind="stable")
    kept = int(mass[order].cumsum().searchsorted(share, side="right")) + 1
    chosen = np.sort(order[:kept])
    return ids[chosen], values[chosen]

"""How long requests wait: three histograms per class, counted here and written out by `metrics`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds: three to a decade over all that a desktop sees."""


class Histogram:
    """Counts of values by upper bound. Adding one takes 0.2 µs; prometheus_client's own takes ten
    times that, with a lock, and there is one value for each token."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = _S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """One for each bound, and one for what lies above all."""
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """``times`` more values of this size, in seconds."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' buckets: upper bound, and how many values are at most that."""
        total, buckets = 0, []
        bounds = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        for bound, count in zip(bounds, self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class Measures:
    """The histograms of one class of requests."""

    __slots__ = ("between_tokens", "first_token", "queue")

    def __init__(self) -> None:
        self.first_token = Histogram()
        """From a request's arrival to its first token."""
        self.between_tokens = Histogram()
        """From one token of a sample to the next; tokens that came together share the time."""
        self.queue = Histogram()
        """From a request's arrival until its first step."""

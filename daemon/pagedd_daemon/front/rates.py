"""How fast a process may ask: a token bucket for each."""

from __future__ import annotations

from collections.abc import Callable

from pagedd_daemon.front.auth import Credentials
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import Limits

PIECE_BYTES = 4096
"""A message counts once, and once more for each of these: what it takes to read grows with it."""
_MOST_BUCKETS = 1024
"""Beyond this, full ones are forgotten: to have none is to have a full one."""


class Rates:
    """Messages of each process, by the kernel's word about who it is.

    By process and not by connection, so that more connections are no way to more; not by user, so
    that one app cannot use up what its neighbours are allowed.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        """``clock``: seconds, monotonic."""
        self._per_s, self._burst = limits.messages_per_s, limits.message_burst
        self._clock = clock
        self._buckets: dict[tuple[int, int], tuple[float, float]] = {}
        """Process -> what was left, and when."""

    def spend(self, user: Credentials, size: int) -> None:
        """A message of ``size`` bytes has come.

        Raises:
            WireError: ``E_BUSY``: it is one too many.
        """
        now, key = self._clock(), (user.uid, user.pid)
        left, since = self._buckets.get(key, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._per_s)
        cost = 1 + size // PIECE_BYTES
        # Larger than a burst: let in by a full bucket, and paid for afterwards.
        if left < min(cost, self._burst):
            self._buckets[key] = left, now
            wait_ms = int(1000 * (min(cost, self._burst) - left) / self._per_s) + 1
            raise WireError(
                "E_BUSY",
                f"this process sends more than {self._per_s} messages a second",
                details={
                    "limit": "messages_per_s",
                    "max": self._per_s,
                    "burst": self._burst,
                    "retry_ms": wait_ms,
                },
            )
        if key not in self._buckets and len(self._buckets) >= _MOST_BUCKETS:
            self._forget_full(now)
        self._buckets[key] = left - cost, now

    def _forget_full(self, now: float) -> None:
        self._buckets = {
            key: (left, since)
            for key, (left, since) in self._buckets.items()
            if left + (now - since) * self._per_s < self._burst
        }

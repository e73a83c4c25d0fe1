"""How fast a process and a user may ask: a token bucket for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from pagedd_daemon.front.auth import Credentials
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import Limits

PIECE_BYTES = 4096
"""A message counts once, and once more for each of these: what it takes to read grows with it."""
USER_BURST_S = 2
"""Seconds of a user's messages that may come at once, after a silence."""
_MOST_BUCKETS = 1024
"""Beyond this, full ones are forgotten: to have none is to have a full one."""


class _Buckets:
    """The buckets of one limit."""

    def __init__(self, limit: str, per_s: int, burst: int, whose: str) -> None:
        self._limit, self._per_s, self._burst, self._whose = limit, per_s, burst, whose
        self._buckets: dict[Hashable, tuple[float, float]] = {}
        """What was left, and when."""

    def check(self, key: Hashable, cost: int, now: float) -> None:
        """Refuse a message that is one too many.

        Raises:
            WireError: ``E_BUSY``.
        """
        left = self._left(key, now)
        # Larger than a burst: let in by a full bucket, and paid for afterwards.
        wanted = min(cost, self._burst)
        if left < wanted:
            raise WireError(
                "E_BUSY",
                f"{self._whose} sends more than {self._per_s} messages a second",
                details={
                    "limit": self._limit,
                    "max": self._per_s,
                    "burst": self._burst,
                    "retry_ms": int(1000 * (wanted - left) / self._per_s) + 1,
                },
            )

    def take(self, key: Hashable, cost: int, now: float) -> None:
        """The message is let in."""
        if key not in self._buckets and len(self._buckets) >= _MOST_BUCKETS:
            self._buckets = {
                k: b for k, b in self._buckets.items() if self._left(k, now) < self._burst
            }
        self._buckets[key] = self._left(key, now) - cost, now

    def _left(self, key: Hashable, now: float) -> float:
        left, since = self._buckets.get(key, (float(self._burst), now))
        return min(self._burst, left + (now - since) * self._per_s)


class Rates:
    """Messages of each process and user, by the kernel's word about who it is.

    By process and not by connection, so that more connections are no way to more; and not only by
    user, so that one app cannot use up what its neighbours are allowed.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        """``clock``: seconds, monotonic."""
        self._clock = clock
        self._processes = _Buckets(
            "messages_per_s", limits.messages_per_s, limits.message_burst, "this process"
        )
        per_s = limits.messages_per_s_per_user
        self._users = _Buckets("messages_per_s_per_user", per_s, USER_BURST_S * per_s, "this user")

    def spend(self, user: Credentials, size: int) -> None:
        """A message of ``size`` bytes has come.

        Raises:
            WireError: ``E_BUSY``: it is one too many.
        """
        now, cost = self._clock(), 1 + size // PIECE_BYTES
        process = (user.uid, user.pid)
        self._processes.check(process, cost, now)
        self._users.check(user.uid, cost, now)
        self._processes.take(process, cost, now)
        self._users.take(user.uid, cost, now)

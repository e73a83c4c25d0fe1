"""What each app asked and got: counted here, since it must outlive an engine."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from pagedd_daemon.front.identity import UNKNOWN, Program
from pagedd_daemon.messages import Closed

RATE_S = 10
"""Seconds over which tokens per second are averaged."""

REMEMBER_S = 60.0
"""Seconds an app without a connection stays listed."""

_COUNTERS = (
    "finished",
    "cancelled",
    "failed",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
)
_CLASS_ORDER = ("interactive", "normal", "background")


class Account:
    """What one app of one user asked and got."""

    __slots__ = (
        "_bucket",
        "_buckets",
        "app",
        "cached_tokens",
        "cancelled",
        "classes",
        "failed",
        "finished",
        "generated_tokens",
        "key",
        "klass",
        "left",
        "live",
        "program",
        "prompt_tokens",
        "running",
        "ttft_ms",
        "uid",
    )

    def __init__(self, app: str, uid: int, program: Program = UNKNOWN, key: str = "") -> None:
        self.app = app
        self.uid = uid
        self.program = program
        self.key = key
        """What the engine calls it."""
        self.classes: list[str] = []
        """Priority of each open connection."""
        self.klass = "normal"
        """The most important of these; of an app that left, the last one."""
        self.left = 0.0
        """When the last connection closed."""
        self.live = 0
        """Requests that generate and are not over."""
        self.running = 0
        """Of these, those that the engine has begun."""
        self.finished = 0
        self.cancelled = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.ttft_ms: deque[float] = deque(maxlen=64)
        # Tokens of the current second and the RATE_S before it, by second modulo the length.
        self._buckets = [0] * (RATE_S + 1)
        self._bucket = 0

    def generated(self, count: int, now: float) -> None:
        """``count`` more tokens went out."""
        self.generated_tokens += count
        self._turn(now)
        self._buckets[self._bucket % len(self._buckets)] += count

    def closed(self, closed: Closed, counted: int, waited_ms: float) -> None:
        """The engine's last word on a request of which ``counted`` tokens were counted."""
        self.prompt_tokens += closed.prompt_tokens
        self.cached_tokens += closed.cached_tokens
        self.generated_tokens += closed.generated_tokens - counted
        if closed.generated_tokens:
            self.ttft_ms.append(waited_ms + closed.ttft_ms)

    def tokens_per_s(self, now: float) -> float:
        """Mean over the last `RATE_S` whole seconds."""
        self._turn(now)
        size = len(self._buckets)
        return (sum(self._buckets) - self._buckets[self._bucket % size]) / RATE_S

    def _turn(self, now: float) -> None:
        """Empty the buckets of the seconds that passed since the last call."""
        second, size = int(now), len(self._buckets)
        if second != self._bucket:
            for passed in range(self._bucket + 1, min(second, self._bucket + size) + 1):
                self._buckets[passed % size] = 0
            if second - self._bucket > size:
                self._buckets = [0] * size
            self._bucket = second

    def row(self, now: float, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The app's map in ``status``; ``figures`` are the engine's of this app."""
        running = int(figures.get("running", 0))
        prompt, cached = self.prompt_tokens, self.cached_tokens
        return {
            "app": self.app,
            "uid": self.uid,
            "program": self.program.label or None,
            "class": self.klass,
            "connections": len(self.classes),
            "running": running,
            # Those the engine does not have yet (model loading, tokenising) wait too.
            "waiting": max(0, self.live - running),
            "kv": {
                tier: int(figures.get(f"kv_{tier}_tokens", 0)) for tier in ("gpu", "ram", "disk")
            },
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "generated_tokens": self.generated_tokens,
            "hit_percent": round(100 * cached / prompt, 1) if prompt else 0.0,
            "ttft_ms": round(statistics.median(self.ttft_ms), 1) if self.ttft_ms else None,
            "tokens_per_s": round(self.tokens_per_s(now), 1),
            "share_percent": round(100 * float(figures.get("share", 0.0)), 1),
        }


class Accounts:
    """Every app that is connected, or was a moment ago, and sums over all there ever were."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[int, str, str], Account] = {}
        self._opened = 0
        self._gone: dict[int, Account] = {}
        """Counters of those that are forgotten, by user."""

    def open(self, uid: int, app: str, priority: str, program: Program = UNKNOWN) -> Account:
        """The account of an app that opened a connection."""
        whose = (uid, program.label, app)
        account = self._accounts.get(whose)
        if account is None:
            self._opened += 1
            account = self._accounts[whose] = Account(app, uid, program, str(self._opened))
        account.classes.append(priority)
        account.klass = min(account.classes, key=_CLASS_ORDER.index)
        return account

    def close(self, account: Account, priority: str, now: float) -> None:
        """A connection of the app is gone."""
        account.classes.remove(priority)
        if account.classes:
            account.klass = min(account.classes, key=_CLASS_ORDER.index)
        account.left = now
        self._forget_old(now)

    def listed(self, now: float) -> list[Account]:
        """Those to show, by name."""
        self._forget_old(now)
        return sorted(self._accounts.values(), key=lambda account: (account.app, account.uid))

    def total(self, name: str, only: int | None = None) -> int:
        """The sum of a counter over all apps since the start; ``only`` those of one user."""
        accounts = (*self._gone.values(), *self._accounts.values())
        return sum(getattr(a, name) for a in accounts if only in (None, a.uid))

    def counters(self) -> tuple[tuple[str, str, dict[str, int]], ...]:
        """App, program and counters of each; with empty names, those of all that are forgotten.

        Users of one app and program are one.
        """
        found: dict[tuple[str, str], dict[str, int]] = {}
        for account in (Account("", -1), *self._gone.values(), *self._accounts.values()):
            whose = (account.app, account.program.label)
            sums = found.setdefault(whose, dict.fromkeys(_COUNTERS, 0))
            for name in _COUNTERS:
                sums[name] += getattr(account, name)
        return tuple((app, program, sums) for (app, program), sums in found.items())

    def _forget_old(self, now: float) -> None:
        for key, account in list(self._accounts.items()):
            if not account.classes and not account.live and account.left < now - REMEMBER_S:
                del self._accounts[key]
                gone = self._gone.setdefault(account.uid, Account("", account.uid))
                for name in _COUNTERS:
                    setattr(gone, name, getattr(gone, name) + getattr(account, name))

"""Where requests wait before anything is done for them: programs do not stand in each other's way.

A request costs the front, a helper and the engine about 2 ms of work before it is computed, on the
cores that compute. So a program has few requests under way to the engine at the same time, and the
helpers never have more of its texts before another's. And a program that takes back what it has
just asked, again and again, waits with the next one: what it takes back meanwhile was never begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.model_ports import Clock, Timer
from pagedd_daemon.front.stream import Stream

AT_ONCE = 4
"""Requests of a program on their way to the engine: enough to keep every helper busy."""
WASTED = 32
"""Requests that a program may take back in vain at once, before it has to wait."""
WASTED_PER_S = 8.0
"""The same, for any length of time: an editor that asks at every key drops half as many."""
JUST_S = 1.0
"""Seconds from its turn in which a request is taken back in vain. After that it is somebody who did
not want to wait for a busy machine, or the end of a whole batch."""
_MOST_DEBT = 8
_MOST_LINES = 256

Begin: TypeAlias = Callable[[], None]


@dataclass(slots=True)
class _Line:
    """The requests of one program."""

    since: float
    """When ``credit`` was right."""
    credit: float = WASTED
    """Requests that it may still take back; below 1 it waits."""
    waiting: dict[Stream, Begin] = field(default_factory=dict)
    """Oldest first."""
    under_way: set[Stream] = field(default_factory=set)
    timer: Timer | None = None
    """Runs while it waits for credit."""
    advancing: bool = False


class Gate:
    """Begins requests that generate, in the order of their program."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lines: dict[tuple[int, str], _Line] = {}

    def enter(self, stream: Stream, begin: Begin) -> None:
        """Call ``begin`` when it is the request's turn, which may be now; never, once it is over.
        `passed` or `over` must follow."""
        line = self._line(stream.account)
        line.waiting[stream] = begin
        self._advance(line)

    def passed(self, stream: Stream) -> None:
        """The engine has it, or never will: another of its program may begin. Idempotent."""
        line = self._line(stream.account)
        if stream in line.under_way:
            line.under_way.remove(stream)
            self._advance(line)

    def over(self, stream: Stream, *, taken_back: bool) -> None:
        """It is over; ``taken_back`` by its client before that was told anything."""
        line = self._line(stream.account)
        line.waiting.pop(stream, None)
        if taken_back and self._clock.time() - stream.begun < JUST_S:
            self._refill(line)
            line.credit = max(line.credit - 1, -_MOST_DEBT)
        self.passed(stream)

    def _line(self, account: Account) -> _Line:
        whose = (account.uid, account.program.label)
        line = self._lines.get(whose)
        if line is None:
            if len(self._lines) >= _MOST_LINES:
                self._lines = {w: kept for w, kept in self._lines.items() if self._remarkable(kept)}
            line = self._lines[whose] = _Line(self._clock.time())
        return line

    def _remarkable(self, line: _Line) -> bool:
        self._refill(line)
        return bool(line.waiting or line.under_way) or line.credit < WASTED

    def _advance(self, line: _Line) -> None:
        if not line.waiting or line.advancing:
            return
        self._refill(line)
        line.advancing = True  # one that begins may be there at once
        while line.waiting and len(line.under_way) < AT_ONCE and line.credit >= 1:
            stream = next(iter(line.waiting))
            begin = line.waiting.pop(stream)
            line.under_way.add(stream)
            stream.begun = self._clock.time()
            begin()
        line.advancing = False
        if line.waiting and line.credit < 1 and line.timer is None:
            late = (1 - line.credit) / WASTED_PER_S
            line.timer = self._clock.call_later(late, lambda: self._again(line))

    def _again(self, line: _Line) -> None:
        line.timer = None
        self._advance(line)

    def _refill(self, line: _Line) -> None:
        now = self._clock.time()
        line.credit = min(line.credit + (now - line.since) * WASTED_PER_S, WASTED)
        line.since = now

"""Whether the engine makes progress: what health means, here and everywhere it is asked for.

Progress is a message of the engine that says so: a step's report, or a snapshot whose progress
counter has changed (`pagedd_daemon.engine.snapshot`). It is waited for only while the engine has
requests: idle is healthy, and nothing ticks then.

Time is counted in ticks and not by the clock's difference: whoever stops the daemon for an hour, or
closes the lid, adds one tick to what the engine took, and not an hour.
"""

from __future__ import annotations

from collections.abc import Callable

from pagedd_daemon.front.model_ports import Clock, Timer

TICK_S = 1.0

FLOOR_S = 10.0
"""Seconds without progress that are never called stuck: a step takes milliseconds to a second, and
a machine that swaps takes some."""

FIRST_S = 60.0
"""The same before it is known how long steps take here."""

FACTOR = 40.0
"""Median steps that one may take."""


class Watchdog:
    """Waits for progress."""

    def __init__(
        self, clock: Clock, works: Callable[[], bool], stuck: Callable[[float], None]
    ) -> None:
        """``works`` says whether the engine has anything to do; ``stuck`` hears how many seconds it
        did without progress."""
        self._clock = clock
        self._works = works
        self._stuck = stuck
        self._timer: Timer | None = None
        self._ticked = 0.0
        self._counter = -1
        self._median_s = 0.0
        self.silent_s = 0.0
        """Without progress, as far as it was watched."""

    @property
    def bound_s(self) -> float:
        """Seconds without progress after which the engine is stuck."""
        return max(FLOOR_S, FACTOR * self._median_s) if self._median_s else FIRST_S

    @property
    def healthy(self) -> bool:
        """Whether a step has made progress lately, or there is none to be made."""
        return self.silent_s < self.bound_s / 2 or not self._works()

    def watch(self) -> None:
        """The engine has something to do."""
        if self._timer is None:
            self.silent_s = 0.0
            self._ticked = self._clock.time()
            self._timer = self._clock.call_later(TICK_S, self._tick)

    def rest(self) -> None:
        """It has nothing to do any more."""
        self.silent_s = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stepped(self) -> None:
        """The engine reported a step."""
        self.silent_s = 0.0

    def counted(self, progress: int, median_step_s: float) -> None:
        """The engine said how far it is."""
        self._median_s = median_step_s
        if progress != self._counter:
            self._counter = progress
            self.silent_s = 0.0

    def renewed(self) -> None:
        """There is another engine, or none."""
        self._counter, self._median_s, self.silent_s = -1, 0.0, 0.0

    def _tick(self) -> None:
        self._timer = None
        if not self._works():
            self.silent_s = 0.0
            return
        now = self._clock.time()
        self.silent_s += min(now - self._ticked, 2 * TICK_S)
        self._ticked = now
        self._timer = self._clock.call_later(TICK_S, self._tick)
        if self.silent_s >= self.bound_s:
            silent_s, self.silent_s = self.silent_s, 0.0
            self._stuck(silent_s)

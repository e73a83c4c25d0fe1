"""Apps that always want more: what each is charged, by weight and by class."""

from __future__ import annotations

import random
import statistics
import threading
import time

from benchmarks.desktop.servers import DesktopDaemon, play
from benchmarks.desktop.trace import App, Ask, text
from benchmarks.report import Report, Row

POOL_TOKENS = 4_096
_IN_FLIGHT = 40
"""Requests of each app: more than the pool has room for, so both always want more."""
_WINDOW_S = 10.0
"""What the daemon's own shares are of."""
_WARM_S = 5.0
_CASES = (
    ("weights 1:1", ("normal", 1.0), ("normal", 1.0), 0.5),
    ("weights 3:1", ("normal", 3.0), ("normal", 1.0), 0.75),
    ("a background one beside an interactive", ("interactive", 1.0), ("background", 1.0), 0.95),
)


def shares(report: Report, threads: int) -> None:
    """The rows of charged service over a minute; of half of one if quick."""
    seconds = 3 * _WINDOW_S if report.quick else 6 * _WINDOW_S
    for what, one, other, share in _CASES:
        named = {"one": one, "other": other}
        told: dict[str, dict[str, object]] = {
            name: {"class": klass, "weight": weight} for name, (klass, weight) in named.items()
        }
        apps = [_greedy(name, klass) for name, (klass, _) in named.items()]
        with DesktopDaemon(POOL_TOKENS, threads, told) as ours:
            watch = _Watch(ours, seconds)
            watch.start()
            play(ours.server, apps, _WARM_S + seconds + 1.0)
            watch.join()
        got = statistics.mean(watch.seen)
        if one[0] != other[0]:
            got, share = 1.0 - got, 1.0 - share
        windows = ", ".join(f"{100 * seen:.1f}" for seen in watch.seen)
        note = (
            f"got {100 * got:.1f} % for {100 * share:.0f} %; what the first got of ten seconds "
            f"each: {windows} %"
        )
        row = f"two backlogged apps, {what}, over {seconds:.0f} s: service charged, off by"
        report.add(Row(row, 100 * abs(got - share) / share, "%", "<= 10", note))


def _greedy(name: str, klass: str) -> App:
    """Never out of requests."""
    dice = random.Random(name)
    asks = tuple(Ask(text(dice, dice.randint(40, 160)), dice.randint(24, 64)) for _ in range(600))
    return App(name, klass, "batch", asks, in_flight=_IN_FLIGHT)


class _Watch(threading.Thread):
    """Asks for the share of the app ``one`` at the end of every window."""

    def __init__(self, ours: DesktopDaemon, seconds: float) -> None:
        super().__init__(name="watch")
        self._ours = ours
        self._windows = round(seconds / _WINDOW_S)
        self.seen: list[float] = []

    def run(self) -> None:
        """Look until all windows are over."""
        begin = time.monotonic() + _WARM_S
        for window in range(1, self._windows + 1):
            time.sleep(max(0.0, begin + window * _WINDOW_S - time.monotonic()))
            rows = self._ours.daemon.status()["apps"]
            got = {row["app"]: float(row["share_percent"]) for row in rows}
            self.seen.append(got["one"] / max(0.1, got["one"] + got["other"]))

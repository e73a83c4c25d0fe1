"""A short request behind four streams and a prompt of 6,000 tokens: whoever comes last, first."""

from __future__ import annotations

import random
from dataclasses import replace

from benchmarks.desktop.figures import first_tokens_ms, outcomes, percentile, spread
from benchmarks.desktop.peer import Peer
from benchmarks.desktop.player import Record
from benchmarks.desktop.servers import DesktopDaemon, Records, Server, play
from benchmarks.desktop.trace import App, Ask, text
from benchmarks.report import Report, Row
from benchmarks.service import packaged_model

POOL_TOKENS = 16_384
LONG_TOKENS = 6_000
STREAMS = 4
MOST_S = 150.0
_LONG_AT_S = 2.0
"""The streams decode by then."""


def short_behind_long(report: Report, threads: int) -> None:
    """The row of the short requests' time to the first token, and the same of llama.cpp's
    server."""
    apps = _apps(6 if report.quick else 12)
    short = apps[0]
    with DesktopDaemon(POOL_TOKENS, threads, {"short": {"class": "interactive"}}) as ours:
        by_itself, loaded, step_ms = _measure(ours.server, apps, ours)
        equal = [replace(app, klass="normal") for app in apps]
        unranked = play(ours.server, _again(equal, 2), MOST_S)
    idle, busy = first_tokens_ms(by_itself), first_tokens_ms(loaded[short.name])
    most = 2 * percentile(idle, 0.95) + step_ms
    what = f"a short request behind {STREAMS} streams and a {LONG_TOKENS:,}-token prompt: TTFT p95"
    note = (
        f"interactive behind normal apps; alone: {spread(idle, len(idle))}; {_long(loaded)}; one "
        f"step takes {step_ms:.0f} ms on average; {_ended(loaded)}"
    )
    report.add(Row(what, percentile(busy, 0.95), "ms", f"<= {most:.1f}", note))
    same = first_tokens_ms(unranked[short.name])
    note = f"{spread(same, len(same))}; {_long(unranked)}"
    report.add(Row("the same where all apps are normal", percentile(same, 0.95), "ms", "", note))
    size = ("-c", str(POOL_TOKENS), "-np", str(STREAMS + 4), "--kv-unified")
    with Peer(packaged_model(), *size, "-t", str(threads), "-fa", "on") as peer:
        by_itself, loaded, _ = _measure(("--openai", peer.url), apps)
    idle, busy = first_tokens_ms(by_itself), first_tokens_ms(loaded[short.name])
    note = f"alone: {spread(idle, len(idle))}; {_long(loaded)}; {_ended(loaded)}"
    report.add(Row(f"llama.cpp's server, {what}", percentile(busy, 0.95), "ms", "", note))


def _apps(asks: int) -> list[App]:
    """The short app, the long one and the streams. Another short request comes when the one before
    it was answered, and no sooner than after 0.7 s."""
    dice = random.Random(21)
    shorts = tuple(Ask(text(dice, 20), 8, 0.7) for _ in range(asks))
    streams = tuple(Ask(text(dice, 30), 400) for _ in range(STREAMS))
    return [
        App("short", "interactive", "talk", shorts, begin_s=_LONG_AT_S + 0.3),
        App("long", "normal", "batch", (Ask(text(dice, LONG_TOKENS), 8),), begin_s=_LONG_AT_S),
        App("streams", "normal", "batch", streams, in_flight=STREAMS),
    ]


def _again(apps: list[App], seed: int) -> list[App]:
    """Other texts of the same lengths, since a text that was asked before is found."""
    dice = random.Random(seed)
    return [
        replace(
            app,
            asks=tuple(replace(a, text=text(dice, len(a.text.split()))) for a in app.asks),
        )
        for app in apps
    ]


def _measure(
    server: Server, apps: list[App], ours: DesktopDaemon | None = None
) -> tuple[list[Record], Records, float]:
    short = replace(apps[0], begin_s=0.0)
    by_itself = play(server, _again([short], 1), MOST_S)[short.name]
    before = ours.daemon.client.ping()["steps"] if ours else 0
    loaded = play(server, apps, MOST_S)
    steps = (ours.daemon.client.ping()["steps"] if ours else 1) - before
    begin = min(r.sent for records in loaded.values() for r in records)
    end = max(r.ended for records in loaded.values() for r in records)
    return by_itself, loaded, 1e3 * (end - begin) / steps


def _long(loaded: Records) -> str:
    return f"the long prompt took {first_tokens_ms(loaded['long'])[0] / 1e3:.1f} s"


def _ended(loaded: Records) -> str:
    ended = outcomes(record for records in loaded.values() for record in records)
    return ", ".join(f"{count} {how}" for how, count in sorted(ended.items()))

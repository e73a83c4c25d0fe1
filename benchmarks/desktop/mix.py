"""Five apps at once on a pool that is a quarter of what they want."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from benchmarks.desktop.figures import (
    first_tokens_ms,
    gaps_ms,
    generated,
    outcomes,
    percentile,
    spread,
)
from benchmarks.desktop.peer import Peer
from benchmarks.desktop.player import Record
from benchmarks.desktop.servers import DesktopDaemon, Records, Server, alone, play
from benchmarks.desktop.trace import App, desktop, pool_tokens
from benchmarks.gateway import gateway
from benchmarks.report import Report, Row
from benchmarks.service import packaged_model

MOST_S = 480.0
PEOPLE = ("chat", "autocomplete")
"""The apps behind which a person waits."""
PEER_SLOTS = 8
"""Requests that llama.cpp's server runs at a time. With one for each of the 20 in flight it ends
nearly all of them for want of cells; with fewer than eight, apps queue behind each other."""


def settings(apps: Sequence[App]) -> dict[str, dict[str, object]]:
    """What a person would set for these apps: their class."""
    return {app.name: {"class": app.klass} for app in apps}


def desktop_mix(report: Report, threads: int) -> None:
    """The rows of the mix, on the daemon and on llama.cpp's server."""
    on_daemon(report, threads)
    apps = desktop(quick=report.quick)
    with peer(pool_tokens(apps), threads) as other:
        measured(report, "llama.cpp's server", ("--openai", other.url), apps)


@contextlib.contextmanager
def _server(ours: DesktopDaemon, over_http: bool) -> Iterator[Server]:
    if not over_http:
        yield ours.server
        return
    with gateway(ours.daemon) as port:
        yield "--gateway", f"http://127.0.0.1:{port}"


def on_daemon(report: Report, threads: int, *, over_http: bool = False) -> None:
    """The rows of the mix on the daemon, by its own protocol or through the gateway."""
    apps = desktop(quick=report.quick)
    pool = pool_tokens(apps)
    with (
        DesktopDaemon(pool, threads, settings(apps)) as ours,
        _server(ours, over_http) as server,
    ):
        by_itself = _alone(server, apps)
        before, begin = ours.daemon.stats(), ours.daemon.client.ping()
        loaded = play(server, apps, MOST_S)
        after, end = ours.daemon.stats(), ours.daemon.client.ping()
    seconds = _seconds(loaded)
    step_ms = 1e3 * seconds / max(1, end["steps"] - begin["steps"])
    for name in PEOPLE:
        _against_alone(report, name, loaded[name], by_itself[name], step_ms)
    lost = outcomes(chain.from_iterable(loaded.values()))
    count = sum(lost.values())
    broken = lost["failed"] + lost["cut off"]
    what = "desktop mix: requests failed or cut off"
    note = f"of {count} in {seconds:.0f} s; {lost['cancelled']} were dropped by autocomplete itself"
    report.add(Row(what, broken, "requests", "== 0", note))
    _describe(report, "", loaded)
    saved = after["tokens"]["cached"] - before["tokens"]["cached"]
    prompt = after["tokens"]["prompt"] - before["tokens"]["prompt"]
    what = "desktop mix: prefill tokens saved"
    report.add(Row(what, saved, "tokens", "", f"of {prompt:,} of prompts, found in pool or RAM"))
    pager = {name: after["pager"][name] - before["pager"].get(name, 0) for name in after["pager"]}
    moved = pager["stored_pages"] + pager["loaded_pages"]
    note = (
        f"{pager['stored_pages']:,} pages to RAM and {pager['loaded_pages']:,} back; preempted "
        f"{pager['preemptions_swap']} times by swap, {pager['preemptions_recompute']} by recompute"
    )
    report.add(Row("desktop mix: swap traffic", moved, "pages of 16 tokens", "", note))


def peer(pool: int, threads: int) -> Peer:
    """llama.cpp's server with the same pool, tuned for several apps."""
    size = ("-c", str(pool), "-np", str(PEER_SLOTS), "--kv-unified", "--cache-ram", "4096")
    return Peer(packaged_model(), *size, "-t", str(threads), "-fa", "on")


def measured(report: Report, whose: str, server: Server, apps: Sequence[App]) -> None:
    """The rows of another server that plays the same trace."""
    loaded = play(server, apps, MOST_S)
    lost = outcomes(chain.from_iterable(loaded.values()))
    errors = {r.error[:80] for r in chain.from_iterable(loaded.values()) if r.error}
    note = f"of {sum(lost.values())} in {_seconds(loaded):.0f} s; {'; '.join(sorted(errors)[:2])}"
    broken = lost["failed"] + lost["cut off"]
    report.add(Row(f"{whose}, mix: requests failed or cut off", broken, "requests", "", note))
    _describe(report, f"{whose}, ", loaded)


def _alone(server: Server, apps: Sequence[App]) -> Records:
    """Each of `PEOPLE` with the machine to itself; the chat does not wait for its person to read,
    the editor types as it does."""
    by_name = {app.name: app for app in apps}
    some = 40 if len(by_name["autocomplete"].asks) > 100 else 20
    return {
        **play(server, [alone(by_name["chat"], len(by_name["chat"].asks), 0.2)], MOST_S),
        **play(server, [alone(by_name["autocomplete"], some)], MOST_S),
    }


def _against_alone(
    report: Report, name: str, loaded: list[Record], by_itself: list[Record], step_ms: float
) -> None:
    busy, idle = first_tokens_ms(loaded), first_tokens_ms(by_itself)
    most = 2 * percentile(idle, 0.95) + step_ms
    note = (
        f"alone: {spread(idle, len(idle))}; under load: {spread(busy, len(busy))}; one step takes "
        f"{step_ms:.0f} ms on average; {len(busy)} requests"
    )
    what = f"desktop mix: TTFT p95 of {name}, under load"
    report.add(Row(what, percentile(busy, 0.95), "ms", f"<= {most:.1f}", note))


def _describe(report: Report, whose: str, loaded: Records) -> None:
    """What each app saw, and the tokens of all together."""
    figures: tuple[tuple[str, Callable[[Sequence[Record]], list[float]]], ...] = (
        ("TTFT", first_tokens_ms),
        ("between tokens", gaps_ms),
    )
    for name, records in loaded.items():
        ended = outcomes(records)
        told = ", ".join(f"{count} {how}" for how, count in sorted(ended.items()))
        for what, of in figures:
            values = of(records)
            row = f"{whose}{name}: {what} p95"
            note = f"{spread(values, len(records))}; {told}"
            report.add(Row(row, percentile(values, 0.95), "ms", "", note))
    seconds = _seconds(loaded)
    tokens = sum(generated(records) for records in loaded.values())
    note = f"{tokens:,} tokens reached the apps in {seconds:.0f} s"
    report.add(Row(f"{whose}mix: generated, all apps", tokens / seconds, "tok/s", "", note))


def _seconds(loaded: Records) -> float:
    """From the first request to the end of the last."""
    records = list(chain.from_iterable(loaded.values()))
    return max(r.ended for r in records) - min(r.sent for r in records)

"""``pagedd top``: a live view of apps, streams, blocks by tier, and watts."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

import pagedd
from pagedd.cli import _output as out
from pagedd.cli._app import commands, reaches_daemon

Figures = Mapping[str, Any]

_APPS = ("APP", "CLASS", "RUN", "WAIT", "KV(gpu/ram/disk)", "HIT%", "TTFT", "TOK/S", "SHARE%")


@dataclass(frozen=True, slots=True)
class Frame:
    """What is shown at one moment."""

    status: Figures
    stats: Figures
    at: float
    """Seconds, of a clock that only goes forward."""
    watts: Mapping[str, float]
    """By device, since the frame before."""


@commands.command()
@click.option(
    "-d",
    "--delay",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option("-n", "--frames", type=click.IntRange(min=1), help="End after so many.")
@reaches_daemon
def top(delay: float, frames: int | None, json_: bool, host: str | None, timeout: float) -> None:
    """Apps, streams, blocks by tier, time to first token, tokens per second, watts; live.

    Quit with q. Without a terminal, or with --json, it shows one moment (of the last --delay
    seconds, for watts) and ends. Looking never wakes a model.
    """
    with pagedd.control(host=host, timeout=timeout) as control:
        if json_ or not (sys.stdout.isatty() and sys.stdin.isatty()):
            _plain(control, delay, frames or 1, json_)
        else:
            _live(control, delay, frames)


def look(control: pagedd.Control, before: Frame | None) -> Frame:
    """Ask the daemon for everything."""
    status, stats = control.status(), control.stats()
    now = time.monotonic()
    watts: dict[str, float] = {}
    if before is not None and now > before.at:
        earlier = before.stats.get("energy_joules") or {}
        for device, joules in (stats.get("energy_joules") or {}).items():
            used = joules - earlier.get(device, joules)
            if used >= 0:  # a counter that has begun again says nothing
                watts[device] = used / (now - before.at)
    return Frame(status, stats, now, watts)


def _plain(control: pagedd.Control, delay: float, frames: int, json_: bool) -> None:
    frame = look(control, None)
    for number in range(frames):
        if number or frame.stats.get("energy_joules"):
            time.sleep(delay)
            frame = look(control, frame)
        if json_:
            shown = {"status": frame.status, "stats": frame.stats, "watts": dict(frame.watts)}
            out.print_json(shown)
        else:
            click.echo(text(frame))


def _live(control: pagedd.Control, delay: float, frames: int | None) -> None:
    # Slow to import, and only needed here.
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    frame = look(control, None)
    console = Console()
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        shown = 0
        while True:
            # One piece of text: laying out rich tables took four times as long.
            live.update(Text(text(frame), no_wrap=True, overflow="crop"), refresh=True)
            shown += 1
            if shown == frames or _quit_within(delay):
                return
            frame = look(control, frame)


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Keys arrive without Enter, and are not shown."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _quit_within(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0] and sys.stdin.read(1) in ("q", "Q", ""):
            return True
    return False


def text(frame: Frame) -> str:
    """The whole screen."""
    parts = [_head(frame), _tiers(frame.status), _apps(frame.status)]
    warnings = [f"! {out.printable(str(said))}" for said in frame.status.get("degraded") or ()]
    return "\n\n".join(part for part in (*parts, "\n".join(warnings)) if part)


def _head(frame: Frame) -> str:
    status = frame.status
    models = ", ".join(
        f"{m['name']} ({out.size(m['size_bytes'])}, stays {out.until(m['expires_s'])})"
        for m in status["models"]
    )
    requests = status["requests"]
    speed = sum(app["tokens_per_s"] for app in status["apps"])
    streams = ", ".join(f"{requests[name]} {name}" for name in ("running", "waiting", "paused"))
    watts = ", ".join(f"{device} {used:.0f} W" for device, used in frame.watts.items())
    first = f"pagedd {status['version']}   {status['state']}, up {out.duration(status['uptime_s'])}"
    lines = [f"{first}   {status['device'] or '-'}", out.printable(models or "no model loaded")]
    lines.append(f"streams: {streams}   {speed:.1f} tok/s   {watts or 'no power meter'}")
    return "\n".join(lines)


def _tiers(status: Figures) -> str:
    rows = []
    for tier, blocks in status["kv"].items():
        total = blocks["blocks_total"]
        if total:
            counts = (total, blocks["used"], blocks["cached"], blocks["free"])
            rows.append([tier.upper(), *map(out.tokens, counts), _bar(blocks)])
    header = ["KV", "BLOCKS", "USED", "CACHED", "FREE", "# used, + cached"]
    return out.table(header, rows, right="BLOCKS USED CACHED FREE") if rows else ""


def _bar(blocks: Figures, width: int = 40) -> str:
    total = int(blocks["blocks_total"])
    used = round(width * int(blocks["used"]) / total)
    cached = min(width - used, round(width * int(blocks["cached"]) / total))
    return "#" * used + "+" * cached + "." * (width - used - cached)


def _apps(status: Figures) -> str:
    rows = [
        [
            str(app["app"]),
            str(app["class"]),
            str(app["running"]),
            str(app["waiting"]),
            "/".join(out.tokens(app["kv"][tier]) for tier in ("gpu", "ram", "disk")),
            out.number(app["hit_percent"]),
            out.number(app["ttft_ms"], unit=" ms"),
            out.number(app["tokens_per_s"], 1),
            out.number(app["share_percent"]),
        ]
        for app in sorted(status["apps"], key=lambda app: -app["tokens_per_s"])
    ]
    return out.table(_APPS, rows, right=" ".join(_APPS[2:]))

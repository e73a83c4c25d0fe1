"""Commands that show: status, ps, stats, version. None loads or wakes a model."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from typing import Any

import click

import pagedd
from pagedd.cli import _output as out
from pagedd.cli._app import commands, reaches_daemon


@commands.command()
@reaches_daemon
def status(json_: bool, host: str | None, timeout: float) -> None:
    """What the daemon is and how full its pool is."""
    with pagedd.control(host=host, timeout=timeout) as control:
        now = control.status()
    if json_:
        out.print_json(now)
        return
    requests, split = now.get("requests") or {}, now.get("split") or {}
    pairs = [
        ("state", str(now["state"])),
        ("version", f"{now['version']}, pid {now['pid']}, up {out.duration(now['uptime_s'])}"),
        ("backend", f"{now['backend'] or '-'}, {now['device'] or '-'}"),
        ("models", ", ".join(str(model["name"]) for model in now["models"]) or "none loaded"),
        ("requests", _named(requests)),
    ]
    pairs += [("warning", str(sentence)) for sentence in now.get("degraded") or ()]
    click.echo(out.facts(pairs))
    click.echo()
    tiers = [
        [tier.upper(), *(out.tokens(blocks.get(name)) for name in _BLOCKS)]
        for tier, blocks in (now.get("kv") or {}).items()
    ]
    click.echo(
        out.table(
            ["KV", "BLOCKS", "USED", "CACHED", "FREE"], tiers, right="BLOCKS USED CACHED FREE"
        )
    )
    if split:
        click.echo()
        click.echo(f"pool tokens: {_named(split)}")


_BLOCKS = ("blocks_total", "used", "cached", "free")


@commands.command()
@reaches_daemon
def ps(json_: bool, host: str | None, timeout: float) -> None:
    """The loaded model, and a row for each app.

    SHARE% is the part of the work of the last ten seconds that was done for the app: prompt tokens
    that were computed, and generated ones twice. KV is in tokens, on GPU/RAM/disk (the first tier
    is the engine's own memory). HIT% is the share of prompt tokens found in the pool, TTFT the
    median time to the first token, TOK/S the speed of the last ten seconds.
    """
    with pagedd.control(host=host, timeout=timeout) as control:
        now = control.status()
    if json_:
        out.print_json({"models": now["models"], "apps": now["apps"]})
        return
    models = [
        [
            str(model["name"]),
            out.size(model["size_bytes"]),
            str(now["device"] or "-"),
            out.tokens(model["context_tokens"]),
            out.until(model["expires_s"]),
        ]
        for model in now["models"]
    ]
    click.echo(out.table(["NAME", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"], models))
    click.echo()
    header = ["APP", "CLASS", "RUN", "WAIT", "KV(gpu/ram/disk)", "HIT%", "TTFT", "TOK/S"]
    header += ["WEIGHT", "SHARE%"]
    apps = [_app_row(app) for app in now["apps"]]
    if {app["uid"] for app in now["apps"]} - {os.getuid()}:  # who looks decides for several users
        header.append("USER")
        for row, app in zip(apps, now["apps"], strict=True):
            row.append(_user(app["uid"]))
    click.echo(out.table(header, apps, right=" ".join(header[2:])))


@commands.command()
@reaches_daemon
def stats(json_: bool, host: str | None, timeout: float) -> None:
    """Counters since the daemon started."""
    with pagedd.control(host=host, timeout=timeout) as control:
        counters = control.stats()
    if json_:
        out.print_json(counters)
        return
    click.echo(out.facts(out.flat(counters)))


@commands.command()
@reaches_daemon
def version(json_: bool, host: str | None, timeout: float) -> None:
    """The versions of this client and of the daemon, if it runs."""
    daemon: str | None = None
    try:
        with pagedd.control(host=host, timeout=timeout) as control:
            daemon = str(control.status()["version"])
    except pagedd.DaemonNotRunning:
        pass
    if json_:
        out.print_json({"version": pagedd.__version__, "daemon": daemon})
    else:
        click.echo(f"pagedd {pagedd.__version__}, daemon {daemon or 'not running'}")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _app_row(app: Mapping[str, Any]) -> list[str]:
    kv = app["kv"]
    return [
        str(app["app"]),
        str(app["class"] or "-"),
        str(app["running"]),
        str(app["waiting"]),
        "/".join(out.tokens(kv.get(tier)) for tier in ("gpu", "ram", "disk")),
        out.number(app["hit_percent"]),
        out.number(app["ttft_ms"], unit=" ms"),
        out.number(app["tokens_per_s"], 1),
        out.number(app.get("weight"), 1),
        out.number(app.get("share_percent")),
    ]


def _named(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in figures.items()) or "-"

"""Some streams of one app, and what came of each when."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import psutil

import pagedd
from benchmarks.service import Daemon

STREAMS = 8
PROMPT_TOKENS = 64


def prompts(seed: int, highest: int) -> list[list[int]]:
    """`STREAMS` prompts of `PROMPT_TOKENS` ids below ``highest``."""
    dice = random.Random(seed)
    return [[dice.randrange(32, highest) for _ in range(PROMPT_TOKENS)] for _ in range(STREAMS)]


@dataclass(slots=True, eq=False)
class Record:
    """One stream as its client saw it."""

    prompt: list[int]
    reply: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Time and number of tokens of each event."""
    reason: str = ""
    counted: int = -1
    """``generated_tokens`` of the daemon."""
    failure: str = ""

    def pause(self, killed: float) -> float:
        """Seconds from the last event before ``killed`` to the first that came after it."""
        before = [at for at, _ in self.arrivals if at <= killed]
        after = [at for at, _ in self.arrivals if at > killed]
        return after[0] - before[-1] if before and after else float("nan")


@dataclass(slots=True)
class Round:
    """Streams that ran together, and when their engine was killed."""

    records: list[Record]
    killed: list[float] = field(default_factory=list)

    def rate(self, start: float, end: float) -> float:
        """Tokens a second of all streams."""
        took = (n for r in self.records for at, n in r.arrivals if start < at <= end)
        return sum(took) / (end - start)

    def recovered(self, killed: float, share: float, window: float, until: float) -> float:
        """Seconds after ``killed`` from when on a window's rate is ``share`` of that before it; nan
        where the streams were not watched ``until`` so many seconds after."""
        begin = max(r.arrivals[0][0] for r in self.records)
        end = min(r.arrivals[-1][0] for r in self.records)
        others = [k for k in self.killed if k > killed]
        end = min([end, *others])
        if killed - 2 * window < begin or end < killed + until:
            return float("nan")
        wanted = share * self.rate(killed - 2 * window, killed)
        at = killed
        while at + window <= end:
            if self.rate(at, at + window) >= wanted:
                return at - killed
            at += 0.1
        return float("inf")


def engine_of(daemon: Daemon) -> psutil.Process:
    """The engine's process; processes that are just ending are none."""
    found = []
    for process in daemon.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one, too
            if "pagedd_daemon.engine" in process.cmdline():
                found.append(process)
    (engine,) = found
    return engine


async def _read(
    client: pagedd.AsyncClient,
    record: Record,
    options: pagedd.GenerateOptions,
    moved: asyncio.Event,
) -> None:
    try:
        stream = client.generate(record.prompt, **options)
        async for chunk in stream:
            record.arrivals.append((time.monotonic(), len(chunk.tokens)))
            record.reply += chunk.tokens
            moved.set()
        result = await stream.wait()
        record.reason = result.samples[0].reason
        record.counted = result.usage.generated_tokens
    except pagedd.PageddError as error:
        record.failure = f"{error.code}: {error}"
    moved.set()


async def _until(moved: asyncio.Event, condition: Callable[[], bool]) -> None:
    """Wait for a condition that only arrivals change."""
    while not condition():
        moved.clear()
        await moved.wait()


def _over(records: list[Record]) -> bool:
    return any(r.reason or r.failure for r in records)


def _resumed(records: list[Record], since: float) -> bool:
    return _over(records) or all(r.arrivals and r.arrivals[-1][0] > since for r in records)


async def _served_again(client: pagedd.AsyncClient, deaths: int) -> float:
    """When the engine after ``deaths`` others had died was known to be dead as well, and the next
    one ready if anybody needs it.

    Before that tokens still arrive that were on their way, and what is asked is asked of the dead
    one: it would count as one more that died with the request.
    """
    while True:
        ping = await client.ping()
        if ping["engine_deaths"] > deaths and ping["state"] in ("ready", "asleep"):
            return time.monotonic()
        await asyncio.sleep(0.005)


def _reached(records: list[Record], point: int) -> bool:
    return _over(records) or len(records[0].reply) >= point


def _all_reached(records: list[Record], wanted: list[int]) -> bool:
    reached = (len(r.reply) >= n for r, n in zip(records, wanted, strict=True))
    return _over(records) or all(reached)


async def play(
    daemon: Daemon,
    texts: list[list[int]],
    points: list[int],
    *,
    max_tokens: int,
    after: int = 0,
    how: signal.Signals = signal.SIGKILL,
) -> Round:
    """Run a stream for each of ``texts``; kill the engine when the first has so many tokens.

    With ``after``, all are cancelled once each has so many tokens more than at the last kill.
    """
    round_ = Round([Record(text) for text in texts])
    records, moved, deaths = round_.records, asyncio.Event(), 0
    options: pagedd.GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }

    async with pagedd.aconnect("chaos", host=daemon.host, timeout=300) as client:
        reads = [asyncio.ensure_future(_read(client, r, options, moved)) for r in records]
        for point in points:
            if round_.killed:  # all go on in the next engine: it is a whole one that is killed
                served = await _served_again(client, deaths)
                await _until(moved, partial(_resumed, records, served))
            await _until(moved, partial(_reached, records, point))
            if _over(records):
                break  # too near to its end
            pid = engine_of(daemon).pid
            deaths = (await client.ping())["engine_deaths"]
            round_.killed.append(time.monotonic())
            os.kill(pid, how)
        if after:
            wanted = [len(r.reply) + after for r in records]
            await _until(moved, partial(_all_reached, records, wanted))
            daemon.client.cancel_requests(app="chaos")
        await asyncio.gather(*reads)
        if round_.killed and how is signal.SIGKILL:
            await _served_again(client, deaths)
    return round_

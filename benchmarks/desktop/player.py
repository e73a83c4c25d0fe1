"""One app of the desktop mix, in a process of its own: plays what it is ordered to.

Orders (`op`):

    play   `app` (a `benchmarks.desktop.trace.App` as a map), `start` and `until`, times of the
           monotonic clock, which is the same in every process of a machine. What is not over at
           ``until`` is dropped and counts as cut off.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.desktop.endpoint import AskError, Endpoint, Pagedd, Usage
from benchmarks.desktop.openai import OpenAI
from benchmarks.desktop.trace import App, Ask
from benchmarks.worker import Answer, serve_async


@dataclass(slots=True)
class Record:
    """What became of one request."""

    sent: float
    asked: int
    """Tokens of the reply."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When pieces of it came, and their tokens."""
    outcome: str = "cut off"
    """``finished``, ``failed``, ``cancelled`` (by the app, as it meant to), ``cut off`` (the time
    was over)."""
    ended: float = 0.0
    error: str = ""
    prompt: int = 0
    cached: int = 0


async def run(endpoint: Endpoint, ask: Ask, *, talk: bool) -> Record:
    """One request to its end; a cancelled task leaves its record in ``raised.args``."""
    record = Record(time.monotonic(), ask.tokens)
    said = endpoint.talk if talk else endpoint.complete
    try:
        async for piece in said(ask.text, ask.tokens):
            if isinstance(piece, Usage):
                record.prompt, record.cached = piece.prompt, piece.cached
            else:
                record.arrivals.append((time.monotonic(), piece))
        record.outcome = "finished"
    except AskError as error:
        record.outcome, record.error = "failed", str(error)[:300]
    except asyncio.CancelledError:
        record.outcome = "cancelled"
    record.ended = time.monotonic()
    return record


class Play:
    """An app at work."""

    def __init__(self, endpoint: Endpoint, app: App, start: float) -> None:
        self._endpoint = endpoint
        self._app = app
        self._start = start + app.begin_s
        self._records: list[Record] = []
        self._tasks: set[asyncio.Task[Record]] = set()

    async def until(self, end: float) -> list[Record]:
        """Play the app, at most until ``end``."""
        play = {"talk": self._talk, "type": self._type, "batch": self._batch}[self._app.kind]
        try:
            await asyncio.wait_for(play(), end - time.monotonic())
        except asyncio.TimeoutError:
            for task in list(self._tasks):
                task.cancel()
            for record in await asyncio.gather(*self._tasks):
                record.outcome = "cut off"
        return self._records

    async def _ask(self, ask: Ask, *, talk: bool = False) -> Record:
        task = self._begin(ask, talk=talk)
        # Shielded: at the end of the time `until` ends the request, and keeps its record.
        return await asyncio.shield(task)

    def _begin(self, ask: Ask, *, talk: bool = False) -> asyncio.Task[Record]:
        task = asyncio.create_task(run(self._endpoint, ask, talk=talk))
        self._tasks.add(task)

        def over(done: asyncio.Task[Record]) -> None:
            self._tasks.discard(done)
            self._records.append(done.result())

        task.add_done_callback(over)
        return task

    async def _talk(self) -> None:
        await _sleep_until(self._start)
        for ask in self._app.asks:
            await asyncio.sleep(ask.wait_s)
            await self._ask(ask, talk=True)

    async def _type(self) -> None:
        due = self._start
        last: asyncio.Task[Record] | None = None
        for ask in self._app.asks:
            due += ask.wait_s
            await _sleep_until(due)
            if last is not None and not last.done():
                last.cancel()
            last = self._begin(ask)
        if last is not None:
            await asyncio.shield(last)

    async def _batch(self) -> None:
        await _sleep_until(self._start)
        asks = iter(self._app.asks)

        async def line() -> None:
            for ask in asks:
                await self._ask(ask)

        await asyncio.gather(*(line() for _ in range(self._app.in_flight)))


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))


def app_of(made: dict[str, Any]) -> App:
    """An app that went through JSON."""
    asks = tuple(Ask(**ask) for ask in made["asks"])
    return App(**{**made, "asks": asks})


async def handle(endpoint: Endpoint, order: Answer) -> Answer:
    """One order of the parent."""
    app = app_of(order["app"])
    records = await Play(endpoint, app, order["start"]).until(order["until"])
    return {"records": [asdict(record) for record in records]}


async def main() -> None:
    """Connect and answer orders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pagedd", help="host of a daemon")
    parser.add_argument("--gateway", help="URL of a gateway before a daemon")
    parser.add_argument("--openai", help="URL of any other server")
    parser.add_argument("--app", required=True)
    parser.add_argument("--class", dest="klass", default="normal")
    options = parser.parse_args()
    endpoint: Endpoint
    if options.pagedd:
        endpoint = await Pagedd.connect(options.pagedd, options.app, options.klass)
    elif options.gateway:
        told = {"X-Pagedd-App": options.app, "X-Pagedd-Priority": options.klass}
        endpoint = OpenAI(options.gateway, None, told)
    else:
        endpoint = OpenAI(options.openai)
    try:
        await serve_async(lambda order: handle(endpoint, order))
    finally:
        await endpoint.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

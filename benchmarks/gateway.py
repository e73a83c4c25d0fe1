"""``make bench-gateway``: what HTTP adds, against the ZeroMQ client on the same daemon.

On the simulated backend, whose steps take a known time, so that what is compared is the way and not
the model. Both ways are asked alternately, from one process on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import pagedd
from benchmarks.report import ROOT, Report, Row
from benchmarks.service import Daemon, environment

PROMPT_TOKENS = 64
STEP_US = 5000
"""Of the rows on one stream: 200 tokens a second."""
BUSY_STEP_US = 20_000
"""Of the row on 64 streams: 3,200 tokens a second, about what an 8B model on a large GPU gives."""
STREAMS = 64

Ask = Callable[[list[int], int], Awaitable["Times"]]
"""Prompt and number of tokens."""


@dataclass(frozen=True, slots=True)
class Times:
    """When what came of one stream, by the monotonic clock."""

    sent: float
    arrivals: Sequence[float]

    @property
    def ttft_ms(self) -> float:
        """To its first token."""
        return (self.arrivals[0] - self.sent) * 1e3

    @property
    def per_token_ms(self) -> float:
        """Between two tokens."""
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1) * 1e3


async def by_socket(client: pagedd.AsyncClient, prompt: list[int], tokens: int) -> Times:
    """One stream over the daemon's own protocol."""
    sent = time.monotonic()
    stream = client.generate(prompt, max_tokens=tokens, ignore_eos=True)
    arrivals = [time.monotonic() async for chunk in stream for _ in chunk.tokens]
    assert len(arrivals) == tokens
    return Times(sent, arrivals)


class Http:
    """A connection to the gateway that stays open, as clients of its kind keep it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, prompt: list[int], tokens: int) -> Times:
        """One stream over HTTP; an event is read as far as telling what it is."""
        fields = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        sent = time.monotonic()
        self._writer.write(f"{head}\r\n\r\n".encode() + body)
        status = await self._reader.readuntil(b"\r\n\r\n")
        if not status.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the gateway answered {status!r}")
        arrivals = []
        while True:
            line = await self._reader.readline()
            if line == b"data: [DONE]\n":
                break
            if line.startswith(b"data: ") and b'"finish_reason":null' in line:
                arrivals.append(time.monotonic())
        await self._reader.readuntil(b"0\r\n\r\n")
        return Times(sent, arrivals)

    async def close(self) -> None:
        """End the connection."""
        self._writer.close()
        await self._writer.wait_closed()


@contextlib.contextmanager
def gateway(daemon: Daemon) -> Iterator[int]:
    """``pagedd gateway`` in front of a daemon; its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pagedd", "gateway", "--port", "0", "--daemon", daemon.host],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        if "listening at" not in line:
            raise SystemExit(f"the gateway did not start: {line}")
        yield int(line.rsplit(":", 1)[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@contextlib.asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[Http]]:
    """Open connections to the gateway."""
    made = [Http(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(count)]
    try:
        yield made
    finally:
        for one in made:
            await one.close()


def prompt() -> list[int]:
    """One that nothing of is cached."""
    return [random.randrange(256) for _ in range(PROMPT_TOKENS)]


async def _one_stream(host: str, port: int, rounds: int) -> tuple[list[Times], list[Times]]:
    """Streams one after the other, alternately on both ways."""
    direct: list[Times] = []
    through: list[Times] = []
    async with pagedd.aconnect("bench", host=host) as client, connections(port, 1) as (http,):
        for at in range(rounds + 3):
            pair = await by_socket(client, prompt(), 40), await http.ask(prompt(), 40)
            if at >= 3:  # the first ones find nothing warm
                direct.append(pair[0])
                through.append(pair[1])
    return direct, through


async def _many_streams(host: str, port: int, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens a second of all streams together, alternately on both ways."""
    tokens = 100
    direct: list[float] = []
    through: list[float] = []
    async with (
        pagedd.aconnect("bench", host=host) as client,
        connections(port, STREAMS) as opened,
    ):
        ways: list[tuple[list[float], list[Ask]]] = [
            (direct, [lambda p, t: by_socket(client, p, t)] * STREAMS),
            (through, [http.ask for http in opened]),
        ]
        for at in range(rounds + 1):
            for rates, asks in ways:
                began = time.monotonic()
                await asyncio.gather(*(ask(prompt(), tokens) for ask in asks))
                if at:
                    rates.append(STREAMS * tokens / (time.monotonic() - began))
    return direct, through


def one_stream(report: Report) -> None:
    """Rows on what HTTP adds to one stream."""
    rounds = 30 if report.quick else 150
    arguments = ("--backend", "simulated", "--simulated-step-us", str(STEP_US))
    with Daemon(*arguments) as daemon, gateway(daemon) as port:
        direct, through = asyncio.run(_one_stream(daemon.host, port, rounds))
    for what, must, figure in (
        ("added to time to first token, p50", "<= 3", attrgetter("ttft_ms")),
        ("added per token, p50", "<= 0.3", attrgetter("per_token_ms")),
    ):
        a, b = (statistics.median(map(figure, times)) for times in (direct, through))
        note = f"{a:.2f} ms by the ZeroMQ client, {b:.2f} ms over HTTP; {rounds} streams each, "
        note += f"steps of {STEP_US / 1000:g} ms"
        report.add(Row(what, b - a, "ms", must, note))


def many_streams(report: Report) -> None:
    """The row on 64 streams at once."""
    rounds = 5 if report.quick else 15
    arguments = ("--backend", "simulated", "--simulated-step-us", str(BUSY_STEP_US))
    with Daemon(*arguments) as daemon, gateway(daemon) as port:
        direct, through = asyncio.run(_many_streams(daemon.host, port, rounds))
    a, b = statistics.median(direct), statistics.median(through)
    note = f"{b:,.0f} of {a:,.0f} tokens/s, medians of {rounds}; steps of {BUSY_STEP_US // 1000} ms"
    what = f"{STREAMS} streams at once, over HTTP against the ZeroMQ client"
    report.add(Row(what, b / a, "of its throughput", ">= 0.95", note))


def main() -> int:
    """Measure; exit status 1 if a row misses what it must reach."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("bench-gateway", quick=bool(os.environ.get("PAGEDD_QUICK")))
    one_stream(report)
    many_streams(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

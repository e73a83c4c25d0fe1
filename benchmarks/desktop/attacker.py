"""A neighbour that means no good, in a process of its own until it is ended.

It runs from a copy of the interpreter, so that to the daemon it is another program than the app
that it harms; it calls itself interactive, like anybody may.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine

import pagedd
from benchmarks.desktop.trace import text

_PROMPT_WORDS = 300
_REPLY_TOKENS = 256
_AT_ONCE = 200
"""Requests in flight: below the limit of one connection, which would only end in errors."""
_NAMES = 100
_CANCEL_AFTER_S = 0.02


class Attack:
    """One way to be in the way."""

    def __init__(self, host: str, seed: int) -> None:
        self._host = host
        self._dice = random.Random(seed)

    def _client(self, name: str) -> pagedd.AsyncClient:
        return pagedd.aconnect(name, "interactive", host=self._host, timeout=600)

    def _prompt(self) -> str:
        return text(self._dice, _PROMPT_WORDS)

    async def _forever(self, client: pagedd.AsyncClient, **options: int) -> None:
        """Requests one after another."""
        while True:
            with contextlib.suppress(pagedd.RequestError):
                await client.complete(
                    self._prompt(), max_tokens=_REPLY_TOKENS, ignore_eos=True, n=options.get("n", 1)
                )

    async def submits(self) -> None:
        """As many long requests as one connection may have."""
        async with self._client("storm") as client:
            await asyncio.gather(*(self._forever(client) for _ in range(_AT_ONCE)))

    async def cancels(self) -> None:
        """Requests that are cancelled as soon as they are asked, 16 at a time."""

        async def line(client: pagedd.AsyncClient) -> None:
            while True:
                stream = client.generate(self._prompt(), max_tokens=_REPLY_TOKENS)
                await asyncio.sleep(_CANCEL_AFTER_S * self._dice.random())
                stream.close()

        async with self._client("canceller") as client:
            await asyncio.gather(*(line(client) for _ in range(16)))

    async def slow_reader(self) -> None:
        """Long streams that nobody reads: the process stops in the middle of them."""

        async def first(stream: AsyncIterator[pagedd.Chunk]) -> None:
            await anext(stream)

        async with self._client("sleeper") as client:
            streams = [
                client.generate(self._prompt(), max_tokens=2_000, ignore_eos=True, logprobs=20)
                for _ in range(16)
            ]
            await first(streams[0])
            # Blocking the loop is the point: nothing is taken from the socket any more.
            while True:
                time.sleep(1.0)  # noqa: ASYNC251

    async def samples(self) -> None:
        """Four requests of 16 samples each."""
        async with self._client("sampler") as client:
            await asyncio.gather(*(self._forever(client, n=16) for _ in range(4)))

    async def names(self) -> None:
        """A hundred connections, each under a name of its own."""

        async def one(number: int) -> None:
            async with self._client(f"name-{number}") as client:
                await self._forever(client)

        await asyncio.gather(*(one(number) for number in range(_NAMES)))


ATTACKS: dict[str, tuple[str, Callable[[Attack], Coroutine[None, None, None]]]] = {
    "submits": ("a storm of requests", Attack.submits),
    "cancels": ("a storm of cancels", Attack.cancels),
    "slow": ("16 streams nobody reads", Attack.slow_reader),
    "samples": ("n at its cap", Attack.samples),
    "names": ("100 connections under 100 names", Attack.names),
}


def main() -> int:
    """Attack until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("attack", choices=ATTACKS)
    options = parser.parse_args()
    asyncio.run(ATTACKS[options.attack][1](Attack(options.host, 3)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

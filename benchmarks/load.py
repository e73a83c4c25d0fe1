"""An app of a measurement: one connection to the daemon that runs requests as it is ordered to.

Orders (`op`):

    run     `requests`, all at once: each a map with `prompt` (token ids) and options of generate
    read    the same, read with the plain client, a chunk of each in turn: streams of equal length
    series  the same requests one after another
    reload  unload the model and load it again: an empty pool

Times are of the monotonic clock, which is the same in every process of a machine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import pagedd
from benchmarks.worker import Answer, serve_async


class Recorder:
    """What is kept of one stream.

    As an answer: ``sent``; ``arrivals``, for each chunk its time and number of tokens; ``reply``,
    the token ids; ``top``, for each token its position's best log-probabilities if asked for;
    ``reason``; ``usage``; or ``failure``.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.options = dict(request)
        self.prompt = self.options.pop("prompt")
        self._arrivals: list[tuple[float, int]] = []
        self._reply: list[int] = []
        self._top: list[list[float]] = []
        self._sent = time.monotonic()

    def take(self, chunk: pagedd.Chunk) -> None:
        """A chunk has come."""
        if chunk.tokens:
            self._arrivals.append((time.monotonic(), len(chunk.tokens)))
            self._reply += chunk.tokens
            self._top += [[p for _, p in entry.top] for entry in chunk.logprobs or ()]

    def failed(self, error: pagedd.PageddError) -> Answer:
        """The answer of a stream that ended with an error."""
        return {"sent": self._sent, "failure": f"{error.code}: {error}"}

    def done(self, result: pagedd.Completion) -> Answer:
        """The answer of a stream that ended well."""
        return {
            "sent": self._sent,
            "arrivals": self._arrivals,
            "reply": self._reply,
            "top": self._top,
            "reason": result.samples[0].reason,
            "usage": {
                "prompt": result.usage.prompt_tokens,
                "cached": result.usage.cached_tokens,
                "generated": result.usage.generated_tokens,
            },
        }


def run_alone(client: pagedd.Client, request: dict[str, Any]) -> Answer:
    """The only request of an app, as most apps run it: with the plain client."""
    record = Recorder(request)
    try:
        stream = client.generate(record.prompt, **record.options)
        for chunk in stream:
            record.take(chunk)
        return record.done(stream.result)
    except pagedd.PageddError as error:
        return record.failed(error)


def read_in_turn(client: pagedd.Client, requests: list[dict[str, Any]]) -> list[Answer]:
    """Streams of equal length, read in one thread: what reading costs an app at the least."""
    open_ = [
        (r := Recorder(request), client.generate(r.prompt, **r.options)) for request in requests
    ]
    going = list(open_)
    while going:
        for record, stream in list(going):
            chunk = next(stream, None)
            if chunk is None:
                going.remove((record, stream))
            else:
                record.take(chunk)
    return [record.done(stream.result) for record, stream in open_]


async def run_one(client: pagedd.AsyncClient, request: dict[str, Any]) -> Answer:
    """One request among others."""
    record = Recorder(request)
    try:
        stream = client.generate(record.prompt, **record.options)
        async for chunk in stream:
            record.take(chunk)
        return record.done(stream.result)
    except pagedd.PageddError as error:
        return record.failed(error)


async def handle(plain: pagedd.Client, client: pagedd.AsyncClient, order: Answer) -> Answer:
    """One order of the parent."""
    if order["op"] == "reload":
        await client.unload()
        await client.load()
        return {}
    requests = order["requests"]
    if order["op"] == "series":
        return {"results": [run_alone(plain, request) for request in requests]}
    if order["op"] == "read":
        return {"results": read_in_turn(plain, requests)}
    return {"results": await asyncio.gather(*(run_one(client, r) for r in requests))}


async def main() -> None:
    """Connect and answer orders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--app", required=True)
    parser.add_argument("--priority", default="normal")
    options = parser.parse_args()
    app, priority, host = options.app, options.priority, options.host
    with pagedd.connect(app, priority, host=host, timeout=600) as plain:
        async with pagedd.aconnect(app, priority, host=host, timeout=600) as client:
            await serve_async(lambda order: handle(plain, client, order))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

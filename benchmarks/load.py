"""An app of a measurement: one connection to the daemon that runs requests as it is ordered to.

Orders (`op`):

    run     `requests`, all at once: each a map with `prompt` (token ids) and options of generate
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


async def run_one(client: pagedd.AsyncClient, request: dict[str, Any]) -> Answer:
    """One request.

    Returns:
        ``sent``; ``arrivals``, for each chunk its time and number of tokens; ``reply``, the token
        ids; ``top``, for each token its position's best log-probabilities if asked for; ``usage``;
        or ``failure``.
    """
    options = dict(request)
    prompt = options.pop("prompt")
    arrivals: list[tuple[float, int]] = []
    reply: list[int] = []
    top: list[list[float]] = []
    sent = time.monotonic()
    try:
        stream = client.generate(prompt, **options)
        async for chunk in stream:
            if chunk.tokens:
                arrivals.append((time.monotonic(), len(chunk.tokens)))
                reply += chunk.tokens
                top += [[p for _, p in entry.top] for entry in chunk.logprobs or ()]
        result = stream.result
    except pagedd.PageddError as error:
        return {"sent": sent, "failure": f"{error.code}: {error}"}
    return {
        "sent": sent,
        "arrivals": arrivals,
        "reply": reply,
        "top": top,
        "reason": result.samples[0].reason,
        "usage": {
            "prompt": result.usage.prompt_tokens,
            "cached": result.usage.cached_tokens,
            "generated": result.usage.generated_tokens,
        },
    }


async def handle(client: pagedd.AsyncClient, order: Answer) -> Answer:
    """One order of the parent."""
    if order["op"] == "reload":
        await client.unload()
        await client.load()
        return {}
    requests = order["requests"]
    if order["op"] == "series":
        return {"results": [await run_one(client, request) for request in requests]}
    return {"results": await asyncio.gather(*(run_one(client, r) for r in requests))}


async def main() -> None:
    """Connect and answer orders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--app", required=True)
    parser.add_argument("--priority", default="normal")
    options = parser.parse_args()
    async with pagedd.aconnect(
        app=options.app, priority=options.priority, host=options.host, timeout=600
    ) as client:
        await serve_async(lambda order: handle(client, order))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

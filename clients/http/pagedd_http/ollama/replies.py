"""Replies as Ollama's clients read them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pagedd import AsyncClient, AsyncStream, Completion
from pagedd_http.answers import EventStream, dumps, unless_gone
from pagedd_http.errors import ApiError
from pagedd_http.ollama.bodies import Work
from pagedd_http.openai.logprobs import Logprobs

REASON = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}
"""Ollama's word for the daemon's reason."""


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of an error."""
    return {"error": error.message}


def now() -> str:
    """As Ollama writes moments."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def line(data: Any) -> bytes:
    """One document of a stream."""
    return f"{dumps(data)}\n".encode()


@dataclass(frozen=True, slots=True)
class Reply:
    """How one request is answered: as pieces or at once."""

    body: Work
    piece: Callable[[str], dict[str, Any]]
    """Text as the interface has it: ``response`` or ``message``."""
    logprobs: Logprobs
    started: float = field(default_factory=time.monotonic)

    async def answer(self, request: Request, stream: AsyncStream) -> Response:
        """The response to a request that ``stream`` serves."""
        if self.body.stream is not False:
            return EventStream(
                self._lines(stream),
                "application/x-ndjson",
                lambda error: line(error_body(error)),
            )
        return JSONResponse(await unless_gone(request, self._whole(stream)))

    async def _whole(self, stream: AsyncStream) -> dict[str, Any]:
        async with stream:
            done = await stream.wait()
        told: dict[str, Any] = {}
        if self.body.logprobs:
            sample = done.samples[0]
            told = await self._told(done.model, sample.tokens, sample.logprobs)
        return {**self._head(), **self.piece(done.text), **told, **self._end(done)}

    async def _lines(self, stream: AsyncStream) -> AsyncGenerator[bytes, None]:
        async with stream:
            async for chunk in stream:
                told: dict[str, Any] = {}
                if self.body.logprobs and chunk.tokens:
                    told = await self._told(stream.model or "", chunk.tokens, chunk.logprobs)
                if chunk.text or told:
                    yield line({**self._head(), **self.piece(chunk.text), **told, "done": False})
            done = stream.result
        yield line({**self._head(), **self.piece(""), **self._end(done)})

    async def _told(self, model: str, tokens: Any, entries: Any) -> dict[str, Any]:
        told = await self.logprobs.of_chat(model, tokens, entries or ())
        return {"logprobs": told["content"]}

    def _head(self) -> dict[str, Any]:
        return {"model": self.body.wanted, "created_at": now()}

    def _end(self, done: Completion) -> dict[str, Any]:
        timings = done.timings
        worked_ms = timings.queue_ms + timings.prompt_ms + timings.generation_ms
        total = int((time.monotonic() - self.started) * 1e9)
        return {
            "done": True,
            "done_reason": REASON[done.samples[0].reason],
            "total_duration": total,
            # All that was neither waiting for a turn nor computing: the load above all.
            "load_duration": max(0, total - int(worked_ms * 1e6)),
            "prompt_eval_count": done.usage.prompt_tokens,
            "prompt_eval_duration": int(timings.prompt_ms * 1e6),
            "eval_count": done.usage.generated_tokens,
            "eval_duration": int(timings.generation_ms * 1e6),
        }


async def loaded(client: AsyncClient, body: Work, piece: dict[str, Any]) -> Response:
    """The answer to a request that has nothing to generate: it loads the model, or with
    ``keep_alive`` 0 gives its memory back once nobody uses it.

    A model that is not loaded is not loaded only to be unloaded.
    """
    if _seconds(body.keep_alive) == 0:
        reason, there = "unload", {model["name"] for model in (await client.status())["models"]}
        if body.wanted in there or body.wanted.removesuffix(":latest") in there:
            await client.load(body.wanted, 0)
    else:
        reason = "load"
        await client.load(body.wanted, body.keep_alive)
    head = {"model": body.wanted, "created_at": now()}
    answer = {**head, **piece, "done": True, "done_reason": reason}
    if body.stream is False:
        return JSONResponse(answer)
    return Response(line(answer), media_type="application/x-ndjson")


def _seconds(keep_alive: float | str | None) -> float | None:
    """0 for every way to write it."""
    if not isinstance(keep_alive, str):
        return keep_alive
    return 0 if not keep_alive.strip("0.hms ") and "0" in keep_alive else None

"""Replies as Ollama's clients read them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pagedd import AsyncClient, Completion
from pagedd_http.answers import EventStream, dumps, unless_gone
from pagedd_http.chatting import Reply
from pagedd_http.errors import ApiError
from pagedd_http.ollama.bodies import Work
from pagedd_http.openai.logprobs import Logprobs
from pagedd_http.tools import Call

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
class Answer:
    """How one request is answered: as pieces or at once."""

    body: Work
    piece: Callable[[str, Sequence[Call]], dict[str, Any]]
    """Text and calls as the interface has them: ``response`` or ``message``."""
    logprobs: Logprobs
    started: float = field(default_factory=time.monotonic)

    async def to(self, request: Request, reply: Reply) -> Response:
        """The response to a request with what the model says."""
        if self.body.stream is not False:
            return EventStream(
                self._lines(reply),
                "application/x-ndjson",
                lambda error: line(error_body(error)),
            )
        return JSONResponse(await unless_gone(request, self._whole(reply)))

    async def _whole(self, reply: Reply) -> dict[str, Any]:
        texts: list[str] = []
        calls: list[Call] = []
        async with reply:
            async for piece in reply:
                texts.append(piece.text)
                calls += piece.calls
            done = reply.result
        told: dict[str, Any] = {}
        if self.body.logprobs:
            sample = done.samples[0]
            told = await self._told(done.model, sample.tokens, sample.logprobs)
        said = self.piece("".join(texts), calls)
        return {**self._head(), **said, **told, **self._end(done)}

    async def _lines(self, reply: Reply) -> AsyncGenerator[bytes, None]:
        async with reply:
            async for piece in reply:
                told: dict[str, Any] = {}
                if self.body.logprobs and piece.tokens:
                    told = await self._told(reply.model, piece.tokens, piece.logprobs)
                if piece.text or piece.calls or told:
                    said = self.piece(piece.text, piece.calls)
                    yield line({**self._head(), **said, **told, "done": False})
            done = reply.result
        yield line({**self._head(), **self.piece("", ()), **self._end(done)})

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

"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagedd import AsyncClient, AsyncStream
from pagedd_http.answers import EventStream, body_of, sse, unless_gone
from pagedd_http.anthropic.bodies import CountBody, MessagesBody
from pagedd_http.anthropic.replies import ended, error_event, message, usage_of
from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of


async def create(request: Request) -> Response:
    """The next message of a conversation."""
    body = await body_of(request, MessagesBody)
    conversation, options = body.conversation(), body.options()
    if body.tools and (body.tool_choice or {}).get("type") != "none":
        raise ApiError(400, "tools: the model cannot use any", param="tools")
    client = await client_of(request)
    stream = client.chat(conversation, **options)
    if body.stream:
        return EventStream(_events(stream), "text/event-stream", error_event)
    return JSONResponse(await unless_gone(request, _whole(stream)))


async def count(request: Request) -> Response:
    """How many tokens the model would read; the model is loaded for that."""
    body = await body_of(request, CountBody)
    conversation = body.conversation()
    client = await client_of(request)
    return JSONResponse(await unless_gone(request, _counted(client, body.model, conversation)))


async def _counted(
    client: AsyncClient, model: str, conversation: list[dict[str, Any]]
) -> dict[str, int]:
    await client.load(model)
    return {"input_tokens": len((await client.render(conversation)).tokens)}


async def _whole(stream: AsyncStream) -> dict[str, Any]:
    """The reply at once."""
    async with stream:
        done = await stream.wait()
    content = [{"type": "text", "text": done.text}] if done.text else []
    return message(done.model, content, **ended(done), usage=usage_of(done))


async def _events(stream: AsyncStream) -> AsyncGenerator[bytes, None]:
    """The reply piece by piece; its one block is there even where it stays empty."""
    begun = False
    async with stream:
        async for chunk in stream:
            if not begun:
                begun = True
                yield _beginning(stream)
            if chunk.text:
                delta = {"type": "text_delta", "text": chunk.text}
                yield _event("content_block_delta", index=0, delta=delta)
        done = stream.result
    if not begun:
        yield _beginning(stream)
    yield _event("content_block_stop", index=0)
    yield _event("message_delta", delta=ended(done), usage=usage_of(done))
    yield _event("message_stop")


def _beginning(stream: AsyncStream) -> bytes:
    """Up to the first text. How much of the prompt was cached is told at the end."""
    usage = {"input_tokens": stream.prompt_tokens or 0, "output_tokens": 0}
    open_end = {"stop_reason": None, "stop_sequence": None, "usage": usage}
    start = _event("message_start", message=message(stream.model or "", [], **open_end))
    block = _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    return start + block + _event("ping")


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


routes = [
    Route("/v1/messages", create, methods=["POST"]),
    Route("/v1/messages/count_tokens", count, methods=["POST"]),
]

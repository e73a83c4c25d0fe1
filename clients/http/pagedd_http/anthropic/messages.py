"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagedd_http import chatting
from pagedd_http.answers import EventStream, body_of, dumps, sse, unless_gone
from pagedd_http.anthropic.bodies import CountBody, MessagesBody
from pagedd_http.anthropic.replies import ended, error_event, message, usage_of
from pagedd_http.chatting import Reply
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.tools import Call


async def create(request: Request) -> Response:
    """The next message of a conversation."""
    body = await body_of(request, MessagesBody)
    conversation = body.conversation()
    client = await client_of(request)
    work = chatting.answer(client, gateway_of(request).forms, conversation)
    reply = await unless_gone(request, work)
    if body.stream:
        return EventStream(_Events(reply).all(), "text/event-stream", error_event)
    return JSONResponse(await unless_gone(request, _whole(reply)))


async def count(request: Request) -> Response:
    """How many tokens the model would read; the model is loaded for that."""
    conversation = (await body_of(request, CountBody)).conversation()
    client = await client_of(request)
    work = chatting.count(client, gateway_of(request).forms, conversation)
    return JSONResponse({"input_tokens": await unless_gone(request, work)})


async def _whole(reply: Reply) -> dict[str, Any]:
    """The reply at once."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    async with reply:
        async for piece in reply:
            texts.append(piece.text)
            calls += [{**_use(call), "input": call.arguments} for call in piece.calls]
        done = reply.result
    text = "".join(texts)
    content = [{"type": "text", "text": text}] if text else []
    ending = ended(done, called=reply.called(done.samples[0]))
    return message(done.model, [*content, *calls], **ending, usage=usage_of(done))


class _Events:
    """The reply piece by piece: blocks of text and of calls, one after the other."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._blocks = 0
        self._in_text = False

    async def all(self) -> AsyncGenerator[bytes, None]:
        """All events; a block of text is there even where nothing is said."""
        reply = self._reply
        begun = False
        async with reply:
            async for piece in reply:
                if not begun:
                    begun = True
                    yield self._start()
                if piece.text:
                    yield self._text(piece.text)
                for call in piece.calls:
                    yield self._call(call)
            done = reply.result
        if not begun:
            yield self._start()
        if not self._blocks:
            yield self._open({"type": "text", "text": ""})
            self._in_text = True
        ending = ended(done, called=reply.called(done.samples[0]))
        yield self._close() + _event("message_delta", delta=ending, usage=usage_of(done))
        yield _event("message_stop")

    def _start(self) -> bytes:
        # How much of the prompt was cached is told at the end.
        usage = {"input_tokens": self._reply.prompt_tokens or 0, "output_tokens": 0}
        open_end = {"stop_reason": None, "stop_sequence": None, "usage": usage}
        start = _event("message_start", message=message(self._reply.model, [], **open_end))
        return start + _event("ping")

    def _text(self, text: str) -> bytes:
        opening = b""
        if not self._in_text:
            opening = self._open({"type": "text", "text": ""})
            self._in_text = True
        return opening + self._delta({"type": "text_delta", "text": text})

    def _call(self, call: Call) -> bytes:
        opening = self._close() + self._open({**_use(call), "input": {}})
        delta = self._delta({"type": "input_json_delta", "partial_json": dumps(call.arguments)})
        return opening + delta + _event("content_block_stop", index=self._blocks - 1)

    def _open(self, block: dict[str, Any]) -> bytes:
        self._blocks += 1
        return _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> bytes:
        """The end of a block of text that is open."""
        if not self._in_text:
            return b""
        self._in_text = False
        return _event("content_block_stop", index=self._blocks - 1)


def _use(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name}


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


routes = [
    Route("/v1/messages", create, methods=["POST"]),
    Route("/v1/messages/count_tokens", count, methods=["POST"]),
]

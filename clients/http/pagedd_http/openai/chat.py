"""``POST /v1/chat/completions``."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagedd import Sample
from pagedd_http.answers import DONE, EventStream, body_of, sse, unless_gone
from pagedd_http.chatting import Piece, Reply, answer
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.openai.bodies import ChatBody
from pagedd_http.openai.logprobs import Logprobs
from pagedd_http.openai.replies import FINISH, Head, error_event, timings_of, usage_of
from pagedd_http.tools import Call


async def chat(request: Request) -> Response:
    """The next message of a conversation."""
    body = await body_of(request, ChatBody)
    conversation = body.conversation()
    client = await client_of(request)
    gateway = gateway_of(request)
    reply = await unless_gone(request, answer(client, gateway.forms, conversation))
    logprobs = Logprobs(gateway.pieces, client) if body.logprobs else None
    if body.stream:
        events = _events(reply, logprobs, usage=body.wants_usage)
        return EventStream(events, "text/event-stream", error_event)
    return JSONResponse(await unless_gone(request, _whole(reply, logprobs)))


@dataclass(slots=True)
class _Said:
    """What one sample came to."""

    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """It as a message; without text it has none if it has calls."""
        text = "".join(self.texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            message |= {"content": text.strip() or None, "tool_calls": self.calls}
        return message


async def _whole(reply: Reply, logprobs: Logprobs | None) -> dict[str, Any]:
    """The reply at once."""
    said: dict[int, _Said] = {}
    async with reply:
        async for piece in reply:
            one = said.setdefault(piece.index, _Said())
            one.texts.append(piece.text)
            one.calls += [_call(call) for call in piece.calls]
        done = reply.result
    choices = []
    for sample in done.samples:
        told = None
        if logprobs is not None:
            told = await logprobs.of_chat(done.model, sample.tokens, sample.logprobs or ())
        choices.append(
            {
                "index": sample.index,
                "message": said.get(sample.index, _Said()).message,
                "finish_reason": _reason(reply, sample),
                "logprobs": told,
            }
        )
    head = Head("chat.completion", done.model, "chatcmpl")
    return head.object(choices, usage=usage_of([done.usage]), timings=timings_of(done))


async def _events(
    reply: Reply, logprobs: Logprobs | None, *, usage: bool
) -> AsyncGenerator[bytes, None]:
    """The reply piece by piece."""
    more: dict[str, Any] = {"usage": None} if usage else {}
    head: Head | None = None
    called: dict[int, int] = {}
    """Calls of each sample that has begun."""
    async with reply:
        async for piece in reply:
            head = head or Head("chat.completion.chunk", reply.model, "chatcmpl")
            delta = _delta(piece, called)
            told = None
            if logprobs is not None and piece.tokens:
                told = await logprobs.of_chat(head.model, piece.tokens, piece.logprobs)
            if delta or told:
                yield sse(head.object([_choice(piece.index, delta, None, told)], **more))
        done = reply.result
        head = head or Head("chat.completion.chunk", done.model, "chatcmpl")
        for sample in done.samples:
            delta = {} if sample.index in called else {"role": "assistant", "content": ""}
            choice = _choice(sample.index, delta, _reason(reply, sample), None)
            yield sse(head.object([choice], **more))
    if usage:
        yield sse(head.object([], usage=usage_of([done.usage]), timings=timings_of(done)))
    yield DONE


def _delta(piece: Piece, called: dict[int, int]) -> dict[str, Any]:
    """What a piece adds to its message; nothing if that is held back."""
    delta: dict[str, Any] = {}
    if piece.index not in called:
        called[piece.index] = 0
        delta = {"role": "assistant", "content": ""}
    if piece.text:
        delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = _numbered(piece.calls, called[piece.index])
        called[piece.index] += len(piece.calls)
    return delta


def _numbered(calls: Sequence[Call], first: int) -> list[dict[str, Any]]:
    return [{"index": first + at, **_call(call)} for at, call in enumerate(calls)]


def _call(call: Call) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _choice(
    index: int, delta: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}


def _reason(reply: Reply, sample: Sample) -> str:
    reason = FINISH[sample.reason]
    return "tool_calls" if reason == "stop" and reply.called(sample) else reason


routes = [Route("/v1/chat/completions", chat, methods=["POST"])]

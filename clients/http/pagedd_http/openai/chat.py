"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagedd import AsyncStream
from pagedd_http.answers import DONE, EventStream, body_of, sse, unless_gone
from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.openai.bodies import ChatBody, messages_of
from pagedd_http.openai.logprobs import Logprobs
from pagedd_http.openai.replies import FINISH, Head, error_event, timings_of, usage_of


async def chat(request: Request) -> Response:
    """The next message of a conversation."""
    body = await body_of(request, ChatBody)
    messages, options = messages_of(body), body.chat_options()
    if body.tools and body.tool_choice != "none":
        raise ApiError(400, "tools: the model cannot use any", param="tools")
    client = await client_of(request)
    logprobs = Logprobs(gateway_of(request).pieces, client)
    stream = client.chat(messages, template_args=body.chat_template_kwargs, **options)
    if body.stream:
        return EventStream(_events(body, stream, logprobs), "text/event-stream", error_event)
    return JSONResponse(await unless_gone(request, _whole(body, stream, logprobs)))


async def _whole(body: ChatBody, stream: AsyncStream, logprobs: Logprobs) -> dict[str, Any]:
    """The reply at once."""
    async with stream:
        done = await stream.wait()
    choices = []
    for sample in done.samples:
        told = None
        if body.logprobs:
            told = await logprobs.of_chat(done.model, sample.tokens, sample.logprobs or ())
        choices.append(
            {
                "index": sample.index,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "finish_reason": FINISH[sample.reason],
                "logprobs": told,
            }
        )
    head = Head("chat.completion", done.model, "chatcmpl")
    return head.object(choices, usage=usage_of([done.usage]), timings=timings_of(done))


async def _events(
    body: ChatBody, stream: AsyncStream, logprobs: Logprobs
) -> AsyncGenerator[bytes, None]:
    """The reply piece by piece."""
    more: dict[str, Any] = {"usage": None} if body.wants_usage else {}
    head: Head | None = None
    begun: set[int] = set()
    async with stream:
        async for chunk in stream:
            head = head or Head("chat.completion.chunk", stream.model or "", "chatcmpl")
            delta = {"content": chunk.text}
            if chunk.index not in begun:
                begun.add(chunk.index)
                delta = {"role": "assistant", **delta}
            told = None
            if body.logprobs:
                told = await logprobs.of_chat(head.model, chunk.tokens, chunk.logprobs or ())
            choice = {
                "index": chunk.index,
                "delta": delta,
                "finish_reason": None,
                "logprobs": told,
            }
            yield sse(head.object([choice], **more))
        done = stream.result
    head = head or Head("chat.completion.chunk", done.model, "chatcmpl")
    for sample in done.samples:
        delta = {} if sample.index in begun else {"role": "assistant", "content": ""}
        choice = {
            "index": sample.index,
            "delta": delta,
            "finish_reason": FINISH[sample.reason],
            "logprobs": None,
        }
        yield sse(head.object([choice], **more))
    if body.wants_usage:
        yield sse(head.object([], usage=usage_of([done.usage]), timings=timings_of(done)))
    yield DONE


routes = [Route("/v1/chat/completions", chat, methods=["POST"])]

"""``POST /v1/responses``: text, whole or as a stream of events. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagedd import Completion
from pagedd_http.answers import EventStream, body_of, dumps, unless_gone
from pagedd_http.chatting import Reply, answer
from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.openai.bodies import ResponsesBody
from pagedd_http.openai.replies import error_body


async def respond(request: Request) -> Response:
    """A model's response to some input."""
    body = await body_of(request, ResponsesBody)
    conversation = body.conversation()
    client = await client_of(request)
    reply = await unless_gone(request, answer(client, gateway_of(request).forms, conversation))
    made = _Response(body)
    if body.stream:
        return EventStream(made.events(reply), "text/event-stream", made.failed)
    return JSONResponse(await unless_gone(request, _whole(made, reply)))


async def _whole(made: _Response, reply: Reply) -> dict[str, Any]:
    async with reply:
        texts = [piece.text async for piece in reply]
        return made.finished("".join(texts), reply.result)


class _Response:
    """The object that a response is, and the events that lead to it."""

    def __init__(self, body: ResponsesBody) -> None:
        self._body = body
        self._id = f"resp_{secrets.token_hex(12)}"
        self._item = f"msg_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._sent = 0

    async def events(self, reply: Reply) -> AsyncGenerator[bytes, None]:
        """All events of a reply."""
        texts: list[str] = []
        async with reply:
            async for piece in reply:
                begin = b"" if texts else b"".join(self._begin(reply.model))
                texts.append(piece.text)
                yield begin + self._delta(piece.text)
            done = reply.result
        if not texts:
            yield b"".join(self._begin(done.model))
        yield b"".join(self._end("".join(texts), done))

    def failed(self, error: ApiError) -> bytes:
        """The event that tells of an error."""
        told = error_body(error)["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def finished(self, text: str, done: Completion) -> dict[str, Any]:
        """The whole response."""
        usage = done.usage
        cut = done.samples[0].reason in ("length", "context")
        return self._object(
            done.model,
            status="incomplete" if cut else "completed",
            output=[self._message(text, "incomplete" if cut else "completed")],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage={
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.generated_tokens,
            },
        )

    def _begin(self, model: str) -> Iterator[bytes]:
        started = self._object(model, status="in_progress", output=[])
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        item = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._where(), part=_part(""))

    def _delta(self, text: str) -> bytes:
        return self._event("response.output_text.delta", **self._where(), delta=text, logprobs=[])

    def _end(self, text: str, done: Completion) -> Iterator[bytes]:
        whole = self.finished(text, done)
        where = self._where()
        yield self._event("response.output_text.done", **where, text=text, logprobs=[])
        yield self._event("response.content_part.done", **where, part=_part(text))
        item = whole["output"][0]
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return f"event: {kind}\ndata: {dumps(data)}\n\n".encode()

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._item,
            "status": status,
            "role": "assistant",
            "content": [_part(text)],
        }

    def _object(
        self,
        model: str,
        *,
        status: str,
        output: list[dict[str, Any]],
        incomplete_details: Mapping[str, Any] | None = None,
        usage: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete_details,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.format_told()},
            "tool_choice": "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


routes = [Route("/v1/responses", respond, methods=["POST"])]

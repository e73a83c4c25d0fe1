"""``POST /api/chat``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagedd_http.answers import body_of, unless_gone
from pagedd_http.chatting import answer
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.ollama.bodies import ChatBody
from pagedd_http.ollama.replies import Answer, loaded
from pagedd_http.openai.logprobs import Logprobs
from pagedd_http.tools import Call


async def chat(request: Request) -> Response:
    """The next message of a conversation."""
    body = await body_of(request, ChatBody)
    conversation = body.conversation()
    client, gateway = await client_of(request), gateway_of(request)
    if not conversation.messages:
        return await loaded(client, body, _piece("", ()))
    reply = await unless_gone(request, answer(client, gateway.forms, conversation))
    return await Answer(body, _piece, Logprobs(gateway.pieces, client)).to(request, reply)


def _piece(text: str, calls: Sequence[Call]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return {"message": message}


routes = [Route("/api/chat", chat, methods=["POST"])]

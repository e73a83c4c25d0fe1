"""``POST /api/generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagedd_http.answers import body_of
from pagedd_http.chatting import Reply, answer
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.ollama.bodies import GenerateBody
from pagedd_http.ollama.replies import Answer, loaded
from pagedd_http.openai.logprobs import Logprobs
from pagedd_http.tools import Call


async def generate(request: Request) -> Response:
    """Answer a prompt through the model's template, or with ``raw`` continue it as it is."""
    body = await body_of(request, GenerateBody)
    body.check()
    conversation = body.conversation()
    client, gateway = await client_of(request), gateway_of(request)
    if not body.prompt:
        return await loaded(client, body, _piece("", ()))
    if body.raw:
        reply = Reply(client.generate(body.prompt, **conversation.options), None)
    else:
        reply = await answer(client, gateway.forms, conversation)
    return await Answer(body, _piece, Logprobs(gateway.pieces, client)).to(request, reply)


def _piece(text: str, calls: Sequence[Call]) -> dict[str, Any]:
    return {"response": text}


routes = [Route("/api/generate", generate, methods=["POST"])]

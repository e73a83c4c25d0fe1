"""``POST /api/chat``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagedd_http.answers import body_of
from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.ollama.bodies import ChatBody
from pagedd_http.ollama.replies import Reply, loaded
from pagedd_http.openai.logprobs import Logprobs


async def chat(request: Request) -> Response:
    """The next message of a conversation."""
    body = await body_of(request, ChatBody)
    messages, options = body.conversation(), body.generate_options()
    if body.tools:
        raise ApiError(400, f"{body.wanted} does not support tools", param="tools")
    client = await client_of(request)
    if not messages:
        return await loaded(client, body, _piece(""))
    reply = Reply(body, _piece, Logprobs(gateway_of(request).pieces, client))
    stream = client.chat(messages, template_args=body.template_args, **options)
    return await reply.answer(request, stream)


def _piece(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


routes = [Route("/api/chat", chat, methods=["POST"])]

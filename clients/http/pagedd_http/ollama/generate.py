"""``POST /api/generate``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagedd_http.answers import body_of
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.ollama.bodies import GenerateBody
from pagedd_http.ollama.replies import Reply, loaded
from pagedd_http.openai.logprobs import Logprobs


async def generate(request: Request) -> Response:
    """Answer a prompt through the model's template, or with ``raw`` continue it as it is."""
    body = await body_of(request, GenerateBody)
    body.check()
    client, options = await client_of(request), body.generate_options()
    if not body.prompt:
        return await loaded(client, body, _piece(""))
    reply = Reply(body, _piece, Logprobs(gateway_of(request).pieces, client))
    if body.raw:
        return await reply.answer(request, client.generate(body.prompt, **options))
    stream = client.chat(body.messages(), template_args=body.template_args, **options)
    return await reply.answer(request, stream)


def _piece(text: str) -> dict[str, Any]:
    return {"response": text}


routes = [Route("/api/generate", generate, methods=["POST"])]

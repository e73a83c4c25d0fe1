"""``POST /api/embed``, and ``/api/embeddings``, which it replaces."""

from __future__ import annotations

import time
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pagedd_http.answers import body_of, unless_gone
from pagedd_http.gateway import client_of
from pagedd_http.ollama.bodies import Named
from pagedd_http.vectors import embedded


class EmbedBody(Named):
    """``POST /api/embed``."""

    input: str | Annotated[list[str], Field(max_length=2048)]
    keep_alive: float | str | None = None


class EmbeddingsBody(Named):
    """``POST /api/embeddings``."""

    prompt: str
    keep_alive: float | str | None = None


async def embed(request: Request) -> JSONResponse:
    """Vectors of length 1."""
    started = time.monotonic()
    body = await body_of(request, EmbedBody)
    name = body.wanted
    inputs = [body.input] if isinstance(body.input, str) else body.input
    client = await client_of(request)
    vectors, tokens = [], 0
    if inputs:
        work = embedded(client, inputs, model=name, keep_alive=body.keep_alive)
        made = await unless_gone(request, work)
        vectors, tokens = made.vectors, made.prompt_tokens
    return JSONResponse(
        {
            "model": name,
            "embeddings": vectors,
            "total_duration": int((time.monotonic() - started) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }
    )


async def embeddings(request: Request) -> JSONResponse:
    """One vector, of whatever length."""
    body = await body_of(request, EmbeddingsBody)
    name = body.wanted
    client = await client_of(request)
    work = embedded(client, [body.prompt], model=name, normalize=False, keep_alive=body.keep_alive)
    return JSONResponse({"embedding": (await unless_gone(request, work)).vectors[0]})


routes = [
    Route("/api/embed", embed, methods=["POST"]),
    Route("/api/embeddings", embeddings, methods=["POST"]),
]

"""``/openapi.json``: what this gateway offers, as OpenAPI 3.1 has it.

Paths, methods and summaries are the routes' own, bodies the models that validate them; so the
document cannot say anything else than what is served.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import pagedd
from pagedd_http.anthropic.bodies import CountBody, MessagesBody
from pagedd_http.ollama import bodies as ollama
from pagedd_http.ollama import embed
from pagedd_http.openai import bodies as openai
from pagedd_http.openai.embeddings import EmbeddingsBody
from pagedd_http.openai.tokens import DetokenizeBody, TokenizeBody

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": openai.ChatBody,
    "/v1/completions": openai.CompletionBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/responses": openai.ResponsesBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/api/chat": ollama.ChatBody,
    "/api/generate": ollama.GenerateBody,
    "/api/embed": embed.EmbedBody,
    "/api/embeddings": embed.EmbeddingsBody,
    "/api/show": ollama.Named,
    "/api/pull": ollama.Named,
}
"""By path: what its ``POST`` takes."""

_REFUSED = {"description": "An error, in the shape of the interface that the path belongs to."}
_KEYS: list[dict[str, list[str]]] = [{}, {"key": []}]
"""With a key where keys are set, else without."""


def document(routes: Iterable[Any]) -> dict[str, Any]:
    """The document of these routes; a body that `BODIES` does not know is any object."""
    paths: dict[str, dict[str, Any]] = {}
    kinds = [(kind, "validation") for kind in dict.fromkeys(BODIES.values())]
    refs, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    for route in routes:
        if not isinstance(route, Route):
            continue
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation = _operation(route)
            if method == "POST":
                kind = BODIES.get(route.path)
                schema = refs[(kind, "validation")] if kind else {"type": "object"}
                content = {"application/json": {"schema": schema}}
                operation["requestBody"] = {"required": True, "content": content}
            paths.setdefault(route.path_format, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "pagedd gateway", "version": pagedd.__version__},
        "paths": paths,
        "security": _KEYS,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    said = (route.endpoint.__doc__ or "").strip()
    operation: dict[str, Any] = {
        "operationId": f"{route.endpoint.__module__}.{route.endpoint.__name__}",
        "summary": " ".join(said.split("\n\n")[0].split()),
        "responses": {"200": {"description": "The answer."}, "default": _REFUSED},
    }
    if route.param_convertors:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
    return operation


async def published(request: Request) -> JSONResponse:
    """This document."""
    return JSONResponse(document(request.app.routes))


ROUTE = Route("/openapi.json", published)

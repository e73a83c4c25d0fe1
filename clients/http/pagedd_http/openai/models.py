"""``/v1/models``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of


async def list_models(request: Request) -> JSONResponse:
    """All that the daemon finds, loaded or not; looking loads none."""
    found = await (await client_of(request)).models()
    return JSONResponse({"object": "list", "data": [_model(model) for model in found]})


async def show_model(request: Request) -> JSONResponse:
    """One of them."""
    name = request.path_params["name"]
    for model in await (await client_of(request)).models():
        if model["name"] == name:
            return JSONResponse(_model(model))
    raise ApiError(404, f"there is no model {name!r}", code="E_MODEL", param="model")


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    known = ("loaded", "architecture", "parameters", "quantization", "context_tokens")
    return {
        "id": model["name"],
        "object": "model",
        "created": 0,
        "owned_by": "pagedd",
        **{name: model.get(name) for name in known},
    }


routes = [
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", show_model),
]

"""Names that llama-server's users look under: ``/health``, ``/props``, ``/slots``, ``/metrics``.

None of them loads or wakes a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pagedd_http.errors import RETRY_AFTER_S, ApiError
from pagedd_http.gateway import client_of
from pagedd_http.interfaces import Interface

READY = frozenset({"ready", "asleep"})
"""States in which a request would be served: a model that sleeps is loaded for it."""


async def health(request: Request) -> Response:
    """200 where a request would be served now, 503 where it would wait or fail."""
    ping = await (await client_of(request)).ping()
    state = ping["state"]
    if state not in READY or not ping["healthy"]:
        what = "Loading model" if state == "loading" else f"the daemon is {state}"
        if not ping["healthy"]:
            what = f"the engine has made no step in {ping['silent_s']:.0f} s"
        raise ApiError(503, what, code="unavailable", retry_after_s=RETRY_AFTER_S)
    return JSONResponse({"status": "ok"})


async def props(request: Request) -> Response:
    """The model and how many requests run side by side; slots here are sequences of the pool."""
    client = await client_of(request)
    status = await client.status()
    model: dict[str, Any] = next(iter(status["models"]), {})
    known = next((m for m in await client.models() if m["name"] == model.get("name")), {})
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": model.get("context_tokens", 0)},
            "total_slots": status["sequences"]["ids_total"],
            "model_alias": model.get("name"),
            "model_path": known.get("path") or "",
            "build_info": f"pagedd {status['version']}",
            "is_sleeping": not model,
        }
    )


async def slots(request: Request) -> Response:
    """Who uses the pool: an entry for each app, however many requests it has."""
    status = await (await client_of(request)).status()
    context = next((model["context_tokens"] for model in status["models"]), 0)
    return JSONResponse(
        [
            {"id": at, "n_ctx": context, "is_processing": app["running"] > 0, **_slot(app)}
            for at, app in enumerate(status["apps"])
        ]
    )


async def metrics(request: Request) -> Response:
    """The daemon's figures in Prometheus' format, and llama-server's names for some of them."""
    client = await client_of(request)
    own, stats = await client.metrics(), await client.stats()
    kv, requests, tokens = stats["kv"]["gpu"], stats["requests"], stats["tokens"]
    computed = tokens["prompt"] - tokens["cached"]
    theirs = (
        ("prompt_tokens_total", "counter", "Prompt tokens computed.", computed),
        ("tokens_predicted_total", "counter", "Tokens generated.", tokens["generated"]),
        ("n_decode_total", "counter", "Steps of the engine.", stats["steps"]),
        ("requests_processing", "gauge", "Requests that run.", requests["running"]),
        ("requests_deferred", "gauge", "Requests that wait.", requests["waiting"]),
        (
            "kv_cache_usage_ratio",
            "gauge",
            "Share of the pool that is in use.",
            kv["used"] / max(1, kv["blocks_total"]),
        ),
    )
    text = "".join(
        f"# HELP llamacpp:{name} {what}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value}\n"
        for name, kind, what, value in theirs
    )
    return PlainTextResponse(own + text, media_type="text/plain; version=0.0.4")


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 503: "unavailable_error"}
    kind = kinds.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    return {"error": {"code": error.status, "message": error.message, "type": kind}}


def _slot(app: Mapping[str, Any]) -> dict[str, Any]:
    known = ("app", "class", "running", "waiting", "kv", "prompt_tokens", "generated_tokens")
    return {name: app[name] for name in known}


INTERFACE = Interface(
    prefixes=("/health", "/props", "/slots", "/metrics"),
    routes=[
        Route("/health", health),
        Route("/props", props),
        Route("/slots", slots),
        Route("/metrics", metrics),
    ],
    error_body=error_body,
)

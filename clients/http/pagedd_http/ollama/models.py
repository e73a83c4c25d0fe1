"""``/api/version``, ``tags``, ``ps``, ``show`` and ``pull``: looking loads no model."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pagedd_http.answers import body_of
from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of
from pagedd_http.ollama.bodies import Named

INTERFACE_VERSION = "0.12.0"
"""Of Ollama, whose interface this is: clients look here for what they may ask."""

FOR_EVER = timedelta(days=365 * 100)
"""Until a model expires that never does; Ollama says a moment as far away."""


async def version(request: Request) -> JSONResponse:
    """The interface's and, beside it, the daemon's."""
    client = await client_of(request)
    return JSONResponse({"version": INTERFACE_VERSION, "pagedd": client.server.version})


async def tags(request: Request) -> JSONResponse:
    """All models that the daemon finds, loaded or not."""
    found = await (await client_of(request)).models()
    return JSONResponse({"models": await asyncio.to_thread(_listed, found)})


async def ps(request: Request) -> JSONResponse:
    """The loaded one."""
    client = await client_of(request)
    status = await client.status()
    found = await asyncio.to_thread(_listed, await client.models())
    on_gpu = "CPU" not in str(status["device"])
    rows = []
    for model in status["models"]:
        expires = model["expires_s"]
        # A client may say any number of seconds, more than there are until the year 9999.
        for_ever = expires is None or expires > FOR_EVER.total_seconds()
        left = FOR_EVER if for_ever else timedelta(seconds=expires)
        row = next((row for row in found if row["name"] == model["name"]), {})
        rows.append(
            {
                **row,
                "expires_at": (datetime.now(timezone.utc) + left).isoformat(),
                "size_vram": model["size_bytes"] or 0 if on_gpu else 0,
                "context_length": model["context_tokens"],
            }
        )
    return JSONResponse({"models": rows})


async def show(request: Request) -> JSONResponse:
    """What is known of a model."""
    name = (await body_of(request, Named)).wanted
    model = named(await (await client_of(request)).models(), name)
    (row,) = await asyncio.to_thread(_listed, [model])
    family = model.get("architecture") or ""
    info = {
        "general.architecture": family,
        "general.parameter_count": model.get("parameters"),
        f"{family or 'general'}.context_length": model.get("context_tokens"),
    }
    return JSONResponse(
        {
            "modelfile": f"FROM {model.get('path') or model['name']}\n",
            "parameters": "",
            "template": "",
            "details": row["details"],
            "model_info": {key: value for key, value in info.items() if value is not None},
            "capabilities": ["completion", "tools"],
            "modified_at": row["modified_at"],
        }
    )


async def pull(request: Request) -> JSONResponse:
    """Refused: whoever reaches the gateway shall not fill the disk."""
    name = (await body_of(request, Named)).wanted
    command = f"pagedd pull {shlex.quote(name)}"
    raise ApiError(403, f"the gateway downloads nothing: run '{command}'", code="pull")


def named(models: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The model of that name, with or without ``:latest``.

    Raises:
        ApiError: 404: there is none.
    """
    for model in models:
        if name in (model["name"], f"{model['name']}:latest"):
            return model
    raise ApiError(404, f"model '{name}' not found", code="E_MODEL", param="model")


def _listed(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [_row(model) for model in models]


def _row(model: Mapping[str, Any]) -> dict[str, Any]:
    path, changed = model.get("path") or "", 0.0
    with contextlib.suppress(OSError):
        changed = Path(path).stat().st_mtime
    family = model.get("architecture") or ""
    # Nobody reads gigabytes for a list: this names the file, not what is in it.
    known = f"{path}\0{model.get('size_bytes')}\0{changed}"
    return {
        "name": model["name"],
        "model": model["name"],
        "modified_at": datetime.fromtimestamp(changed, timezone.utc).isoformat(),
        "size": model.get("size_bytes") or 0,
        "digest": hashlib.sha256(known.encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "gguf" if path.endswith(".gguf") else "safetensors",
            "family": family,
            "families": [family] if family else [],
            "parameter_size": _short(model.get("parameters")),
            "quantization_level": model.get("quantization") or "",
        },
    }


def _short(count: int | None) -> str:
    """134515008 as ``134.5M``."""
    if not count:
        return ""
    unit, size = next(((u, s) for u, s in (("B", 1e9), ("M", 1e6)) if count >= s), ("K", 1e3))
    return f"{count / size:.1f}{unit}"


routes = [
    Route("/api/version", version),
    Route("/api/tags", tags),
    Route("/api/ps", ps),
    Route("/api/show", show, methods=["POST"]),
    Route("/api/pull", pull, methods=["POST"]),
]

"""The page at ``/`` and what it looks at each second, ``/pagedd/state``.

The page is one file without anything from elsewhere. It asks for nothing but this gateway's own
paths, and its policy (CSP level 3) lets it do no more, whatever a model writes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagedd import AsyncClient, RequestError
from pagedd_http.gateway import client_of
from pagedd_http.interfaces import Interface
from pagedd_http.openai.replies import error_body

LOOK_S = 5.0
"""The daemon's control socket answers within 0.1 s, however busy its engine is."""


@cache
def document() -> tuple[bytes, str]:
    """The page, and the policy under which browsers run it: its own script and style, known by
    their hashes, and no request but to where it came from."""
    html = (files(__package__) / "index.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    policy = (
        "default-src 'none'",
        f"script-src {allowed('script')}",
        f"style-src {allowed('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return html.encode(), "; ".join(policy)


async def page(request: Request) -> Response:
    """The page itself, the same for everybody: it asks for a key where one is needed."""
    html, policy = document()
    return Response(
        html,
        media_type="text/html",
        headers={
            "content-security-policy": policy,
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cross-origin-opener-policy": "same-origin",
        },
    )


async def state(request: Request) -> JSONResponse:
    """What the daemon does now and what each block is doing; never loads or wakes a model."""
    client = await client_of(request)
    # In this order the engine is asked once for both.
    stats, status = await asyncio.gather(figures(client), client.status(timeout=LOOK_S))
    blocks = {
        tier: {"every": one["every"], "cells": base64.b64encode(one["cells"]).decode()}
        for tier, one in stats.pop("blocks").items()
    }
    found = {"status": status, "stats": stats, "blocks": blocks}
    return JSONResponse(found, headers={"cache-control": "no-store"})


async def figures(client: AsyncClient) -> dict[str, Any]:
    """``stats`` with its block map; an empty one where a daemon that others share keeps it from
    us."""
    try:
        return await client.stats(blocks=True, timeout=LOOK_S)
    except RequestError as error:
        if error.code != "E_FORBIDDEN":
            raise
    return {**await client.stats(timeout=LOOK_S), "blocks": {}}


INTERFACE = Interface(
    prefixes=("/pagedd/",),
    routes=[Route("/", page), Route("/pagedd/state", state)],
    error_body=error_body,
)

"""How long a request waits for a model that is being loaded."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedd_http.daemon import Daemon
from pagedd_http.errors import RETRY_AFTER_S, ApiError


class Patience:
    """ASGI middleware: 503 for who has waited for long while a model loads.

    A small model is there in a second or two, and to wait for it is what everybody wants. A large
    one from a cold disk takes minutes, and clients give up after times of their own: they are told
    in time that asking again is worth while. The load goes on meanwhile. Whoever waits for anything
    else, for a turn or for a long prompt to be computed, is left alone.
    """

    def __init__(self, app: ASGIApp, daemon: Daemon, wait_s: float) -> None:
        self._app = app
        self._daemon = daemon
        self._wait_s = wait_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, or raise `ApiError` before the response has begun."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        work = asyncio.ensure_future(self._app(scope, receive, watched))
        try:
            while not begun and not work.done():
                await asyncio.wait((work,), timeout=self._wait_s)
                if not begun and not work.done() and await self._daemon.loading():
                    what = f"the model has been loading for {self._wait_s:g} s or more: ask again"
                    raise ApiError(503, what, code="loading", retry_after_s=RETRY_AFTER_S)
            await work
        finally:
            if not work.done():
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work

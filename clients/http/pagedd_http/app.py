"""The ASGI application: interfaces, the guard before them, errors around both."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedd_http import anthropic, llama_server, ollama, openai, openapi, page
from pagedd_http.answers import ClientGone
from pagedd_http.daemon import Daemon
from pagedd_http.errors import ApiError, as_api_error
from pagedd_http.gateway import Gateway
from pagedd_http.guard import Guard
from pagedd_http.interfaces import Interface, owner
from pagedd_http.patience import Patience
from pagedd_http.settings import Settings

log = logging.getLogger("pagedd.gateway")

INTERFACES: tuple[Interface, ...] = (
    openai.INTERFACE,
    anthropic.INTERFACE,
    ollama.INTERFACE,
    llama_server.INTERFACE,
    page.INTERFACE,
)
"""All there are; errors of paths that none of them claims look like the first one's."""


def create_app(settings: Settings | None = None) -> Starlette:
    """The gateway as an ASGI application.

    It connects to the daemon at the first request, and again whenever the connection is lost.
    """
    settings = settings or Settings()
    daemon = Daemon(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await daemon.close()

    app = Starlette(
        routes=[openapi.ROUTE, *(route for one in INTERFACES for route in one.routes)],
        middleware=[
            Middleware(Errors, INTERFACES),
            Middleware(Guard, settings),
            Middleware(Patience, daemon, settings.load_wait_s),
        ],
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )
    app.state.gateway = Gateway(daemon)
    return app


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        raise ApiError(405, f"{what}: not with this method", code="method_not_allowed")
    raise ApiError(error.status_code, f"{what}: there is no such path", code="not_found")


class Errors:
    """ASGI middleware: answers with what was raised, in the shape of the path's interface."""

    def __init__(self, app: ASGIApp, interfaces: Sequence[Interface]) -> None:
        self._app = app
        self._interfaces = interfaces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, whatever it raises."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientGone:
            return
        except Exception as error:
            if started:
                raise
            await self._answer(scope, error)(scope, receive, send)

    def _answer(self, scope: Scope, raised: Exception) -> Response:
        error = as_api_error(raised)
        if error.status == 500:
            log.error("%s %s failed", scope["method"], scope["path"], exc_info=raised)
        after = error.retry_after_s
        return JSONResponse(
            owner(self._interfaces, scope["path"]).error_body(error),
            error.status,
            {} if after is None else {"retry-after": str(after)},
        )

"""What every request passes before anything looks at its content."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedd_http.errors import ApiError
from pagedd_http.settings import App, Settings

APP = "pagedd.app"
"""Key of a request's scope under which its `App` stands."""

PEER = "pagedd.peer"
"""Key of a request's state: the program at the other end of a Unix socket, where it is known."""

PRIORITIES = ("interactive", "normal", "background")

OPEN_PATHS = frozenset({"/", "/health"})
"""Need no key: a page that asks for one itself, and a probe that tells nothing."""


class Guard:
    """ASGI middleware: name of the host, origin, key, length of the body.

    Raises `ApiError`, so it stands inside the middleware that turns these into answers.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through with its app, or raise."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _name(host) not in self._settings.host_names:
            raise ApiError(403, f"this gateway is not called {_name(host)!r}", code="host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin!r} may not use this gateway", code="origin")
        scope[APP] = self._app_of(scope, headers)
        await self._app(scope, self._limited(headers, receive), send)

    def _app_of(self, scope: Scope, headers: Headers) -> App:
        """Of the key, else of the header, else of the process at the other end."""
        settings = self._settings
        key = headers.get("x-api-key") or _bearer(headers.get("authorization", ""))
        app = settings.key_of(key) if key else None
        if app is None and settings.key_required and scope["path"] not in OPEN_PATHS:
            what = "the API key is unknown or was revoked" if key else "an API key is needed"
            raise _no_entry(what)
        if app is None and key.startswith(settings.key_prefix):
            raise _no_entry("the API key is unknown or was revoked")
        if app is None:
            peer = scope.get("state", {}).get(PEER)
            name = headers.get(settings.app_header) or peer or settings.app.name
            app = App(name, settings.app.priority)
        priority = headers.get(settings.priority_header, app.priority)
        if priority not in PRIORITIES:
            what = f"{settings.priority_header}: one of {', '.join(PRIORITIES)}"
            raise ApiError(400, what, param=settings.priority_header)
        return App(app.name, priority)

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """``receive`` that stops at the longest body."""
        limit = self._settings.body_bytes
        said = headers.get("content-length", "0")
        if not (said.isascii() and said.isdecimal() and len(said) < 20) or int(said) > limit:
            raise _too_long(said, limit)
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_long(f"more than {limit}", limit)
            return message

        return limited


def _name(host: str) -> str:
    """``Host`` without its port, in lower case."""
    name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdecimal() else host
    return name.lower().rstrip(".")


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _no_entry(what: str) -> ApiError:
    return ApiError(401, f"{what}: see 'pagedd apps key add'", code="invalid_api_key")


def _too_long(length: str, limit: int) -> ApiError:
    return ApiError(413, f"the body has {length} bytes, {limit} at most", code="body_too_long")

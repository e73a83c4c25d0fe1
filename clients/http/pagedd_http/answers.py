"""Answering: bodies that are read and validated, streams that end when their reader goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagedd_http.errors import ApiError, as_api_error

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")


class ClientGone(Exception):  # noqa: N818 (says what happened)
    """The client hung up: there is nobody to answer."""


async def body_of(request: Request, kind: type[Body]) -> Body:
    """The body of a request, validated.

    Raises:
        ApiError: 400: it is no JSON object, or a field is wrong; all of them are named.
        ClientGone: The client hung up before the end of it.
    """
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        field = ".".join(str(part) for part in found[0]["loc"])
        what = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in found[:8]
        )
        raise ApiError(400, what, code="invalid_body", param=field or None) from error


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client hangs up.

    The body must have been read: the next thing that then comes from the client is its going.

    Raises:
        ClientGone: It did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends pieces as they come, until the last or until the client goes.

    The first piece is awaited before the status is sent, so that a request that fails before it
    has anything to say is answered with an error's own status. Once the status is out, an error
    can only be told inside the stream: ``told`` puts it into a last piece.

    Starlette's own streaming notices a client that has gone only when it sends; while a long
    prompt is computed nothing is sent, so here somebody listens all the time.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str,
        told: Callable[[ApiError], bytes],
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        await unless_gone(Request(scope, receive), self._pump(send))

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._pieces) as pieces:
            piece = await anext(pieces, b"")
            start = {"type": "http.response.start", "status": self.status_code}
            await send({**start, "headers": self.raw_headers})
            try:
                while piece:
                    await send(_body(piece, more=True))
                    piece = await anext(pieces, b"")
            except Exception as error:
                await send(_body(self._told(as_api_error(error)), more=True))
        await send(_body(b"", more=False))


def _body(piece: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": piece, "more_body": more}


DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event that holds a JSON document."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {dumps(data)}\n\n".encode()


def dumps(data: Any) -> str:
    """Compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

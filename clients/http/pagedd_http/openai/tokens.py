"""``/tokenize`` and ``/detokenize``, as local servers have them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pagedd_http.answers import body_of, unless_gone
from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of
from pagedd_http.openai.bodies import OpenAIBody


class TokenizeBody(OpenAIBody):
    """``POST /tokenize``; llama-server says ``content``, vLLM ``prompt``."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    add_special: bool = False
    """Put the model's start token in front, where it wants one."""
    parse_special: bool = True
    """Read the spelling of a special token as that token."""

    def text(self) -> str:
        """What to tokenise.

        Raises:
            ApiError: There is nothing.
        """
        text = self.prompt if self.content is None else self.content
        if text is None:
            raise ApiError(400, "content: it is missing", param="content")
        return text


class DetokenizeBody(OpenAIBody):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


async def tokenize(request: Request) -> JSONResponse:
    """Text to token ids."""
    body = await body_of(request, TokenizeBody)
    text = body.text()
    client = await client_of(request)
    work = client.tokenize(text, model=body.model, special=body.parse_special, bos=body.add_special)
    tokens = await unless_gone(request, work)
    return JSONResponse({"tokens": tokens, "count": len(tokens)})


async def detokenize(request: Request) -> JSONResponse:
    """Token ids to text."""
    body = await body_of(request, DetokenizeBody)
    client = await client_of(request)
    text = await unless_gone(request, client.detokenize(body.tokens, model=body.model))
    return JSONResponse({"content": text, "prompt": text})


routes = [
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]

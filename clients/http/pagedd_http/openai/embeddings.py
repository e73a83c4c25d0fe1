"""``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pagedd_http.answers import body_of, unless_gone
from pagedd_http.errors import ApiError
from pagedd_http.gateway import client_of
from pagedd_http.openai.bodies import OpenAIBody
from pagedd_http.vectors import as_base64, embedded

Tokens = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]
MOST_INPUTS = 2048


class EmbeddingsBody(OpenAIBody):
    """Its body."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def inputs(self) -> list[Any]:
        """The texts, or their token ids."""
        given: Any = self.input
        one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if one else list(given)


async def embeddings(request: Request) -> JSONResponse:
    """Vectors of length 1: means of the model's last hidden states."""
    body = await body_of(request, EmbeddingsBody)
    client = await client_of(request)
    made = await unless_gone(request, embedded(client, body.inputs(), model=body.model))
    width = len(made.vectors[0])
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: the model has {width}", param="dimensions")
    encoded = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": as_base64(vector) if encoded else vector,
        }
        for index, vector in enumerate(made.vectors)
    ]
    usage = {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": made.model, "usage": usage})


routes = [Route("/v1/embeddings", embeddings, methods=["POST"])]

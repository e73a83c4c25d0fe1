"""Vectors of texts, whichever interface they are asked for through."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence

from pagedd import AsyncClient, Embeddings

PER_REQUEST = 64
"""Texts of one request to the daemon; clients send thousands at once."""


async def embedded(
    client: AsyncClient,
    inputs: Sequence[str] | Sequence[Sequence[int]],
    *,
    model: str | None,
    normalize: bool = True,
    keep_alive: float | str | None = None,
) -> Embeddings:
    """The vectors of any number of texts, at least one.

    Raises:
        PageddError: The daemon cannot compute them.
    """
    vectors: list[list[float]] = []
    tokens = 0
    for start in range(0, len(inputs), PER_REQUEST):
        some = await client.embed(
            inputs[start : start + PER_REQUEST],
            model=model,
            normalize=normalize,
            keep_alive=keep_alive,
        )
        vectors += some.vectors
        tokens += some.prompt_tokens
    return Embeddings(vectors, tokens, some.model)


def as_base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients ask for by default."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

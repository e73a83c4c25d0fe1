"""The bytes of single tokens, asked for once."""

from __future__ import annotations

from collections.abc import Iterable

from pagedd import AsyncClient

MAX_KNOWN = 100_000
"""Tokens remembered, of all models together; beyond that all are forgotten."""

PER_QUESTION = 4096
"""Tokens of one question; the daemon's limit for a list is higher."""


class Pieces:
    """What tokens of the models are, in bytes."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], bytes] = {}

    async def of(self, client: AsyncClient, model: str, tokens: Iterable[int]) -> dict[int, bytes]:
        """The bytes of each of these tokens of a model.

        Raises:
            PageddError: The daemon cannot say.
        """
        wanted = set(tokens)
        new = [token for token in wanted if (model, token) not in self._known]
        if len(self._known) + len(new) > MAX_KNOWN:
            self._known.clear()
            new = list(wanted)
        for start in range(0, len(new), PER_QUESTION):
            some = new[start : start + PER_QUESTION]
            for token, piece in zip(some, await client.pieces(some, model=model), strict=True):
                self._known[model, token] = piece
        return {token: self._known[model, token] for token in wanted}

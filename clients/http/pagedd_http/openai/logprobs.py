"""Log-probabilities as OpenAI has them: by the text of tokens, not by their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pagedd import AsyncClient, TokenLogprob
from pagedd_http.pieces import Pieces


class Logprobs:
    """Looks tokens up for the replies of one request."""

    def __init__(self, pieces: Pieces, client: AsyncClient) -> None:
        self._pieces = pieces
        self._client = client

    async def of_completion(
        self,
        model: str,
        tokens: Sequence[int],
        entries: Sequence[TokenLogprob | None],
        offset: int,
    ) -> tuple[dict[str, Any], int]:
        """``logprobs`` of a completion, and the offset of what follows.

        Args:
            model: That computed them.
            tokens: Of the text.
            entries: One for each of them; None for a prompt's first.
            offset: Characters of the text before them.
        """
        pieces = await self._pieces.of(self._client, model, _ids(tokens, entries))
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(_text(pieces[token]))
        told = {
            "tokens": [_text(pieces[token]) for token in tokens],
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [
                None
                if entry is None
                else {_text(pieces[token]): value for token, value in reversed(entry.top)}
                for entry in entries
            ],
            "text_offset": offsets,
        }
        return told, offset

    async def of_chat(
        self, model: str, tokens: Sequence[int], entries: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        """``logprobs`` of a chat completion's choice, or of a piece of one."""
        pieces = await self._pieces.of(self._client, model, _ids(tokens, entries))
        content = [
            {
                **_likely(pieces, entry.token, entry.logprob),
                "top_logprobs": [_likely(pieces, token, value) for token, value in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}


def _ids(tokens: Sequence[int], entries: Sequence[TokenLogprob | None]) -> Iterator[int]:
    yield from tokens
    for entry in entries:
        if entry is not None:
            yield from (token for token, _ in entry.top)


def _likely(pieces: Mapping[int, bytes], token: int, value: float) -> dict[str, Any]:
    piece = pieces[token]
    return {"token": _text(piece), "logprob": value, "bytes": list(piece)}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")

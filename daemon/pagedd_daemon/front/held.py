"""Replies of which nothing is said before they are whole."""

from __future__ import annotations

import math
from typing import Any

_CHUNK_TOKENS = 512
"""Tokens of one event: with the log-probabilities of 20 others each, 150 KB."""


class _Piece:
    """What becomes one ``chunk``."""

    __slots__ = ("logprobs", "text", "tokens")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens = bytearray()
        self.logprobs: list[Any] = []


class _Reply:
    """What one sample has said."""

    __slots__ = ("count", "pieces", "total")

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.total = 0.0
        """Sum of the log-probabilities of its tokens."""
        self.count = 0


class Held:
    """Samples of a request, kept until it is over."""

    def __init__(self, samples: int, *, ranked: bool, logprobs: bool) -> None:
        """Nothing said yet.

        Args:
            samples: How many there are.
            ranked: The best are to be found: every token comes with its log-probability.
            logprobs: The client wants these too.
        """
        self._replies = [_Reply() for _ in range(samples)]
        self._ranked = ranked
        self._logprobs = logprobs

    def take(self, index: int, text: str, tokens: bytes, logprobs: list[Any] | None) -> None:
        """A sample goes on. Arguments as in the ``chunk`` that it would be."""
        reply = self._replies[index]
        count = len(tokens) // 4
        pieces = reply.pieces
        if not pieces or len(pieces[-1].tokens) + len(tokens) > 4 * _CHUNK_TOKENS:
            pieces.append(_Piece())
        pieces[-1].text.append(text)
        pieces[-1].tokens += tokens
        if logprobs is not None:
            if self._ranked:
                reply.total += sum(entry[0] for entry in logprobs)
            if self._logprobs:
                pieces[-1].logprobs += logprobs
        reply.count += count

    def score(self, index: int) -> float | None:
        """Mean log-probability of a sample's tokens; None without tokens, or if not ranked."""
        reply = self._replies[index]
        return reply.total / reply.count if self._ranked and reply.count else None

    def best(self, count: int) -> list[int]:
        """The samples with the highest scores, best first, the first of equals; all the first ones
        if they are not ranked."""
        indices = range(len(self._replies))
        scores = [self.score(index) for index in indices]
        ranks = [-math.inf if score is None else score for score in scores]
        return sorted(indices, key=lambda index: -ranks[index])[:count]

    def chunks(self, index: int) -> list[dict[str, Any]]:
        """The ``chunk`` events of a sample, but for its number."""
        return [
            {
                "text": "".join(piece.text),
                "tokens": bytes(piece.tokens),
                **({"logprobs": piece.logprobs} if self._logprobs else {}),
            }
            for piece in self._replies[index].pieces
        ]

"""What a client hears of its own prompt: text, tokens, and how likely these were."""

from __future__ import annotations

from array import array
from typing import Any

from pagedd_daemon.front.detokenizer import Detokenizer, PieceTable, pack_ids


class Echo:
    """The prompt of one request, told once, in as many parts as its scores come in."""

    def __init__(self, prompt: array[int], table: PieceTable | None, *, text: bool) -> None:
        """``table`` is None for a model without a tokeniser. ``text``: it is told too."""
        self._prompt = prompt
        self._strip = text and table is not None and table.space_prefix
        self._detokenizer = Detokenizer(table) if text and table is not None else None
        self._told = 0

    def whole(self) -> dict[str, Any]:
        """The ``prompt`` event without scores."""
        return self._part(len(self._prompt))

    def first(self) -> dict[str, Any] | None:
        """The event of a prompt that is too short for scores."""
        return {**self._part(1), "logprobs": [None]} if len(self._prompt) == 1 else None

    def part(self, start: int, logprobs: list[Any]) -> dict[str, Any] | None:
        """The event of some scores, the first one that of position ``start``; None where they were
        told before (an engine that has taken over begins anew)."""
        entries = [None, *logprobs] if start == 1 else logprobs
        begin = 0 if start == 1 else start
        assert begin <= self._told, "scores come in order"
        entries = entries[self._told - begin : len(self._prompt) - begin]
        if not entries:
            return None
        return {**self._part(self._told + len(entries)), "logprobs": entries}

    def _part(self, end: int) -> dict[str, Any]:
        tokens = self._prompt[self._told : end]
        begin, self._told = self._told, end
        return {"start": begin, "text": self._text(tokens, end), "tokens": pack_ids(tokens)}

    def _text(self, tokens: array[int], end: int) -> str:
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.push(tokens)
        if end == len(self._prompt):
            text += self._detokenizer.finish()
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text

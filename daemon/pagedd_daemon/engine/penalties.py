"""Penalties against drawing again what a text has had: repetition, presence, frequency."""

from __future__ import annotations

import numpy as np

from kvpager.types import Tokens
from pagedd_daemon.engine.candidates import Ids, Row
from pagedd_daemon.params import SamplingParams

_LARGEST = 3e38


class Penalties:
    """What a text has had so far, as parallel arrays that grow with it, and what that costs."""

    __slots__ = ("_counts", "_ids", "_params", "_size", "_slot", "prompt", "tokens")

    def __init__(self, params: SamplingParams, prompt: Ids) -> None:
        """Those of ``params``, over the distinct ids of a prompt and what `add` tells."""
        self._params = params
        self.prompt = prompt
        """Distinct ids of the prompt; none where they do not count."""
        self._fill([])

    @classmethod
    def of(cls, params: SamplingParams, prompt: Tokens) -> Penalties | None:
        """The penalties that ``params`` ask for; None: there are none."""
        repeats = params.repetition_penalty != 1.0
        if not repeats and params.presence_penalty == 0.0 and params.frequency_penalty == 0.0:
            return None
        return cls(params, np.unique(prompt).astype(np.int64) if repeats else np.zeros(0, np.int64))

    def _fill(self, tokens: list[int]) -> None:
        self.tokens: list[int] = []
        """Every token of the text, in order."""
        self._size = self.prompt.size
        self._ids = np.zeros(self._size + 64, np.int64)
        self._counts = np.zeros(self._size + 64, np.float64)
        self._ids[: self._size] = self.prompt
        self._slot = {token: slot for slot, token in enumerate(self.prompt.tolist())}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """``token`` is the next one of the text."""
        self.tokens.append(token)
        slot = self._slot.get(token)
        if slot is None:
            slot = self._slot[token] = self._size
            if slot == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token
            self._size += 1
        self._counts[slot] += 1

    def rewind(self, length: int) -> None:
        """Forget the tokens beyond the first ``length``."""
        self._fill(self.tokens[:length])

    def copy(self) -> Penalties:
        """The same text, to go on by itself."""
        other = Penalties(self._params, self.prompt)
        other._fill(self.tokens)
        return other

    def apply(self, row: Row) -> tuple[Ids, Row] | None:
        """Lower the logits of what was there already, in place.

        Returns:
            What was there before; None where nothing was changed.
        """
        if not self._size:
            return None
        p = self._params
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        before = row[ids]
        values = before.astype(np.float64)
        values = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        values -= counts * p.frequency_penalty + (counts > 0) * p.presence_penalty
        row[ids] = values.clip(-_LARGEST, _LARGEST)  # penalties near 0 divide out of float32
        return ids, before

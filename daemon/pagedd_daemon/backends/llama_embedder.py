"""Vectors of texts with llama.cpp, in a context of their own on the weights of the pool's.

Whether hidden states are kept is a property of a context, and keeping them has the output layer
computed for every token: the pool's own context must not do so. This one is as long as the longest
text needs, and is there only while somebody waits for vectors.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvpager.types import Tokens
from pagedd_daemon.backends import llama_api as api
from pagedd_daemon.backends.base import StepFaultError

STEP_TOKENS = 128
"""Tokens computed at once, at most: their logits, which nobody wants, take 25 MB with a vocabulary
of 49,152."""
_LEAST_CELLS = 512


class LlamaEmbedder:
    """Implements `pagedd_daemon.backends.base.Embedder`."""

    def __init__(self, model: api.Model, options: api.ContextOptions) -> None:
        """``options``: of the pool's context; threads and KV type are its."""
        self._model = model
        self._options = options
        self._context: api.Context | None = None

    @property
    def dimensions(self) -> int:
        """See `Embedder`."""
        return self._model.width

    def begin(self, tokens: int) -> None:
        """See `Embedder`."""
        if self._context is not None and self._context.cells >= tokens:
            self._context.remove(0)
            return
        self.rest()
        options = replace(
            self._options,
            cells=max(_LEAST_CELLS, 1 << (tokens - 1).bit_length()),
            step_tokens=STEP_TOKENS,
            sequences=1,
            embeddings=True,
        )
        try:
            self._context = api.Context(self._model, options)
        except MemoryError as error:
            raise StepFaultError(f"no memory for a text of {tokens} tokens") from error

    def add(self, start: int, tokens: Tokens) -> npt.NDArray[np.float64]:
        """See `Embedder`."""
        context, n = self._context, len(tokens)
        assert context is not None
        assert n <= STEP_TOKENS
        context.tokens[:n] = tokens
        context.positions[:n] = np.arange(start, start + n)
        context.sequences[:n] = 0
        context.wanted[:n] = 1
        status = context.decode(n)
        if status != 0:
            raise StepFaultError(f"llama_decode returned {status}")
        total: npt.NDArray[np.float64] = context.hidden(n).sum(axis=0, dtype=np.float64)
        return total

    def rest(self) -> None:
        """See `Embedder`."""
        if self._context is not None:
            self._context.close()
            self._context = None

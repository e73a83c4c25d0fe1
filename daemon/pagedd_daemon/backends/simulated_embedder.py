"""The simulated backend's vectors of texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvpager.types import Tokens


class SimulatedEmbedder:
    """Vectors that depend on every token and its position, and on nothing else."""

    dimensions = 64

    def __init__(
        self,
        step_s: float,
        token_s: float,
        clock: Callable[[], float],
        wait: Callable[[float], None],
    ) -> None:
        self._step_s = step_s
        self._token_s = token_s
        self._clock = clock
        self._wait = wait

    def begin(self, tokens: int) -> None:
        """See `Embedder`."""

    def add(self, start: int, tokens: Tokens) -> npt.NDArray[np.float64]:
        """See `Embedder`."""
        self._wait(self._clock() + self._step_s + self._token_s * len(tokens))
        total = np.zeros(self.dimensions)
        for at, token in enumerate(tokens.tolist(), start):
            total += np.random.Generator(np.random.Philox((at << 32) + token)).random(64) - 0.5
        return total

    def rest(self) -> None:
        """See `Embedder`."""

"""Small things that tests of backends need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvpager.types import Tokens
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import SamplingParams, StopParams


def ids(values: Sequence[int]) -> Tokens:
    """Token ids as the pager wants them."""
    return np.array(values, np.int32)


def greedy(vocab: int, **params: object) -> Sampler:
    """A sampler that takes the best token, unless ``params`` say otherwise."""
    settings = SamplingParams(**{"temperature": 0.0, **params})  # type: ignore[arg-type]
    return Sampler(
        settings,
        StopParams(max_tokens=10**6),
        index=0,
        prompt=ids([]),
        vocab_size=vocab,
        eog_tokens=frozenset(),
    )

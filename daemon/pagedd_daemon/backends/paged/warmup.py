"""Steps that are made before the engine is ready, so that nothing is compiled while it serves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvpager.types import CopyBlock
from pagedd_daemon.backends.base import Backend, Draw, Run, Step
from pagedd_daemon.backends.paged.sampling import WIDTHS
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import SamplingParams, StopParams

_FILTERS = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05)
FLAVOURS: tuple[SamplingParams, ...] = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=5),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, logprobs=5),
    _FILTERS,
    replace(_FILTERS, logprobs=5),
    replace(_FILTERS, typical_p=0.9),
    SamplingParams(temperature=0.0, repetition_penalty=1.1),
    *(SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(w), 1.0)) for w in WIDTHS),
)
"""Ways of drawing that lead to kernels of their own; `sampling.stage` leaves no others."""


def warm_up(backend: Backend, sizes: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Draw in every way, copy blocks, and compute steps that have no graph.

    Everything is written to the first two blocks of the pool, which nobody holds yet.

    Args:
        backend: Just loaded.
        sizes: Sequences of the steps that draw.
        tokens: Input tokens of steps without a graph.
    """
    vocab = backend.capabilities.vocab_size
    block_tokens = backend.capabilities.block_tokens
    for params in FLAVOURS:
        # As many masked ids as biases.
        stops = tuple(params.logit_bias)
        stop = StopParams(max_tokens=9, min_tokens=9 if stops else 0, stop_token_ids=stops)
        sampler = Sampler(
            params,
            stop,
            index=0,
            prompt=np.zeros(1, np.int32),
            vocab_size=vocab,
            eog_tokens=frozenset({0}),
        )
        for size in sizes:
            table = np.zeros(1, np.int32)
            one = np.zeros(1, np.int32)
            runs = [Run(seq, 0, one, table, [Draw(seq, sampler)]) for seq in range(size)]
            backend.collect(backend.launch(Step(0, runs)))
    for count in tokens:
        # One sequence whose blocks are all the same one: what it computes is never looked at.
        table = np.zeros(-(-count // block_tokens), np.int32)
        run = Run(0, 0, np.zeros(count, np.int32), table)
        backend.collect(backend.launch(Step(0, [run])))
    backend.apply([CopyBlock(0, 0, 0, 1, block_tokens)])

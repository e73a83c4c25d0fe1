"""Steps that are made before the engine is ready, so that nothing is compiled while it serves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvpager.types import CopyBlock
from pagedd_daemon.backends.base import Backend, Draw, Run, Step
from pagedd_daemon.backends.paged.layout import MOST_SEQUENCES
from pagedd_daemon.backends.paged.sampling import WIDTHS
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import SamplingParams, StopParams

_WAYS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05),
)
FLAVOURS: tuple[SamplingParams, ...] = (
    # Each with and without log-probabilities, from the model's own logits and from changed ones.
    *(replace(way, logprobs=top) for way in _WAYS for top in (-1, 5)),
    *(replace(way, logprobs=top, logit_bias={0: 1.0}) for way in _WAYS for top in (-1, 5)),
    *(replace(_WAYS[0], logit_bias=dict.fromkeys(range(width), 1.0)) for width in WIDTHS),
    replace(_WAYS[0], repetition_penalty=1.1),
    replace(_WAYS[2], typical_p=0.9),
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
        # One sequence, two, and as many as lead to each plan of the decode kernel.
        for others in (0, 1, min(count, 32) - 1, min(count, MOST_SEQUENCES // 2) - 1):
            step = _step(count, others, block_tokens, backend.capabilities.context_tokens)
            backend.collect(backend.launch(step))
    backend.apply([CopyBlock(0, 0, 0, 1, block_tokens)])


def _step(tokens: int, others: int, block_tokens: int, context: int) -> Step:
    """Prompts beside some that decode. Blocks are all the same one: nobody looks at the result."""
    one, table = np.zeros(1, np.int32), np.zeros(1, np.int32)
    runs = [Run(at, 0, one, table) for at in range(others)]
    rest = tokens - others
    while rest:
        count = min(rest, context)
        blocks = np.zeros(-(-count // block_tokens), np.int32)
        runs.append(Run(len(runs), 0, np.zeros(count, np.int32), blocks))
        rest -= count
    return Step(0, runs)

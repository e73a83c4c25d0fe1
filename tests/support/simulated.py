"""Simulated backends, and the simulated model as a function of whole texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Draw, Run, Step
from pagedd_daemon.backends.simulated import BLOCK_TOKENS, BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.grammar import Grammars
from tests.support.steps import greedy, ids

VOCAB = 258
EOG = 256


def simulated(
    *, blocks: int = 256, ram_pages: int = 1024, llama: bool = False, verify: bool = True
) -> SimulatedBackend:
    """A backend that checks what it reads; with ``llama`` it is asked for one step at a time and
    keeps nothing cached in its first tier, as llama.cpp."""
    configure = _configure(blocks, ram_pages)
    made = SimulatedBackend.from_configure(configure, keep_cached_on_gpu=not llama)
    return SimulatedBackend(
        replace(made.capabilities, asynchronous=not llama), token_s=1e-6, verify=verify
    )


def _configure(blocks: int, ram_pages: int) -> m.Configure:
    return m.Configure(
        backend="simulated",
        model_path="",
        model_digest=bytes(32),
        context_tokens=2048,
        kv_tokens=blocks * BLOCK_TOKENS,
        ram_bytes=ram_pages * BLOCK_TOKENS * BYTES_PER_TOKEN,
        threads=1,
        vocab_size=VOCAB,
        eog_tokens=(EOG,),
        pieces=bytes(range(256)),
        piece_lengths=np.array([1] * 256 + [0, 0], "<i4").tobytes(),
    )


def grammars_for(backend: SimulatedBackend) -> Grammars:
    """Grammars over the bytes that its tokens are."""
    return Grammars(_configure(2, 0), backend.capabilities)


def plain_logprobs() -> Callable[[list[int]], list[float]]:
    """Log-probability of every token after a text, computed in one go in an empty pool."""
    backend = simulated(verify=False)
    size = backend.capabilities.block_tokens
    known: dict[tuple[int, ...], list[float]] = {}

    def logprobs(text: list[int]) -> list[float]:
        key = tuple(text)
        if key not in known:
            table = np.arange(-(-len(text) // size), dtype=np.int32)
            draw = Draw(1, greedy(VOCAB, logprobs=VOCAB))
            step = Step(1, [Run(1, 0, ids(text), table, [draw])])
            ((_, drawn),) = backend.collect(backend.launch(step)).drawn
            known[key] = [value for _, value in sorted(drawn.top)]
        return known[key]

    return logprobs

"""Requests of all ways of decoding, for one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedd_daemon.params import BeamParams, SamplingParams, StopParams
from tests.support.answers import Ask, Asking

STOP = StopParams(max_tokens=40, ignore_eos=True)


def prompt(seed: int, length: int, vocab: int) -> list[int]:
    """Random ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, vocab, length)]


def all_methods(vocab: int) -> list[Ask]:
    """Greedy, sampled, four samples, ranked ones, beams, and prompts that begin alike."""
    stem = prompt(0, 48, vocab)
    best = SamplingParams(temperature=0.0, logprobs=2)
    drawn = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=11)
    scored = SamplingParams(temperature=0.9, seed=12, logprobs=0)
    return [
        Ask(prompt(1, 50, vocab), 1, best, STOP),
        Ask(prompt(2, 60, vocab), 1, drawn, STOP),
        Ask(prompt(3, 70, vocab), 4, drawn, STOP),
        Ask(prompt(4, 40, vocab), 4, scored, STOP),
        Ask(prompt(5, 80, vocab), 4, stop=STOP, beams=BeamParams(4)),
        Ask(prompt(6, 30, vocab), 2, stop=STOP, beams=BeamParams(3, 0.5, "never")),
        *(Ask([*stem, *prompt(10 + at, 9, vocab)], 1, best, STOP) for at in range(3)),
        Ask(prompt(7, 90, vocab), 1, best, STOP, prompt_logprobs=1),
    ]


def demand_blocks(asks: Sequence[Ask], block: int = 16) -> int:
    """Blocks of all requests at once, each text on its own."""
    return sum(
        max(ask.n, ask.beams.width if ask.beams else 1)
        * -(-(len(ask.prompt) + ask.stop.max_tokens) // block)
        for ask in asks
    )


def preempted(asking: Asking) -> int:
    """How often a sequence was paged out."""
    stats = asking.engine._pool.pager.stats()
    return stats.preemptions_swap + stats.preemptions_recompute

"""Requests of a given shape that arrive at a given rate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORKLOADS = Path(__file__).resolve().parents[1] / "workloads"
SHAPES = ("sharegpt", "alpaca")
CHAT_LIMIT = 1024
VOCABULARY = 50_272
"""Token ids of OPT. Which ids a prompt has only matters to the prefix index."""

Lengths = Sequence[tuple[int, int]]
"""``(prompt tokens, output tokens)`` of each request."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def lengths(shape: str, count: int) -> Lengths:
    """``count`` pairs of a workload: a shape of `SHAPES`, ``chat`` or ``prefix-N``."""
    if shape == "chat":
        return _chat(count)
    if shape.startswith("prefix-"):
        return _translations(int(shape.removeprefix("prefix-")), count)
    return _shape(shape, count)


def _shape(shape: str, count: int) -> Lengths:
    text = (WORKLOADS / f"{shape}-shaped.json").read_text(encoding="utf-8")
    pairs = json.loads(text)["requests"][:count]
    return [(int(prompt), int(output)) for prompt, output in pairs]


def _chat(count: int) -> Lengths:
    """Turns 1 to 6 of ShareGPT-shaped conversations, cut as in the paper's section 6.5.

    The prompt is all that was said before and the new question, its last 1,024 tokens at most;
    the answer has at most 1,024.
    """
    rounds = _shape("sharegpt", 20_000)
    made: list[tuple[int, int]] = []
    at = 0
    while len(made) < count:
        history = 0
        for _ in range(1 + len(made) % 6):
            question, answer = rounds[at % len(rounds)]
            prompt, output = history + question, answer
            history = prompt + answer
            at += 1
        made.append((min(prompt, CHAT_LIMIT), min(output, CHAT_LIMIT)))
    return made


def _translations(prefix: int, count: int) -> Lengths:
    """A shared prefix of ``prefix`` tokens, a sentence, and its translation.

    The paper (section 6.4) uses WMT16 English-German and gives no lengths: lognormal, mean 28 and
    40 tokens, sigma 0.5, is our assumption of what its sentences are.
    """
    random = np.random.default_rng(16)
    sigma = 0.5
    drawn = [
        np.maximum(random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).astype(int), 2)
        for mean in (28, 40)
    ]
    pairs = zip(drawn[0].tolist(), drawn[1].tolist(), strict=True)
    return [(prefix + source, target) for source, target in pairs]


def poisson(pairs: Lengths, per_s: float, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process of ``per_s`` requests a second, one per pair, in order.

    Gaps are unit exponentials divided by the rate: at one seed, every rate and every policy sees
    the same requests in the same order with the same gaps in proportion.
    """
    gaps = np.random.default_rng(seed).exponential(1.0, len(pairs)) / per_s
    times = np.cumsum(gaps).tolist()
    return [Arrival(at, p, o) for at, (p, o) in zip(times, pairs, strict=True)]


def at_once(pairs: Lengths) -> list[Arrival]:
    """Everything at time 0: the queue is never empty until the end is near."""
    return [Arrival(0.0, p, o) for p, o in pairs]

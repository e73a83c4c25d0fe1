"""Replies that were chosen among others: the best of several samples, and what a search found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pagedd_daemon.params import BeamParams, SamplingParams, StopParams
from tests.support.sim.oracle import Oracle

_CLOSE = 1e-6


def best_of(
    oracle: Oracle,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    stop: StopParams,
    drawn: int,
    wanted: int,
) -> list[tuple[int, ...]]:
    """Tokens of the ``wanted`` best of ``drawn`` samples, best first."""
    sampling = replace(sampling, logprobs=0)
    replies = [oracle.reply(prompt, sampling, stop, i, stop.max_tokens) for i in range(drawn)]
    return [r.tokens for r in sorted(replies, key=lambda reply: -reply.score)[:wanted]]


def searched(
    oracle: Oracle, prompt: tuple[int, ...], fields: dict[str, Any]
) -> tuple[list[tuple[int, ...]], list[float]]:
    """Tokens and scores of what a search must find, best first."""
    params = BeamParams(fields["beam_width"], fields.get("length_penalty", 1.0))
    found = oracle.beams(prompt, params, fields["max_tokens"])[: fields.get("n", 1)]
    return [tuple(one.tokens) for one in found], [one.score for one in found]


def close(some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether scores are the same but for how sums are rounded."""
    pairs = zip(some, others, strict=True)
    return len(some) == len(others) and all(abs(a - b) < _CLOSE for a, b in pairs)

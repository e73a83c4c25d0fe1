"""Beam search in the plainest form: whole texts, every token a candidate, nothing shared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from pagedd_daemon.params import BeamParams, StopParams


@dataclass(frozen=True, slots=True)
class Found:
    """A text that was found, without the token that ended it."""

    tokens: list[int]
    score: float
    reason: str


def search(
    logprobs: Callable[[list[int]], list[float]],
    prompt: list[int],
    params: BeamParams,
    stop: StopParams,
    eog_tokens: Collection[int],
) -> list[Found]:
    """The ``params.width`` best texts, best first.

    Args:
        logprobs: Log-probability of every token after a text.
        prompt: What the texts continue.
        params: How to search.
        stop: When a text ends.
        eog_tokens: The model's end-of-generation ids.
    """
    width, penalty = params.width, params.length_penalty
    ends = {*eog_tokens, *stop.stop_token_ids}
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    found: list[Found] = []
    for length in range(1, stop.max_tokens + 1):
        hidden = ends if length <= stop.min_tokens else set(eog_tokens if stop.ignore_eos else ())
        everything = [
            (-(score + logprob), rank, token)
            for rank, (score, text) in enumerate(beams)
            for token, logprob in enumerate(logprobs(prompt + text))
            if token not in hidden
        ]
        everything.sort()
        last = length == stop.max_tokens
        for negative, rank, token in everything[:width]:
            text, score = beams[rank][1], -negative / length**penalty
            if token in ends:
                found.append(Found(text, score, "stop"))
            elif last:
                found.append(Found([*text, token], score, "length"))
        found = sorted(found, key=lambda one: -one.score)[:width]
        going_on = [(n, r, t) for n, r, t in everything if t not in ends][:width]
        beams = [(-negative, [*beams[rank][1], token]) for negative, rank, token in going_on]
        if len(found) == width:
            never = params.early_stopping == "never" and penalty > 0
            best = beams[0][0] / (stop.max_tokens if never else length) ** penalty
            if params.early_stopping is True or best <= found[-1].score:
                break
    return found

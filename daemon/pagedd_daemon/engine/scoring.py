"""Log-probabilities of prompts: which rows of a step's logits they need, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from kvpager.types import Tokens
from pagedd_daemon import messages as m
from pagedd_daemon.engine.sampler import Drawn, with_logprobs
from pagedd_daemon.engine.work import Sequence


def follows(sequence: Sequence, start: int, count: int) -> Tokens | None:
    """What follows each of ``count`` tokens from position ``start`` on, as far as the prompt goes
    and somebody wants to know how likely it was."""
    request = sequence.request
    end = min(start + count + 1, request.prompt_tokens)
    if request.prompt_logprobs < 0 or end <= max(start + 1, request.scored):
        return None
    return request.prompt[start + 1 : end]


def score(logits: npt.NDArray[np.float32], following: Tokens, top: int) -> list[Drawn]:
    """How likely tokens were.

    Args:
        logits: float32, shape ``(n, vocab)``: the row before each of them.
        following: Their ids, int32, shape ``(n,)``.
        top: How many of the most likely ones to tell of beside each.
    """
    return [
        with_logprobs(row, token, top)
        for row, token in zip(logits, following.tolist(), strict=True)
    ]


def told(sequence: Sequence, start: int, scored: Items[Drawn]) -> m.PromptScores | None:
    """What is new of the scores of the tokens after position ``start``: after a preemption some
    come a second time."""
    request = sequence.request
    fresh = scored[max(0, request.scored - (start + 1)) :]
    if not fresh:
        return None
    first, request.scored = request.scored, request.scored + len(fresh)
    entries = [(one.logprob or 0.0, [*one.top]) for one in fresh]
    return m.PromptScores(request.rid, first, entries)

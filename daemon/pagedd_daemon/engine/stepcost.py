"""How long a step will take, learned from the steps before it."""

from __future__ import annotations

import math
import sys
from collections import deque

import numpy as np

LEAST_DECODES, LEAST_ASIDE = 8, 2
"""Streams that decode in every step, however slow the machine; beside the prompt of a person."""
_FIT_STEPS, _FIT_EVERY = 64, 16
"""Steps that the share of one stream in a step's time is learned from, and how often."""
_PRIOR = 1.0
"""What is believed of a stream beforehand counts like steps whose streams vary by so many."""
_WEIGHT = 0.2
"""Of the newest observation in the running mean."""


class StepCost:
    """A running estimate of ``seconds = decode + per_token x prefill tokens``.

    Chunks are cut with it so that a long prompt neither starves the streams beside it nor delays
    a cancel. Seconds come from the backend, so a simulated one makes the same plans every time.
    """

    def __init__(self) -> None:
        self._decode_s = self._decodes = 0.0
        """Seconds without what prompts took, and streams, of steps that decode."""
        self._chunk_tokens = self._chunk_s = 0.0
        self._seen: deque[tuple[int, int, float]] = deque(maxlen=_FIT_STEPS)
        self._observed = 0
        self._fixed_s = self._per_decode_s = self._fit_token_s = 0.0
        """Of the last fit."""
        self._fitted = False

    def observe(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        """Learn from a step that has retired."""
        self._seen.append((decodes, prefill_tokens, seconds))
        self._observed += 1
        if self._observed % _FIT_EVERY == 0:
            self._fit()
        if decodes:
            self._decodes = _smooth(self._decodes, decodes)
        if prefill_tokens == 0:
            self._decode_s = _smooth(self._decode_s, seconds)
            return
        rest = seconds - (self._decode_s if decodes else 0.0)
        # Both are averaged, and not their ratio: the last 16 tokens of a prompt take as long as the
        # weights take to read, which says nothing of what 6,000 take, and would have those cut.
        self._chunk_tokens = _smooth(self._chunk_tokens, prefill_tokens)
        self._chunk_s = _smooth(self._chunk_s, max(rest, 0.1 * seconds))
        if decodes:
            # Where every step has prompts this is all there is to learn of decoding, and without
            # it one slow step would keep the chunks small for ever.
            rest = seconds - self._per_token_s * prefill_tokens
            self._decode_s = _smooth(self._decode_s, max(rest, 0.0))

    @property
    def _per_token_s(self) -> float:
        return self._chunk_s / self._chunk_tokens if self._chunk_tokens else 0.0

    def prefill_budget(self, decodes: int, most: int, least: int, target_s: float) -> int:
        """Prompt tokens the next step may compute beside ``decodes`` decoding sequences, to take
        about ``target_s`` seconds.

        At most ``most``; at least ``least``, so that prompts always advance.
        """
        if self._per_token_s == 0.0:
            return min(most, 4 * least)
        rest, per_token_s = target_s - self._decode_s if decodes else target_s, self._per_token_s
        if self._per_decode_s > 0.0 and self._fit_token_s > 0.0:
            # Where the number of streams varies, the running means mix up what belongs to whom.
            rest = target_s - self._fixed_s - decodes * self._per_decode_s
            per_token_s = max(self._fit_token_s, per_token_s / 4)
        return min(most, max(least, int(rest / per_token_s)))

    def decodes_within(self, target_s: float, least: int = LEAST_DECODES) -> int:
        """Streams that can decode in one step within ``target_s``, at least ``least``.

        Or as many as take no longer than what they share: where a step takes long by itself,
        leaving some out would gain nobody much. As long as their number has not changed, one is
        taken to cost what a prompt's token does; any number until that is known.
        """
        fixed, each = self._fixed_s, self._per_decode_s
        if not self._fitted:
            each = self._per_token_s
            fixed = max(0.0, self._decode_s - each * self._decodes)
        if each <= 0.0 or math.isinf(target_s):
            return sys.maxsize
        return max(least, int(max(target_s - fixed, fixed) / each))

    def _fit(self) -> None:
        """Least squares over ``seconds = fixed + a x decodes + b x prefill tokens``.

        Where all steps with prompts have few decodes and the others many, seconds do not tell a
        from b: then a row that says that a decode costs what a prompt's token does decides.
        """
        decodes, tokens, seconds = np.array(self._seen, dtype=np.float64).T
        if np.ptp(decodes) < 2:
            return  # the same streams all along: nothing to learn of what one costs
        terms = np.stack([np.ones_like(decodes), decodes, tokens], axis=1)
        if self._per_token_s:
            weight = _PRIOR * math.sqrt(len(seconds))
            terms = np.vstack([terms, [0.0, weight, 0.0]])
            seconds = np.append(seconds, weight * self._per_token_s)
        fixed, per_decode, per_token = np.linalg.lstsq(terms, seconds, rcond=None)[0]
        self._fitted = True
        # Where the machine was busy otherwise for a while, what that took is shared by no step.
        seen = len(self._seen)
        rest = seconds[:seen] - terms[:seen, 1:] @ np.array([per_decode, per_token])
        self._fixed_s = max(0.0, min(float(fixed), float(rest.min())))
        self._per_decode_s, self._fit_token_s = float(per_decode), float(per_token)

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 before anything was observed."""
        return 1.0 / self._per_token_s if self._per_token_s else 0.0


def _smooth(mean: float, seen: float) -> float:
    return mean + _WEIGHT * (seen - mean) if mean else seen

"""How long a step will take, learned from the steps before it."""

from __future__ import annotations

DECODE_TARGET_S = 0.120
"""A step in which somebody decodes should not take longer: eight tokens a second, about reading
speed. On two cores and a 135M model that is a chunk of some 40 prompt tokens."""
PREFILL_TARGET_S = 0.250
"""A step without decodes: the longest a cancel or a newcomer has to wait."""
_WEIGHT = 0.2
"""Of the newest observation in the running mean."""


class StepCost:
    """A running estimate of ``seconds = decode + per_token x prefill tokens``.

    Chunks are cut with it so that a long prompt neither starves the streams beside it nor delays
    a cancel. Seconds come from the backend, so a simulated one makes the same plans every time.
    """

    def __init__(self) -> None:
        self._decode_s = 0.0
        self._per_token_s = 0.0

    def observe(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        """Learn from a step that has retired."""
        if prefill_tokens == 0:
            self._decode_s = _smooth(self._decode_s, seconds)
            return
        rest = seconds - (self._decode_s if decodes else 0.0)
        self._per_token_s = _smooth(self._per_token_s, max(rest, 0.1 * seconds) / prefill_tokens)
        if decodes:
            # Where every step has prompts this is all there is to learn of decoding, and without
            # it one slow step would keep the chunks small for ever.
            rest = seconds - self._per_token_s * prefill_tokens
            self._decode_s = _smooth(self._decode_s, max(rest, 0.0))

    def prefill_budget(self, decodes: int, most: int, least: int) -> int:
        """Prompt tokens the next step may compute beside ``decodes`` decoding sequences.

        At most ``most``; at least ``least``, so that prompts always advance.
        """
        if self._per_token_s == 0.0:
            return min(most, 4 * least)
        target = DECODE_TARGET_S - self._decode_s if decodes else PREFILL_TARGET_S
        return min(most, max(least, int(target / self._per_token_s)))

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 before anything was observed."""
        return 1.0 / self._per_token_s if self._per_token_s else 0.0


def _smooth(mean: float, seen: float) -> float:
    return mean + _WEIGHT * (seen - mean) if mean else seen

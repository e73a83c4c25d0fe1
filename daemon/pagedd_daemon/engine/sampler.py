"""Drawing a token from logits, in NumPy, the same for every backend that has logits on the CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn, and what was asked to be known about it."""

    token: int
    logprob: float | None = None
    """Natural log of its probability under the model's own distribution."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ids with their log-probabilities, best first."""


class Sampler:
    """Placeholder for the interface; the real one follows in this file."""

"""How tokens are drawn on the device: parameters per row, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of N rows and the table of what was seen so far.

    The table lies on the device, and drawing adds to it there, so a step can be launched before
    the host has seen the tokens of the one before.
    """

    rows: Tensor
    """int32 [N]: row of ``counts`` of each row of logits; -1: it has no penalties."""
    counts: Tensor
    """int32 [C, vocab]: two for each time a token was generated, and one if it is in the prompt and
    the prompt counts (it does for the repetition penalty only)."""
    repetition: Tensor
    """float32 [N]: divides positive and multiplies negative logits of tokens seen; 1 is off."""
    presence: Tensor
    """float32 [N]: subtracted from logits of tokens generated; 0 is off."""
    frequency: Tensor
    """float32 [N]: subtracted for each time a token was generated; 0 is off."""


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How each of N rows of logits is drawn from. What is None is off for all rows.

    The order is bias, penalties, masks; then, where the temperature is above 0, top-k, typical-p,
    top-p, min-p, temperature, and the draw by inverse CDF over tokens sorted most likely first.
    """

    temperature: Tensor | None = None
    """float32 [N]; 0: the highest logit, lowest id on a tie. None: 0 for all."""
    uniform: Tensor | None = None
    """float64 [N] in [0, 1): the random number of each draw, made by the host. Needed where
    ``temperature`` is given; not looked at in rows where that is 0."""
    top_k: Tensor | None = None
    """int32 [N]; 0: all."""
    top_p: Tensor | None = None
    """float32 or float64 [N]; 1: all."""
    min_p: Tensor | None = None
    """float32 or float64 [N]; 0: all."""
    typical_p: Tensor | None = None
    """float32 or float64 [N]; 1: off."""
    penalties: Penalties | None = None
    bias: tuple[Tensor, Tensor] | None = None
    """Ids, int32 [N, B] padded with -1, each at most once in a row; and what is added to their
    logits, float32 [N, B]."""
    masked: Tensor | None = None
    """int32 [N, M] padded with -1: ids that may not be drawn."""
    allowed: tuple[Tensor, Tensor] | None = None
    """Row of the second for each of N (-1: all ids), int32 [N]; and which ids may be drawn, a bit
    each, the lowest bit of a word first, int32 [C, ceil(vocab / 32)]."""
    logprobs: int = -1
    """Most likely tokens to report per row beside the drawn one; -1: no log-probabilities."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn from N rows."""

    tokens: Tensor
    """int32 [N]; -1: the logits of this row are not numbers, or nothing in it may be drawn."""
    logprobs: Tensor | None = None
    """float32 [N]: natural log of the token's probability under the model's own distribution;
    without meaning where the token is -1."""
    top_tokens: Tensor | None = None
    """int32 [N, K]: the most likely ids, best first, lowest id first on a tie."""
    top_logprobs: Tensor | None = None
    """float32 [N, K]."""


def fill_counts(counts: Tensor, row: int, prompt: Tensor, generated: Tensor) -> None:
    """Make ``counts[row]`` what a sequence has seen: when it starts, resumes, or is rewound.

    Args:
        counts: The table of `Penalties`, int32 [C, vocab].
        row: Which row of it.
        prompt: int64 [n]: token ids of the prompt; empty where the repetition penalty is off.
        generated: int64 [m]: tokens generated so far; repeats count.
    """
    target = counts[row].zero_()
    twos = torch.full_like(generated, 2, dtype=counts.dtype)
    target.index_fill_(0, prompt, 1).index_add_(0, generated, twos)

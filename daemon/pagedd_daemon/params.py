"""What a request asks of generation, as the engine sees it (already validated by the front)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

EarlyStopping: TypeAlias = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Defaults sample from the model's own distribution.

    The order is fixed: logit bias, penalties, then (for ``temperature > 0``) top-k, typical-p,
    top-p, min-p, temperature, draw; the order llama.cpp's default chain has.
    """

    temperature: float = 1.0
    """0 is greedy: the highest logit, lowest id on a tie."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose mass is at least this; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    typical_p: float = 1.0
    """Locally typical sampling (arXiv 2202.00666); 1 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output
    (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    seed: int = 0
    """64 bits; with the sample index and the position it keys every draw."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    logprobs: int = -1
    """-1: none. k >= 0: the log-probability of the drawn token, and the k most likely ones, under
    the model's own distribution (before penalties and temperature)."""


@dataclass(frozen=True, slots=True)
class StopParams:
    """When a sample ends. Stop strings are the front's; the engine knows token ids only."""

    max_tokens: int
    """Tokens to generate at most, at least 1."""
    min_tokens: int = 0
    """No end-of-generation or stop token is drawn before this many."""
    ignore_eos: bool = False
    """Go on after the model's end-of-generation tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the sample, like the end-of-generation ones."""


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How beams are searched; the definitions are those of Hugging Face transformers 5."""

    width: int
    """Beams that are followed at the same time, at least 1."""
    length_penalty: float = 1.0
    """A text's score is the sum of its tokens' log-probabilities, that of the token which ended it
    included, divided by their number to the power of this."""
    early_stopping: EarlyStopping = False
    """When the search is over, once ``width`` texts have ended: True: at once. False: when the best
    running beam, scored at its present length, is not above the worst of them. ``"never"``: the
    same, but for a positive penalty scored as if it went on to ``max_tokens`` at no further cost:
    then nothing can be found that is better."""

"""What a request asks of generation, as the engine sees it (already validated by the front)."""

from __future__ import annotations

from dataclasses import dataclass, field


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

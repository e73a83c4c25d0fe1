"""What the client hands out: frozen records without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely one generated token was under the model's own distribution."""

    token: int
    logprob: float
    """Natural logarithm of the probability."""
    top: tuple[tuple[int, float], ...]
    """The most likely ids with their log-probabilities, best first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text and tokens of one sample.

    Text is always whole characters. Tokens may run ahead of it: bytes that may be part of a
    character or of a stop string are held back and come with a later chunk.
    """

    index: int
    """Which sample, counted from 0."""
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per token if ``logprobs`` was asked for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished sample of a request."""

    index: int
    text: str
    tokens: tuple[int, ...]
    reason: str
    """``stop``, ``length``, ``context`` or ``cancelled``."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    """With ``beam_width``: the sum of the log-probabilities by the length penalty. With ``best_of``
    above ``n``: their mean."""
    stop: str | None = None
    """The stop string that ended it, if one did."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt as the model got it; with ``echo`` or ``prompt_logprobs``."""

    text: str
    """With ``echo``."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One entry per token, None for the first, which nothing is before; with ``prompt_logprobs``,
    or ``echo`` and ``logprobs``."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt tokens, those whose KV was found and not computed."""
    generated_tokens: int
    """Over all samples."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds, as the daemon saw them."""

    queue_ms: float
    prompt_ms: float
    generation_ms: float
    ttft_ms: float
    """From the arrival of the request to its first token."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request."""

    text: str
    """Of the first sample."""
    samples: tuple[Sample, ...]
    usage: Usage
    timings: Timings
    model: str
    seed: int
    """Draws the same tokens again with the same prompt and options."""
    prompt: Prompt | None = None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the daemon said when the connection was opened."""

    version: str
    pid: int
    limits: Mapping[str, int]
    """docs/protocol.md, section 7."""
    model: Mapping[str, Any] | None
    """The model that serves, as in `Client.models`; None: none is loaded."""
    notice: str | None
    """Text to show to the user: for example, that the GPU could not be used."""


@dataclass(frozen=True, slots=True)
class SessionKV:
    """What is kept of a session's keys and values while nobody speaks."""

    pinned: bool
    tokens: int
    """Of its history."""
    max_tokens: int | None
    """Of all pinned sessions of the daemon together; None while no model is loaded."""


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A closed session."""

    turns: int
    rewrites: int
    """Turns in which the chat template rewrote earlier text, so that it had to be tokenised and
    computed again."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model's chat template writes it, up to where the reply begins."""

    model: str
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts."""

    vectors: list[list[float]]
    """One for each text, in order, as long as the model's hidden state is wide."""
    prompt_tokens: int
    """Of all texts."""
    model: str

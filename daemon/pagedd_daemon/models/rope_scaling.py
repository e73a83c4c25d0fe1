"""The ways to stretch rotary embeddings, each as divisors of the frequencies (`config.Rope`)."""

from __future__ import annotations

import math
from itertools import repeat

from pagedd_daemon.models.config import Rope
from pagedd_daemon.models.fields import Fields


def rope_of(
    fields: Fields, base: float, dims: int, context_tokens: int, original_context: int | None
) -> Rope:
    """A rope from ``rope_parameters`` (or, before transformers 5, ``rope_scaling``).

    Args:
        fields: That map; empty for a plain rope.
        base: ``rope_theta``.
        dims: Elements of a head that are rotated.
        context_tokens: ``max_position_embeddings``.
        original_context: ``original_max_position_embeddings`` of the model, where it says one.

    Raises:
        ModelFileError: A figure is missing or impossible, or the kind is unknown.
    """
    kind = fields.text("rope_type", fields.text("type", "default"))
    original = original_context or fields.integer(
        "original_max_position_embeddings", context_tokens
    )
    if base <= 1 or original < 2:
        fields.refuse(f"has rotary embeddings of base {base} for {original} tokens", "rope_theta")
    if kind == "linear":
        return Rope(base, dims, tuple(repeat(fields.positive("factor"), dims // 2)))
    if kind == "llama3":
        return Rope(base, dims, _llama3(fields, base, dims, original))
    if kind == "yarn":
        return _yarn(fields, base, dims, context_tokens, original)
    if kind in ("longrope", "su"):
        return _longrope(fields, base, dims, context_tokens, original)
    if kind != "default":
        fields.refuse(
            f"asks for rotary embeddings of kind {kind!r}, which are not known here", "rope_type"
        )
    return Rope(base, dims)


def _llama3(fields: Fields, base: float, dims: int, original: int) -> tuple[float, ...]:
    """Llama 3.1's: long waves are stretched, short ones kept, those between interpolated."""
    factor = fields.positive("factor")
    low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
    if low >= high:
        fields.refuse(f"has low_freq_factor {low} and high_freq_factor {high}", "low_freq_factor")
    divisors = []
    for frequency in Rope(base, dims).frequencies(0):
        turns = original * frequency / (2 * math.pi)
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(factor)
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def _yarn(fields: Fields, base: float, dims: int, context: int, original: int) -> Rope:
    """YaRN, arXiv 2309.00071, section 3: a ramp from plain to interpolated frequencies."""
    factor = fields.positive("factor", context / original)
    fast, slow = fields.positive("beta_fast", 32.0), fields.positive("beta_slow", 1.0)

    def pair_of(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(fast), pair_of(slow)
    if fields.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001
    divisors = []
    for pair in range(dims // 2):
        interpolated = min(max((pair - first) / (last - first), 0.0), 1.0)
        divisors.append(1 / (interpolated / factor + (1 - interpolated)))
    return Rope(base, dims, tuple(divisors), magnitude=_yarn_magnitude(fields, factor))


def _yarn_magnitude(fields: Fields, factor: float) -> float:
    given = fields.optional_positive("attention_factor")
    if given is not None:
        return given

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = fields.optional_positive("mscale"), fields.optional_positive("mscale_all_dim")
    if one and all_dims:
        return magnitude(one) / magnitude(all_dims)
    return magnitude(1.0)


def _longrope(fields: Fields, base: float, dims: int, context: int, original: int) -> Rope:
    """LongRoPE, arXiv 2402.13753, as Phi-3 uses it: searched divisors, two sets of them."""
    return Rope(
        base,
        dims,
        fields.numbers("short_factor", dims // 2),
        fields.numbers("long_factor", dims // 2),
        original,
        fields.optional_positive("attention_factor")
        or longrope_magnitude(fields.positive("factor", context / original), original),
    )


def longrope_magnitude(factor: float, original: int) -> float:
    """LongRoPE's factor on cosine and sine for a context that was stretched by ``factor``."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

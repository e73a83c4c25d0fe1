"""What a decoder is, in figures: everything the engine must know of a model but its weights.

Pure Python, so that the front and the helpers can read it too. `families` makes one from Hugging
Face's ``config.json``, `gguf_config` from the metadata of a GGUF file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pagedd_daemon.models.errors import ModelTooLargeError

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), NeoX halves.

    Every scaling in use comes down to one divisor per frequency and one factor on cosine and sine,
    so that is all that is kept; `rope_scaling` works them out.
    """

    base: float
    dims: int
    """Elements of a head that are rotated, from the first; even."""
    divisors: tuple[float, ...] = ()
    """One per pair of elements; empty for 1."""
    long_divisors: tuple[float, ...] = ()
    """LongRoPE: those for contexts longer than ``original_context``; empty for the same."""
    original_context: int = 0
    """Tokens; see ``long_divisors``."""
    magnitude: float = 1.0
    """Factor on cosine and sine."""

    def frequencies(self, context_tokens: int) -> list[float]:
        """Radians per position of each pair, ``dims / 2`` of them.

        Args:
            context_tokens: The longest sequence that will be served. LongRoPE chooses by it, once
                for all sequences: keys that were written with one set of frequencies cannot be read
                with another, so a sequence must not change sets as it grows.
        """
        divisors = self.divisors
        if self.long_divisors and context_tokens > self.original_context:
            divisors = self.long_divisors
        plain = (self.base ** (-2 * i / self.dims) for i in range(self.dims // 2))
        if not divisors:
            return list(plain)
        return [f / divisor for f, divisor in zip(plain, divisors, strict=True)]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How one layer attends."""

    rope: Rope
    window: int = 0
    """Tokens a token attends to at most, itself included; 0 for all."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama lineage: RMSNorm, RoPE, grouped queries, gated MLP."""

    architecture: str
    """As the file names it: ``LlamaForCausalLM``, or ``llama`` in a GGUF file."""
    vocab_size: int
    """Rows of the embedding; a tokeniser may know fewer."""
    width: int
    """Elements of the residual stream."""
    hidden_width: int
    """Elements between the two halves of the MLP."""
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    """The longest sequence the model was made for."""
    norm_eps: float
    attention: tuple[LayerAttention, ...]
    """One per layer."""
    attention_scale: float
    """Factor on query times key."""
    activation: Activation = "silu"
    tied_head: bool = False
    """The output head is the embedding."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys before they are rotated."""
    post_norms: bool = False
    """Attention and MLP are normalised once more before they join the residual stream."""
    embed_scale: float = 1.0
    attention_soft_cap: float = 0.0
    """Scores are squeezed into ± this by tanh; 0 for not at all."""
    logit_soft_cap: float = 0.0
    eog_tokens: frozenset[int] = frozenset()
    """Ids that end a generation, as far as the model's files name them."""

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.attention)

    @property
    def qkv_rows(self) -> int:
        """Rows of the merged product of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def parameters(self) -> int:
        """Weights in all, a tied head counted once."""
        attention = (self.qkv_rows + self.heads * self.head_dim) * self.width
        norms = (4 if self.post_norms else 2) * self.width
        norms += 2 * self.head_dim if self.qk_norm else 0
        bias = self.qkv_rows if self.qkv_bias else 0
        layer = attention + 3 * self.width * self.hidden_width + norms + bias
        matrices = 1 if self.tied_head else 2
        return self.layers * layer + matrices * self.vocab_size * self.width + self.width

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * dtype_bytes

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes the weights take on the device, the rotary tables not counted."""
        return self.parameters() * dtype_bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes, in bytes."""

    weights: int
    kv_per_1000_tokens: int


def fits(
    config: ModelConfig, *, dtype_bytes: int, free_bytes: int, tokens: int, reserve_bytes: int = 0
) -> Footprint:
    """What a model takes, if that is there.

    Args:
        config: The model.
        dtype_bytes: Of one weight and of one element of KV.
        free_bytes: Of the device, before anything of the model is on it.
        tokens: KV must fit for so many at least.
        reserve_bytes: For everything else: workspaces, activations, graphs.

    Raises:
        ModelTooLargeError: It is not there; with all the figures.
    """
    weights = config.weight_bytes(dtype_bytes)
    per_token = config.kv_bytes_per_token(dtype_bytes)
    needed = weights + per_token * tokens + reserve_bytes
    if needed > free_bytes:
        raise ModelTooLargeError(
            f"the model does not fit: its weights take {_size(weights)}, KV takes "
            f"{_size(per_token * 1000)} per 1,000 tokens, and {_size(free_bytes)} are free",
            {
                "weights_bytes": weights,
                "kv_bytes_per_1000_tokens": per_token * 1000,
                "free_bytes": free_bytes,
                "needed_bytes": needed,
                "tokens": tokens,
            },
        )
    return Footprint(weights, per_token * 1000)


def uniform_attention(rope: Rope, windows: Sequence[int]) -> tuple[LayerAttention, ...]:
    """One rope for all layers, and the window of each."""
    return tuple(LayerAttention(rope, window) for window in windows)


def _size(count: int) -> str:
    if count >= 10**8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB"

"""What one step of the model works on, as device tensors, and the shape attention has."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class StepBatch:
    """T input tokens of S sequences; every row of T belongs to a sequence.

    Padding (of a CUDA graph's bucket) is made of sequences with ``context_lens`` 0: their tokens
    write to the padding block, and attention gives them zeros. Where ``max_query`` is 1, T equals
    S and row i is the one token of sequence i, padding included.
    """

    tokens: Tensor
    """int32 [T]: token ids."""
    positions: Tensor
    """int32 [T]: position of each token in its sequence, from 0."""
    slots: Tensor
    """int64 [T]: where K and V of each token go: arena block * block_tokens + offset."""
    block_tables: Tensor
    """int32 [S, W]: arena blocks of each sequence, padded with 0, the padding block."""
    query_starts: Tensor
    """int32 [S + 1]: first row of T of each sequence, ascending; the last is T."""
    context_lens: Tensor
    """int32 [S]: tokens in the pool once this step's are written; 0 for padding."""
    logit_rows: Tensor
    """int64 [N]: rows of T whose logits are wanted; a row may be named more than once."""
    max_query: int
    """Upper bound of the tokens of one sequence; 1: every sequence decodes."""
    max_context: int
    """Upper bound of ``context_lens``. Launch plans use it; lengths are never read back."""
    divisions: dict[tuple[int, ...], tuple[int, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What the kernels of one layer worked out and those of the layers above need again."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.block_tables.shape[0]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of one layer."""

    heads: int
    """Query heads, a multiple of ``kv_heads``."""
    kv_heads: int
    head_dim: int
    """Any multiple of 16 up to 256."""
    block_tokens: int
    """Tokens per block of the pool."""
    scale: float
    """Scores are multiplied with it."""
    window: int = 0
    """Tokens a query sees, itself included; 0: all before it."""
    soft_cap: float = 0.0
    """Scores become ``soft_cap * tanh(score / soft_cap)``; 0: they stay."""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

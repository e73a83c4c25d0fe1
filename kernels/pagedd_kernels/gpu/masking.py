"""What a grammar lets follow, as a bit per token, over rows of logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Logits per program."""


@triton.jit(do_not_specialize=["vocab", "width"], do_not_specialize_on_alignment=["rows", "words"])
def _allow(logits, rows, words, vocab, width, CHUNK: tl.constexpr):
    """Make the logits of tokens whose bit is 0 -inf."""
    row = tl.program_id(0)
    table = tl.load(rows + row)
    if table >= 0:
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        there = ids < vocab
        word = tl.load(words + table.to(tl.int64) * width + (ids >> 5), mask=there, other=0)
        hidden = ((word >> (ids & 31)) & 1) == 0
        at = logits + row.to(tl.int64) * vocab + ids
        tl.store(at, tl.full([CHUNK], float("-inf"), tl.float32), mask=there & hidden)


def allow(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Apply `SampleParams.allowed` in place.

    Args:
        logits: float32 [N, vocab], contiguous.
        rows: int32 [N].
        words: int32 [C, ceil(vocab / 32)].
    """
    count, vocab = logits.shape
    grid = (count, triton.cdiv(vocab, CHUNK))
    _allow[grid](logits, rows, words, vocab, words.shape[1], CHUNK=CHUNK, num_warps=4)

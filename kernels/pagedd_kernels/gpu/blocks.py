"""Copies of whole blocks within the pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 4096


@triton.jit(do_not_specialize_on_alignment=["src", "dst"])
def _copy_blocks(kv, src, dst, words, BLOCK: tl.constexpr):
    source = tl.load(src + tl.program_id(0)) * words
    target = tl.load(dst + tl.program_id(0)) * words
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < words
    tl.store(kv + target + at, tl.load(kv + source + at, mask=there), mask=there)


def copy_blocks(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """`pagedd_kernels.copy_blocks`."""
    bits = kv.view(torch.int32)
    words = bits.stride(0)
    _copy_blocks[(src.shape[0], triton.cdiv(words, _WORDS))](
        bits, src, dst, words, BLOCK=_WORDS, num_warps=4
    )

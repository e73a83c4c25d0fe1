"""Triton kernels of `pagedd_kernels.inputs`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements a program writes: one pass of 4 warps with 16-byte stores, twice over."""


@triton.jit(do_not_specialize=["count"])
def _resolve(tokens, sources, drawn, out, count, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    source = tl.load(sources + at, mask=inside, other=-1)
    token = tl.load(tokens + at, mask=inside, other=0)
    late = tl.load(drawn + source, mask=source >= 0, other=0)
    tl.store(out + at, tl.where(source >= 0, tl.maximum(late, 0), token), mask=inside)


@triton.jit(do_not_specialize=["width"])
def _unpack(flat, starts, tables, width, block: tl.constexpr):
    row = tl.program_id(0)
    begin = tl.load(starts + row)
    count = tl.load(starts + row + 1) - begin
    at = tl.program_id(1) * block + tl.arange(0, block)
    blocks = tl.load(flat + begin + at, mask=at < count, other=0)
    tl.store(tables + row.to(tl.int64) * width + at, blocks, mask=at < width)


def launch_resolve(tokens: Tensor, sources: Tensor, drawn: Tensor) -> Tensor:
    """See `pagedd_kernels.inputs.resolve_tokens`."""
    out = torch.empty_like(tokens)
    count = tokens.shape[0]
    _resolve[(triton.cdiv(count, _BLOCK),)](tokens, sources, drawn, out, count, _BLOCK)
    return out


def launch_unpack(flat: Tensor, starts: Tensor, tables: Tensor) -> Tensor:
    """See `pagedd_kernels.inputs.unpack_tables`."""
    rows, width = tables.shape
    grid = (rows, triton.cdiv(width, _BLOCK))
    _unpack[grid](flat, starts, tables, width, _BLOCK)
    return tables

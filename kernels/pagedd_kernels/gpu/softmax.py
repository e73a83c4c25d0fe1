"""Pieces that both attention kernels are made of: addresses, scores, the running softmax, merging.

Scores are kept times log2(e), since a device has exp2 and not exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.plans import power_of_two


@triton.jit
def locate(
    tables,
    row,
    keys,
    inside,
    width,
    stride_block,
    stride_token,
    BLOCK_TOKENS: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """Offsets of ``keys`` of sequence ``row`` in the pool, int64 before anything is multiplied.

    ``AFFINE`` computes the block instead of reading it, as if each sequence were contiguous: what
    the benchmark compares a paged pool with.
    """
    page = keys // BLOCK_TOKENS
    if AFFINE:
        block = (1 + row * width + page).to(tl.int64)
    else:
        at = tables + row.to(tl.int64) * width + page
        block = tl.load(at, mask=inside, other=0).to(tl.int64)
    return block * stride_block + (keys % BLOCK_TOKENS) * stride_token


@triton.jit
def scores_of(q, k, scale, soft_cap, CAPPED: tl.constexpr):
    """Scores [rows, keys] times log2(e)."""
    scores = tl.dot(q, k, input_precision="ieee")
    if CAPPED:
        # tanh(|x|) = (1 - exp(-2|x|)) / (1 + exp(-2|x|)), which never overflows.
        small = tl.exp2(tl.abs(scores) * (-2.0 * scale / soft_cap * 1.4426950408889634))
        bent = (soft_cap * 1.4426950408889634) * (1.0 - small) / (1.0 + small)
        scores = tl.where(scores < 0, -bent, bent)
    else:
        scores = scores * (scale * 1.4426950408889634)
    return scores


@triton.jit
def take_in(acc, peak, total, scores, v, GUARDED: tl.constexpr):
    """The running softmax after one more tile of keys.

    ``GUARDED``: a row may have seen no key yet, so its peak may be -inf, and inf - inf is NaN.
    """
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher) if GUARDED else higher
    p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit(
    do_not_specialize=["splits"], do_not_specialize_on_alignment=["peaks", "totals", "starts"]
)
def _merge(
    parts,
    peaks,
    totals,
    used,
    out,
    starts,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """Merge the parts of one row and head; rows of one part were finished by the kernel itself."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    at = row.to(tl.int64) * HEADS + head
    count = tl.load(used + at)
    if count > 1:
        part = tl.arange(0, SPLITS)
        there = part < count
        peak = tl.load(peaks + at * splits + part, mask=there, other=float("-inf"))
        total = tl.load(totals + at * splits + part, mask=there, other=0.0)
        highest = tl.max(peak, 0)
        weight = tl.exp2(peak - highest)
        dims = tl.arange(0, PAD)
        values = tl.load(
            parts + (at * splits + part[:, None]) * DIM + dims[None, :],
            mask=there[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        merged = tl.sum(values * weight[:, None], 0) / tl.sum(total * weight, 0)
        target = (tl.load(starts + row).to(tl.int64) if MAPPED else row.to(tl.int64)) * HEADS + head
        tl.store(out + target * DIM + dims, merged.to(out.dtype.element_ty), mask=dims < DIM)


class Parts:
    """Room for what the splits of each row and head found, merged afterwards.

    With one split nothing is allocated, and the kernel is given pointers that it does not use.
    """

    __slots__ = ("heads", "out", "peaks", "splits", "totals", "used", "values")

    def __init__(self, out: Tensor, rows: int, heads: int, dim: int, splits: int) -> None:
        self.out, self.heads, self.splits = out, heads, splits
        if splits == 1:
            self.values = self.peaks = self.totals = self.used = out
            return
        floats = torch.empty(rows * heads * splits * (dim + 2), device=out.device)
        parts, self.peaks, self.totals = floats.split(
            [rows * heads * splits * dim, rows * heads * splits, rows * heads * splits]
        )
        self.values = parts
        self.used = torch.empty(rows, heads, dtype=torch.int32, device=out.device)

    def merge(self, starts: Tensor | None) -> None:
        """Finish the rows of ``out`` that took several splits.

        Args:
            starts: Row of ``out`` of each row here, or None where they are the same.
        """
        if self.splits == 1:
            return
        dim = self.out.shape[-1]
        _merge[self.used.shape](
            self.values,
            self.peaks,
            self.totals,
            self.used,
            self.out,
            self.out if starts is None else starts,
            self.splits,
            HEADS=self.heads,
            DIM=dim,
            PAD=power_of_two(dim),
            SPLITS=power_of_two(self.splits),
            MAPPED=starts is not None,
            num_warps=4,
        )

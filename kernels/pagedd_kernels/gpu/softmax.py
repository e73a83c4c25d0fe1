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
def blocks_of(
    tables, row, keys, inside, width, BLOCK_TOKENS: tl.constexpr, AFFINE: tl.constexpr
):  # fmt: skip
    """The blocks in which ``keys`` of sequence ``row`` lie.

    Loops ask for those of the next tile before they use those of this one: else the load of K
    waits for the table, which cost prefill a quarter of its time.

    ``AFFINE`` computes the block instead of reading it, as if each sequence were contiguous: what
    the benchmark compares a paged pool with.
    """
    page = keys // BLOCK_TOKENS
    if AFFINE:
        return (1 + row * width + page).to(tl.int32)
    return tl.load(tables + row.to(tl.int64) * width + page, mask=inside, other=0)


@triton.jit
def offsets_of(blocks, keys, stride_block, stride_token, BLOCK_TOKENS: tl.constexpr):
    """Offsets of ``keys`` in the pool, int64 before anything is multiplied."""
    return blocks.to(tl.int64) * stride_block + (keys % BLOCK_TOKENS) * stride_token


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
    do_not_specialize=["splits"],
    do_not_specialize_on_alignment=["values", "peaks", "totals", "used", "starts"],
)
def _merge(
    values,
    peaks,
    totals,
    used,
    out,
    starts,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    ITEMS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """Merge the parts of one row and head; rows of one part were finished by the kernel itself.

    With ``ITEMS`` the parts are numbered over all rows, and ``used`` holds count and first of each
    row; else each row and head has room for ``splits`` of its own, and ``used`` its count.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    target = row
    wanted = True
    if MAPPED:
        first = tl.load(starts + row)
        target = first.to(tl.int64)
        wanted = tl.load(starts + row + 1) - first == 1
    if ITEMS:
        count = tl.load(used + 2 * row)
        base = tl.load(used + 2 * row + 1).to(tl.int64) * HEADS + head
    else:
        count = tl.load(used + row * HEADS + head)
        base = (row * HEADS + head) * splits
    if wanted & (count > 1):
        dims = tl.arange(0, PAD)
        acc = tl.zeros([PAD], tl.float32)
        highest = tl.full([1], float("-inf"), tl.float32)
        whole = tl.zeros([1], tl.float32)
        for begin in range(0, count, 32):
            part = begin + tl.arange(0, 32)
            there = part < count
            at = base + part * (HEADS if ITEMS else 1)
            peak = tl.load(peaks + at, mask=there, other=float("-inf"))
            total = tl.load(totals + at, mask=there, other=0.0)
            inside = there[:, None] & (dims < DIM)[None, :]
            value = tl.load(values + at[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
            higher = tl.maximum(highest, tl.max(peak, 0))
            # A row of a tile may have seen no key in its first parts.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(peak - level)
            fade = tl.exp2(highest - level)
            acc = acc * fade + tl.sum(value * weight[:, None], 0)
            whole = whole * fade + tl.sum(total * weight, 0)
            highest = higher
        acc = acc / whole
        at = out + (target * HEADS + head) * DIM + dims
        tl.store(at, acc.to(out.dtype.element_ty), mask=dims < DIM)


class Parts:
    """Room for what the parts of rows and heads found, to be merged afterwards."""

    __slots__ = ("heads", "items", "out", "peaks", "rows", "splits", "totals", "used", "values")

    def __init__(
        self, out: Tensor, rows: int, heads: int, splits: int, items: int | None = None
    ) -> None:
        """Room for ``splits`` parts of each row, or for ``items`` of all rows together."""
        dim = out.shape[-1]
        self.out, self.rows, self.heads, self.splits, self.items = out, rows, heads, splits, items
        places = heads * (rows * splits if items is None else items)
        self.values = torch.empty(places, dim, dtype=torch.float32, device=out.device)
        self.peaks = torch.empty(places, dtype=torch.float32, device=out.device)
        self.totals = torch.empty(places, dtype=torch.float32, device=out.device)
        if items is None:
            # Rows of padding belong to no sequence: nobody writes how many parts they have.
            self.used = torch.zeros(rows, heads, dtype=torch.int32, device=out.device)
        else:
            self.used = torch.empty(rows, 2, dtype=torch.int32, device=out.device)

    def merge(self, starts: Tensor | None) -> None:
        """Finish the rows of ``out`` that took several parts.

        Args:
            starts: Where the rows of ``out`` begin that belong to each row here, of which only
                those with one are merged; or None where they are the same.
        """
        dim = self.out.shape[-1]
        _merge[(self.rows, self.heads)](
            self.values,
            self.peaks,
            self.totals,
            self.used,
            self.out,
            self.used if starts is None else starts,
            self.splits,
            HEADS=self.heads,
            DIM=dim,
            PAD=power_of_two(dim),
            ITEMS=self.items is not None,
            MAPPED=starts is not None,
            num_warps=4,
        )

"""Pieces of the attention kernels: addresses, scores, the running softmax, merging."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.gpu.device import begin, overlap
from pagedd_kernels.plans import power_of_two


@triton.jit
def blocks_of(
    tables, row, start, hi, width,
    PAGES: tl.constexpr, PAGE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """The blocks of the ``PAGES`` pages of ``PAGE`` keys from ``start`` on, of sequence ``row``.

    A page lies in one block, so there is one entry of the table per page and not per key: an entry
    per key cost prefill a sixth of its time. Loops ask for those of the next tile before they use
    those of this one: else the load of K waits for the table, which cost it a quarter.

    ``AFFINE`` computes the block instead of reading it, as if each sequence were contiguous: what
    the benchmark compares a paged pool with.
    """
    keys = start + tl.arange(0, PAGES) * PAGE
    block = keys // BLOCK_TOKENS
    if AFFINE:
        return (1 + row * width + block).to(tl.int32)
    return tl.load(tables + row.to(tl.int64) * width + block, mask=keys < hi, other=0)


@triton.jit
def offsets_of(
    blocks, start, stride_block, stride_token,
    PAGES: tl.constexpr, PAGE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Offsets [pages, keys, dims] of a tile in the pool, int64 before anything is multiplied."""
    first = blocks.to(tl.int64) * stride_block
    if PAGE != BLOCK_TOKENS:
        first += (start + tl.arange(0, PAGES) * PAGE) % BLOCK_TOKENS * stride_token
    keys = tl.arange(0, PAGE)[:, None] * stride_token + tl.arange(0, PAD)[None, :]
    return first[:, None, None] + keys[None, :, :]


@triton.jit
def keys_inside(start, lo, hi, PAGES: tl.constexpr, PAGE: tl.constexpr):
    """Which keys [pages, keys, 1] of the tile at ``start`` lie from ``lo`` to ``hi``."""
    pages, keys = tl.arange(0, PAGES) * PAGE, tl.arange(0, PAGE)
    key = start + pages[:, None] + keys[None, :]
    return ((key >= lo) & (key < hi))[:, :, None]


@triton.jit
def scores_of(q, k, scale, soft_cap, CAPPED: tl.constexpr):
    """Scores [rows, keys], which are yet to be multiplied with `factor_of`."""
    scores = tl.dot(q, k, input_precision="ieee")
    if CAPPED:
        # tanh(|x|) = (1 - exp(-2|x|)) / (1 + exp(-2|x|)), which never overflows.
        small = tl.exp2(tl.abs(scores) * (-2.0 * scale / soft_cap * 1.4426950408889634))
        bent = soft_cap * (1.0 - small) / (1.0 + small)
        scores = tl.where(scores < 0, -bent, bent)
    return scores


@triton.jit
def factor_of(scale, CAPPED: tl.constexpr):
    """From what `scores_of` gives to scores times log2(e): a device has exp2 and not exp. Kept
    apart, it and the subtraction of the peak are one instruction."""
    return 1.4426950408889634 if CAPPED else scale * 1.4426950408889634


@triton.jit
def take_in(acc, peak, total, scores, factor, v, GUARDED: tl.constexpr):
    """The running softmax after one more tile of keys; the peak is one of ``scores``.

    ``GUARDED``: a row may have seen no key yet, so its peak may be -inf, and inf - inf is NaN.
    """
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = higher * factor
    if GUARDED:
        base = tl.where(higher == float("-inf"), 0.0, base)
    p = tl.exp2(scores * factor - base[:, None])
    fade = tl.exp2(peak * factor - base)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit(
    do_not_specialize=["splits"],
    do_not_specialize_on_alignment=["values", "peaks", "totals", "used"],
)
def _merge(
    values,
    peaks,
    totals,
    used,
    out,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merge the parts of one row and head; rows of one part were finished by the kernel itself."""
    begin(EARLY)
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    count = tl.load(used + place)
    if count > 1:
        dims = tl.arange(0, PAD)
        acc = tl.zeros([PAD], tl.float32)
        highest = tl.full([1], float("-inf"), tl.float32)
        whole = tl.zeros([1], tl.float32)
        for first in range(0, count, 32):
            part = first + tl.arange(0, 32)
            there = part < count
            at = place * splits + part
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
        at = out + place * DIM + dims
        tl.store(at, acc.to(out.dtype.element_ty), mask=dims < DIM)


class Parts:
    """Room for what the parts of rows and heads found, to be merged afterwards."""

    __slots__ = ("heads", "out", "peaks", "rows", "splits", "totals", "used", "values")

    def __init__(self, out: Tensor, rows: int, heads: int, splits: int) -> None:
        """Room for ``splits`` parts of each row."""
        dim, device = out.shape[-1], out.device
        self.out, self.rows, self.heads, self.splits = out, rows, heads, splits
        places = heads * rows * splits
        self.values = torch.empty(places, dim, dtype=torch.float32, device=device)
        self.peaks, self.totals = torch.empty(2, places, dtype=torch.float32, device=device)
        # Rows of padding belong to no sequence: nobody writes how many parts they have.
        self.used = torch.zeros(rows, heads, dtype=torch.int32, device=device)

    def merge(self) -> None:
        """Finish the rows of ``out`` that took several parts."""
        dim = self.out.shape[-1]
        _merge[(self.rows, self.heads)](
            self.values,
            self.peaks,
            self.totals,
            self.used,
            self.out,
            self.splits,
            HEADS=self.heads,
            DIM=dim,
            PAD=power_of_two(dim),
            num_warps=4,
            **overlap(self.out.device),
        )

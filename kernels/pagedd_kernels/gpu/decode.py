"""Attention of one token per sequence: split-KV, the query heads of a KV head in one tile."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.gpu.device import begin, let_next, multiprocessors, overlap
from pagedd_kernels.gpu.division import FIELDS, division
from pagedd_kernels.gpu.softmax import blocks_of, factor_of, scores_of, take_in
from pagedd_kernels.plans import ROWS, DecodePlan, decode_plan, power_of_two

# The width changes with what is served. Metadata lies wherever the runner packs it: neither may
# lead to another compilation in traffic.
_CHANGING = ["layer", "width", "fresh"]
_METADATA = ["work", "tables", "values", "peaks", "totals", "counters"]
_FIELDS = tl.constexpr(FIELDS)
_COUNTERS = 1 << 16
_MERGED_AT_ONCE, _MERGED_BY_FEW = 4096, 16384
"""Numbers of parts that a program has in flight while it merges: 32 registers of each thread, or
128. With 64 already fewer programs shared a multiprocessor, and 64 sequences of 1,024 tokens took
82 us instead of 66; where two of them share one anyway, the parts of a long sequence are merged in
one go."""


@triton.jit
def _merged(
    values, peaks, totals, first, count, kv_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What ``count`` parts from ``first`` on found together, [query heads, dims].

    In the order of the parts, whoever merges them. Read past the first-level cache, which may hold
    what was there before another multiprocessor wrote.
    """
    heads, dims = tl.arange(0, SPAN), tl.arange(0, PAD)
    acc = tl.zeros([SPAN, PAD], tl.float32)
    highest = tl.full([SPAN], float("-inf"), tl.float32)
    whole = tl.zeros([SPAN], tl.float32)
    for begun in range(0, count, AT_ONCE):
        part = begun + tl.arange(0, AT_ONCE)
        there = (part < count)[:, None] & (heads < GROUP)[None, :]
        place = (first + part).to(tl.int64)[:, None] * HEADS + kv_head * GROUP + heads[None, :]
        at = place[:, :, None] * DIM + dims[None, None, :]
        inside = there[:, :, None] & (dims < DIM)[None, None, :]
        value = tl.load(values + at, mask=inside, other=0.0, cache_modifier=".cg")
        peak = tl.load(peaks + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(totals + place, mask=there, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(highest, tl.max(peak, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(peak - level[None, :])
        fade = tl.exp2(highest - level)
        acc = acc * fade[:, None] + tl.sum(value * weight[:, :, None], 0)
        whole = whole * fade + tl.sum(total * weight, 0)
        highest = higher
    return acc / tl.where(whole == 0.0, 1.0, whole)[:, None]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_METADATA)
def _decode(
    q,
    kv,
    out,
    values,
    peaks,
    totals,
    counters,
    work,
    tables,
    layer,
    width,
    fresh,
    stride_block,
    stride_layer,
    stride_kv,
    stride_token,
    stride_head,
    scale,
    soft_cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    RECORD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    AFFINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    if fresh:
        begin(EARLY)
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    record = work + item * RECORD
    seq = tl.load(record)
    row = tl.load(record + 1).to(tl.int64)
    lo = tl.load(record + 2)
    hi = tl.load(record + 3)
    count = tl.load(record + 4)
    first = tl.load(record + 5)
    # Key by key, unlike prompts: as a tile of pages V would go through registers, since this
    # product is too narrow for a tile in shared memory to be looked at in another shape.
    if AFFINE:
        blocks = blocks_of(tables, seq, lo, hi, width, TILE, 1, BLOCK_TOKENS, AFFINE)
    else:
        # Only a window may begin inside a block.
        begun = lo % BLOCK_TOKENS if WINDOWED else 0
        blocks = tl.load(record + _FIELDS + (begun + tl.arange(0, TILE)) // BLOCK_TOKENS)
    # A kernel is launched early when all programs of the one before it are past their own `begin`.
    # So whatever was written two launches ago is there, and so is the division in all layers but
    # the one that makes it: its latency passes while the kernel before this one ends.
    begin(EARLY)
    if count > 0:
        heads = tl.arange(0, ROWS)
        dims = tl.arange(0, PAD)
        valid = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
        at = (kv_head * GROUP + heads)[:, None] * DIM + dims[None, :]
        query = tl.load(q + row * (HEADS * DIM) + at, mask=valid, other=0.0)
        acc = tl.zeros([ROWS, PAD], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        base = kv + layer.to(tl.int64) * stride_layer + kv_head * stride_head
        factor = factor_of(scale, CAPPED)
        for start in range(lo, hi, TILE):
            keys = start + tl.arange(0, TILE)
            inside = keys < hi
            offsets = blocks.to(tl.int64) * stride_block + keys % BLOCK_TOKENS * stride_token
            blocks = blocks_of(tables, seq, start + TILE, hi, width, TILE, 1, BLOCK_TOKENS, AFFINE)
            tile = inside[:, None] & (dims < DIM)[None, :]
            k_at = base + offsets[:, None] + dims[None, :]
            # Slots beyond the end may hold NaN, and 0 * NaN is NaN: V is masked like K.
            k = tl.load(k_at, mask=tile, other=0.0)
            scores = scores_of(query, tl.trans(k), scale, soft_cap, CAPPED)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            v = tl.load(k_at + stride_kv, mask=tile, other=0.0)
            acc, peak, total = take_in(acc, peak, total, scores, factor, v, False)
        let_next(EARLY)
        if count == 1:
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + row * (HEADS * DIM) + at, acc.to(out.dtype.element_ty), mask=valid)
        else:
            place = item.to(tl.int64) * HEADS + kv_head * GROUP + heads
            tl.store(peaks + place, peak * factor, mask=heads < GROUP)
            tl.store(totals + place, total, mask=heads < GROUP)
            tl.store(values + place[:, None] * DIM + dims[None, :], acc, mask=valid)
            # All threads have stored before one of them says so.
            tl.debug_barrier()
            counter = counters + seq * (HEADS // GROUP) + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
                # The last part to be found: the counter is as it was before, and all is there.
                tl.store(counter, 0)
                whole = _merged(
                    values, peaks, totals, first, count, kv_head,
                    HEADS, GROUP, SPAN, DIM, PAD, AT_ONCE,
                )  # fmt: skip
                few = tl.arange(0, SPAN)
                to = row * (HEADS * DIM) + (kv_head * GROUP + few)[:, None] * DIM + dims[None, :]
                there = (few < GROUP)[:, None] & (dims < DIM)[None, :]
                tl.store(out + to, whole.to(out.dtype.element_ty), mask=there)


@cache
def _shared_counters(device: torch.device) -> Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros, which every launch leaves as zeros: those of all launches on a device are the same,
    which are therefore to be on one stream."""
    if count > _COUNTERS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _shared_counters(device)


def decode_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    batch: StepBatch,
    shape: AttentionShape,
    out: Tensor | None = None,
    plan: DecodePlan | None = None,
    *,
    affine: bool = False,
) -> Tensor:
    """`pagedd_kernels.paged_attention` of the sequences that have one token in this step.

    Where a sequence takes several programs, the last of them to end merges what they found. A
    launch of its own for that took 3 us a layer, also where nothing was to be merged.

    Args:
        q: [T, H, D].
        kv, layer, batch, shape: As there.
        out: Where the rows of such sequences are written; the others stay. Made if not given.
        plan: How; chosen by `decode_plan` if not given.
        affine: Take sequence s to lie in blocks 1 + s * W and on, whatever its table says.

    Returns:
        ``out``.
    """
    sequences, device = batch.num_sequences, q.device
    if plan is None:
        plan = decode_plan(shape, sequences, batch.max_context, multiprocessors(device))
    if out is None:
        out = torch.empty_like(q)
    work, fresh = division(batch, shape, plan, layer)
    items = sequences + plan.spare
    places = items * shape.heads if plan.spare else 1
    values = torch.empty(places, shape.head_dim, dtype=torch.float32, device=device)
    peaks, totals = torch.empty(2, places, dtype=torch.float32, device=device)
    span, pad = power_of_two(shape.group), power_of_two(shape.head_dim)
    at_once = _MERGED_BY_FEW if plan.stages > 3 else _MERGED_AT_ONCE
    _decode[(shape.kv_heads, items)](
        q,
        kv,
        out,
        values,
        peaks,
        totals,
        _counters(device, sequences * shape.kv_heads),
        work,
        batch.block_tables,
        layer,
        batch.block_tables.shape[1],
        int(fresh),
        *kv.stride()[:5],
        shape.scale,
        shape.soft_cap,
        HEADS=shape.heads,
        GROUP=shape.group,
        SPAN=span,
        ROWS=max(ROWS, span),
        DIM=shape.head_dim,
        PAD=pad,
        BLOCK_TOKENS=shape.block_tokens,
        TILE=plan.tile,
        RECORD=work.shape[1],
        AT_ONCE=max(1, min(32, at_once // (span * pad))),
        WINDOWED=shape.window > 0 or plan.tile % shape.block_tokens > 0,
        CAPPED=shape.soft_cap > 0,
        AFFINE=affine,
        num_warps=plan.warps,
        num_stages=plan.stages,
        **overlap(device),
    )
    return out

"""Attention of one token per sequence: split-KV, the query heads of a KV head in one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.gpu.device import multiprocessors
from pagedd_kernels.gpu.softmax import Parts, locate, scores_of, take_in
from pagedd_kernels.plans import ROWS, DecodePlan, decode_plan, power_of_two

# Lengths change with every step, and metadata lies wherever the runner packs it: neither may
# lead to another compilation in traffic.
_CHANGING = ["layer", "width", "window", "splits", "min_chunk"]
_METADATA = ["tables", "starts", "lens", "peaks", "totals"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_METADATA)
def _decode(
    q,
    kv,
    out,
    parts,
    peaks,
    totals,
    used,
    tables,
    starts,
    lens,
    layer,
    width,
    window,
    splits,
    min_chunk,
    stride_block,
    stride_layer,
    stride_kv,
    stride_token,
    stride_head,
    scale,
    soft_cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    MIXED: tl.constexpr,
    CAPPED: tl.constexpr,
    AFFINE: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    end = tl.load(lens + seq)
    row = seq.to(tl.int64)
    queries = 1
    if MIXED:
        first = tl.load(starts + seq)
        queries = tl.load(starts + seq + 1) - first
        row = first.to(tl.int64)
    begin = 0
    if window > 0:
        begin = tl.maximum(0, end - window)
    chunk = min_chunk
    if SPLIT:
        chunk = tl.maximum(min_chunk, tl.cdiv(tl.cdiv(end - begin, splits), TILE) * TILE)
    count = tl.cdiv(end - begin, chunk) if SPLIT else 1
    lo = begin + split * chunk
    hi = tl.minimum(end, lo + chunk) if SPLIT else end

    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, PAD)
    valid = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
    at = (kv_head * GROUP + heads)[:, None] * DIM + dims[None, :]
    slot = seq.to(tl.int64) * HEADS + kv_head * GROUP + heads
    if SPLIT:
        if split == 0:
            to_merge = tl.where(queries == 1, count, 0)
            tl.store(used + slot, tl.zeros([ROWS], tl.int32) + to_merge, mask=heads < GROUP)
    # A padding sequence has no keys: its part 0 stores zeros, as 0 / 1.
    if (queries == 1) & ((split == 0) | (lo < hi)):
        query = tl.load(q + row * (HEADS * DIM) + at, mask=valid, other=0.0)
        acc = tl.zeros([ROWS, PAD], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        base = kv + layer.to(tl.int64) * stride_layer + kv_head * stride_head
        for start in range(lo, hi, TILE):
            keys = start + tl.arange(0, TILE)
            inside = keys < hi
            offsets = locate(
                tables, seq, keys, inside, width, stride_block, stride_token, BLOCK_TOKENS, AFFINE
            )
            tile = inside[:, None] & (dims < DIM)[None, :]
            k_at = base + offsets[:, None] + dims[None, :]
            # Slots beyond the end may hold NaN, and 0 * NaN is NaN: V is masked like K.
            k = tl.load(k_at, mask=tile, other=0.0)
            scores = scores_of(query, tl.trans(k), scale, soft_cap, CAPPED)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            v = tl.load(k_at + stride_kv, mask=tile, other=0.0)
            acc, peak, total = take_in(acc, peak, total, scores, v, False)
        if SPLIT:
            if count > 1:
                part = slot * splits + split
                tl.store(peaks + part, peak, mask=heads < GROUP)
                tl.store(totals + part, total, mask=heads < GROUP)
                tl.store(parts + part[:, None] * DIM + dims[None, :], acc, mask=valid)
        if count <= 1:
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + row * (HEADS * DIM) + at, acc.to(out.dtype.element_ty), mask=valid)


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

    Args:
        q: [T, H, D].
        kv, layer, batch, shape: As there.
        out: Where the rows of such sequences are written; the others stay. Made if not given.
        plan: How; chosen by `decode_plan` if not given.
        affine: Take sequence s to lie in blocks 1 + s * W and on, whatever its table says.

    Returns:
        ``out``.
    """
    sequences = batch.num_sequences
    if plan is None:
        plan = decode_plan(shape, sequences, batch.max_context, multiprocessors(q.device))
    if out is None:
        out = torch.empty_like(q)
    mixed = batch.max_query > 1
    parts = Parts(out, sequences, shape.heads, shape.head_dim, plan.splits)
    _decode[(shape.kv_heads, plan.splits, sequences)](
        q,
        kv,
        out,
        parts.values,
        parts.peaks,
        parts.totals,
        parts.used,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        layer,
        batch.block_tables.shape[1],
        shape.window,
        plan.splits,
        plan.min_chunk,
        *kv.stride()[:5],
        shape.scale,
        shape.soft_cap,
        HEADS=shape.heads,
        GROUP=shape.group,
        ROWS=max(ROWS, power_of_two(shape.group)),
        DIM=shape.head_dim,
        PAD=power_of_two(shape.head_dim),
        BLOCK_TOKENS=shape.block_tokens,
        TILE=plan.tile,
        SPLIT=plan.splits > 1,
        MIXED=mixed,
        CAPPED=shape.soft_cap > 0,
        AFFINE=affine,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    parts.merge(batch.query_starts if mixed else None)
    return out

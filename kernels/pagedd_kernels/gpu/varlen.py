"""Attention of any number of tokens per sequence: whole prompts, chunks of them, the end of one
whose beginning was found in the pool, and single tokens beside them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.gpu.decode import decode_attention
from pagedd_kernels.gpu.device import begin, let_next, multiprocessors, overlap
from pagedd_kernels.gpu.softmax import (
    Parts,
    blocks_of,
    factor_of,
    keys_inside,
    offsets_of,
    scores_of,
    take_in,
)
from pagedd_kernels.plans import VarlenPlan, page_tokens, power_of_two, varlen_plan

_CHANGING = ["layer", "width", "window", "splits", "min_chunk", "sequences"]
_METADATA = ["tables", "starts", "lens", "parts", "peaks", "totals", "used"]


@triton.jit
def _sequence_of(starts, tile, sequences, TOKENS: tl.constexpr):
    """The sequence that query tile ``tile`` belongs to.

    The tiles of sequence s begin at starts[s] // TOKENS + s: room for a partial tile each, without
    anyone having counted them.
    """
    found = 0
    for first in range(0, sequences, 128):
        seqs = first + tl.arange(0, 128)
        there = seqs < sequences
        begins = tl.load(starts + seqs, mask=there, other=0) // TOKENS + seqs
        found += tl.sum(((begins <= tile) & there).to(tl.int32), 0)
    return found - 1


@triton.jit
def _tiles(
    acc,
    peak,
    total,
    query,
    base,
    tables,
    seq,
    lo,
    hi,
    positions,
    width,
    window,
    stride_block,
    stride_kv,
    stride_token,
    scale,
    soft_cap,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    AFFINE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take in the keys from ``lo``, where a page begins, to ``hi``; unmasked, whole tiles of keys
    that all rows see."""
    dims = tl.arange(0, PAD)
    pages: tl.constexpr = TILE // PAGE
    factor = factor_of(scale, CAPPED)
    blocks = blocks_of(tables, seq, lo, hi, width, pages, PAGE, BLOCK_TOKENS, AFFINE)
    for start in range(lo, hi, TILE):
        offsets = offsets_of(
            blocks, start, stride_block, stride_token, pages, PAGE, BLOCK_TOKENS, PAD
        )
        after = start + TILE
        blocks = blocks_of(tables, seq, after, hi, width, pages, PAGE, BLOCK_TOKENS, AFFINE)
        k_at = base + offsets
        tile = keys_inside(start, lo, hi, pages, PAGE) & (dims < DIM)[None, None, :]
        if MASKED:
            k = tl.load(k_at, mask=tile, other=0.0)
        elif DIM == PAD:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=(dims < DIM)[None, None, :], other=0.0)
        scores = scores_of(query, tl.trans(k.reshape(TILE, PAD)), scale, soft_cap, CAPPED)
        if MASKED:
            keys = start + tl.arange(0, TILE)
            seen = (keys < hi)[None, :] & (keys[None, :] <= positions[:, None])
            if WINDOWED:
                seen = seen & (positions[:, None] - keys[None, :] < window)
            scores = tl.where(seen, scores, float("-inf"))
            # Slots beyond the end may hold NaN, and 0 * NaN is NaN: V is masked like K.
            v = tl.load(k_at + stride_kv, mask=tile, other=0.0)
        elif DIM == PAD:
            v = tl.load(k_at + stride_kv)
        else:
            v = tl.load(k_at + stride_kv, mask=(dims < DIM)[None, None, :], other=0.0)
        v = v.reshape(TILE, PAD)
        acc, peak, total = take_in(acc, peak, total, scores, factor, v, MASKED)
    return acc, peak, total


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_METADATA)
def _varlen(
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
    sequences,
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
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    AFFINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    # The last tiles of a prompt see the most keys: begun first, they are not what all wait for.
    query_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    split = tl.program_id(2)
    seq = _sequence_of(starts, query_tile, sequences, TOKENS)
    first = tl.load(starts + seq)
    queries = tl.load(starts + seq + 1) - first
    token = (query_tile - first // TOKENS - seq) * TOKENS
    length = tl.load(lens + seq)
    position = tl.maximum(length - queries, 0) + token
    end = tl.minimum(position + TOKENS, length)
    oldest = 0
    if WINDOWED:
        # From where a page begins: what none of the rows sees of it is masked.
        oldest = tl.maximum(0, position - window + 1) // PAGE * PAGE
    chunk = tl.maximum(min_chunk, tl.cdiv(tl.cdiv(end - oldest, splits), TILE) * TILE)
    count = tl.cdiv(tl.maximum(end - oldest, 0), chunk)
    lo = oldest + split * chunk
    hi = tl.minimum(end, lo + chunk)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PAD)
    mine = token + rows // GROUP
    there = (mine < queries) & (rows < TOKENS * GROUP)
    valid = there[:, None] & (dims < DIM)[None, :]
    slot = (first + mine).to(tl.int64) * HEADS + kv_head * GROUP + rows % GROUP
    mine_to_do = queries > 1 if SKIP_SINGLE else queries > 0
    if (splits > 1) & (split == 0):
        to_merge = tl.where(mine_to_do, count, 0)
        tl.store(used + slot, tl.zeros([ROWS], tl.int32) + to_merge, mask=there)
    if mine_to_do & (token < queries) & ((split == 0) | (lo < hi)):
        at = slot[:, None] * DIM + dims[None, :]
        query = tl.load(q + at, mask=valid, other=0.0)
        positions = position + rows // GROUP
        acc = tl.zeros([ROWS, PAD], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        base = kv + layer.to(tl.int64) * stride_layer + kv_head * stride_head
        middle = lo
        if not WINDOWED:
            # All rows see all keys up to the first row's position.
            whole = tl.maximum(tl.minimum(position + 1, hi) - lo, 0) // TILE * TILE
            middle = lo + whole
            acc, peak, total = _tiles(
                acc, peak, total, query, base, tables, seq, lo, middle, positions, width, window,
                stride_block, stride_kv, stride_token, scale, soft_cap, DIM, PAD, BLOCK_TOKENS,
                PAGE, TILE, False, CAPPED, AFFINE, False,
            )  # fmt: skip
        acc, peak, total = _tiles(
            acc, peak, total, query, base, tables, seq, middle, hi, positions, width, window,
            stride_block, stride_kv, stride_token, scale, soft_cap, DIM, PAD, BLOCK_TOKENS,
            PAGE, TILE, WINDOWED, CAPPED, AFFINE, True,
        )  # fmt: skip
        let_next(EARLY)
        if count > 1:
            part = slot * splits + split
            tl.store(peaks + part, peak * factor_of(scale, CAPPED), mask=there)
            tl.store(totals + part, total, mask=there)
            tl.store(parts + part[:, None] * DIM + dims[None, :], acc, mask=valid)
        else:
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid)


def varlen_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    batch: StepBatch,
    shape: AttentionShape,
    plan: VarlenPlan | None = None,
    *,
    affine: bool = False,
) -> Tensor:
    """`pagedd_kernels.paged_attention` of any step.

    Sequences with a single token go to the decode kernel, which splits their keys, in a launch of
    its own: the host does not know which they are, and here one of 32 K tokens would be alone on a
    few multiprocessors while everything else is done.

    Args:
        q, kv, layer, batch, shape: As there.
        plan: How; chosen by `varlen_plan` if not given.
        affine: As in `decode_attention`.
    """
    sequences, tokens = batch.num_sequences, q.shape[0]
    if plan is None:
        plan = varlen_plan(shape, tokens, sequences, batch.max_context, multiprocessors(q.device))
    out = torch.empty_like(q)
    # With one part nothing is left to merge, and the room is not touched.
    parts = Parts(out, tokens if plan.splits > 1 else 1, shape.heads, plan.splits)
    _varlen[(shape.kv_heads, plan.tiles(tokens, sequences, shape.group), plan.splits)](
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
        sequences,
        *kv.stride()[:5],
        shape.scale,
        shape.soft_cap,
        HEADS=shape.heads,
        GROUP=shape.group,
        ROWS=plan.rows,
        DIM=shape.head_dim,
        PAD=power_of_two(shape.head_dim),
        BLOCK_TOKENS=shape.block_tokens,
        PAGE=page_tokens(shape.block_tokens, plan.tile),
        TILE=plan.tile,
        SKIP_SINGLE=sequences > 1,
        WINDOWED=shape.window > 0,
        CAPPED=shape.soft_cap > 0,
        AFFINE=affine,
        num_warps=plan.warps,
        num_stages=plan.stages,
        **overlap(q.device),
    )
    if plan.splits > 1:
        parts.merge()
    if sequences > 1:
        decode_attention(q, kv, layer, batch, shape, out, affine=affine)
    return out

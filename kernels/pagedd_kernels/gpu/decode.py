"""Attention of one token per sequence: split-KV, the query heads of a KV head in one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.gpu.device import multiprocessors
from pagedd_kernels.gpu.softmax import Parts, blocks_of, offsets_of, scores_of, take_in
from pagedd_kernels.plans import FEW, ROWS, DecodePlan, decode_plan, power_of_two

# Lengths change with every step, and metadata lies wherever the runner packs it: neither may
# lead to another compilation in traffic.
_CHANGING = ["layer", "width", "window", "sequences", "spare", "min_chunk"]
_METADATA = ["tables", "starts", "lens", "values", "peaks", "totals", "used"]


@triton.jit
def _work_of(
    item, starts, lens, sequences, window, spare, min_chunk,
    TILE: tl.constexpr, SEQUENCES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """What program ``item`` does: its sequence, part, number of parts, first item of the sequence,
    and keys per part.

    Sequences are cut so that all parts are about equally long, whatever the lengths are: the
    ``spare`` parts beyond one per sequence go to whoever is long. Every program computes the whole
    division, which is a few hundred additions while it waits for its length anyway.
    """
    seqs = tl.arange(0, SEQUENCES)
    there = seqs < sequences
    length = tl.load(lens + seqs, mask=there, other=0)
    if MIXED:
        first = tl.load(starts + seqs, mask=there, other=0)
        there = there & (tl.load(starts + seqs + 1, mask=there, other=0) - first == 1)
        length = tl.where(there, length, 0)
    length = tl.where(window > 0, tl.minimum(length, window), length)
    share = tl.cdiv(tl.sum(length, 0), tl.maximum(spare, 1))
    chunk = tl.maximum(min_chunk, tl.cdiv(share, TILE) * TILE)
    chunk = tl.where(spare > 0, chunk, 1 << 30)
    # A padding sequence has one part too: its zeros have to be stored.
    parts = tl.where(there, tl.maximum(tl.cdiv(length, chunk), 1), 0)
    ends = tl.cumsum(parts, 0)
    seq = tl.sum((ends <= item).to(tl.int32), 0)
    count = tl.sum(tl.where(seqs == seq, parts, 0), 0)
    begin = tl.sum(tl.where(seqs == seq, ends - parts, 0), 0)
    return seq, item - begin, count, begin, chunk


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_METADATA)
def _decode(
    q,
    kv,
    out,
    values,
    peaks,
    totals,
    used,
    tables,
    starts,
    lens,
    layer,
    width,
    window,
    sequences,
    spare,
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
    SEQUENCES: tl.constexpr,
    MIXED: tl.constexpr,
    CAPPED: tl.constexpr,
    AFFINE: tl.constexpr,
):
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    seq, part, count, begin, chunk = _work_of(
        item, starts, lens, sequences, window, spare, min_chunk, TILE, SEQUENCES, MIXED
    )
    if count > 0:
        end = tl.load(lens + seq)
        row = (tl.load(starts + seq) if MIXED else seq).to(tl.int64)
        lo = tl.where(window > 0, tl.maximum(0, end - window), 0) + part * chunk
        hi = tl.minimum(end, lo + chunk)
        heads = tl.arange(0, ROWS)
        dims = tl.arange(0, PAD)
        valid = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
        at = (kv_head * GROUP + heads)[:, None] * DIM + dims[None, :]
        query = tl.load(q + row * (HEADS * DIM) + at, mask=valid, other=0.0)
        acc = tl.zeros([ROWS, PAD], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        base = kv + layer.to(tl.int64) * stride_layer + kv_head * stride_head
        keys = lo + tl.arange(0, TILE)
        blocks = blocks_of(tables, seq, keys, keys < hi, width, BLOCK_TOKENS, AFFINE)
        for start in range(lo, hi, TILE):
            keys = start + tl.arange(0, TILE)
            inside = keys < hi
            offsets = offsets_of(blocks, keys, stride_block, stride_token, BLOCK_TOKENS)
            after = keys + TILE
            blocks = blocks_of(tables, seq, after, after < hi, width, BLOCK_TOKENS, AFFINE)
            tile = inside[:, None] & (dims < DIM)[None, :]
            k_at = base + offsets[:, None] + dims[None, :]
            # Slots beyond the end may hold NaN, and 0 * NaN is NaN: V is masked like K.
            k = tl.load(k_at, mask=tile, other=0.0)
            scores = scores_of(query, tl.trans(k), scale, soft_cap, CAPPED)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            v = tl.load(k_at + stride_kv, mask=tile, other=0.0)
            acc, peak, total = take_in(acc, peak, total, scores, v, False)
        if part == 0:
            if kv_head == 0:
                tl.store(used + 2 * seq, count)
                tl.store(used + 2 * seq + 1, begin)
        if count > 1:
            place = item.to(tl.int64) * HEADS + kv_head * GROUP + heads
            tl.store(peaks + place, peak, mask=heads < GROUP)
            tl.store(totals + place, total, mask=heads < GROUP)
            tl.store(values + place[:, None] * DIM + dims[None, :], acc, mask=valid)
        else:
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
    items = sequences + plan.spare
    parts = Parts(out, sequences, shape.heads, 1, items)
    _decode[(shape.kv_heads, items)](
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
        sequences,
        plan.spare,
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
        # Two widths: more would be kernels to warm up. Dividing 256 takes 3 us, dividing 16 none.
        SEQUENCES=16 if sequences <= FEW else max(256, power_of_two(sequences)),
        MIXED=mixed,
        CAPPED=shape.soft_cap > 0,
        AFFINE=affine,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if plan.spare:
        parts.merge(batch.query_starts if mixed else None)
    return out

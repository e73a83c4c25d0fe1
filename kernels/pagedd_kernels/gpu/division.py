"""Which program of the decode kernel reads which keys: worked out on the device, once a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.batch import AttentionShape, StepBatch
from pagedd_kernels.gpu.device import begin, let_next, overlap
from pagedd_kernels.plans import DecodePlan, ceil_div, power_of_two

FIELDS = 6
"""int32 that an item begins with: its sequence, the row of the step, the keys from and to, the
number of parts of the sequence, and the first item of it. The blocks of its first tile follow, so
that a program does not look into the table before it can ask for a key."""
_FIELDS = tl.constexpr(FIELDS)
_ITEMS = 32
"""Items per program."""


@triton.jit
def _length(starts, lens, seqs, there, window, MIXED: tl.constexpr):
    """Keys that each of some sequences reads; -1: it is none that decodes."""
    context = tl.load(lens + seqs, mask=there, other=0)
    if MIXED:
        first = tl.load(starts + seqs, mask=there, other=0)
        there = there & (tl.load(starts + seqs + 1, mask=there, other=0) - first == 1)
    length = tl.where(window > 0, tl.minimum(context, window), context)
    return tl.where(there, length, -1)


@triton.jit
def _parts(length, chunk):
    """Parts of sequences; one of padding has one too, since its zeros have to be stored."""
    return tl.where(length < 0, 0, tl.maximum(tl.cdiv(length, chunk), 1))


@triton.jit(
    do_not_specialize=["width", "sequences", "items", "window", "spare", "min_chunk"],
    do_not_specialize_on_alignment=["work", "starts", "lens", "tables"],
)
def _divide(
    work,
    starts,
    lens,
    tables,
    width,
    sequences,
    items,
    window,
    spare,
    min_chunk,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    MIXED: tl.constexpr,
    ITEMS: tl.constexpr,
    RECORD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Cut sequences so that all parts are about equally long, whatever the lengths are: the
    ``spare`` parts beyond one per sequence go to whoever is long."""
    begin(EARLY)
    let_next(EARLY)
    seqs = tl.arange(0, SEQUENCES)
    length = _length(starts, lens, seqs, seqs < sequences, window, MIXED)
    share = tl.cdiv(tl.sum(tl.maximum(length, 0), 0), tl.maximum(spare, 1))
    chunk = tl.maximum(min_chunk, tl.cdiv(share, TILE) * TILE)
    chunk = tl.where(spare > 0, chunk, 1 << 30)
    parts = _parts(length, chunk)
    ends = tl.cumsum(parts, 0)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    # How many sequences end before, and with how many parts: two sums at once.
    before = tl.where(ends[None, :] <= item[:, None], parts[None, :] + (1 << 16), 0)
    packed = tl.sum(before, 1)
    seq, first = packed >> 16, packed & 0xFFFF
    there = (item < items) & (seq < sequences)
    end = tl.load(lens + seq, mask=there, other=0)
    row = seq
    if MIXED:
        row = tl.load(starts + seq, mask=there, other=0)
    mine = _length(starts, lens, seq, there, window, MIXED)
    count = _parts(mine, chunk)
    # As many parts as the chunk asks for, but of the same length.
    step = tl.cdiv(tl.cdiv(mine, tl.maximum(count, 1)), TILE) * TILE
    lo = end - mine + (item - first) * step
    at = work + item * RECORD
    wanted = item < items
    tl.store(at, seq, mask=wanted)
    tl.store(at + 1, row, mask=wanted)
    tl.store(at + 2, lo, mask=wanted)
    hi = tl.minimum(end, lo + step)
    tl.store(at + 3, hi, mask=wanted)
    tl.store(at + 4, count, mask=wanted)
    tl.store(at + 5, first, mask=wanted)
    page = tl.arange(0, RECORD)
    key = (lo // BLOCK_TOKENS)[:, None] * BLOCK_TOKENS + page[None, :] * BLOCK_TOKENS
    row_of = tables + seq.to(tl.int64)[:, None] * width
    inside = (count > 0)[:, None] & (key < hi[:, None])
    block = tl.load(row_of + key // BLOCK_TOKENS, mask=inside, other=0)
    fits = wanted[:, None] & (page < RECORD - _FIELDS)[None, :]
    tl.store(at[:, None] + _FIELDS + page[None, :], block, mask=fits)


def division(
    batch: StepBatch, shape: AttentionShape, plan: DecodePlan, layer: int
) -> tuple[Tensor, bool]:
    """How the sequences with one token in this step are divided among the programs.

    Adding up 256 lengths took every program of the decode kernel 3 us. The division is the same in
    all layers, so the first that needs it makes it, and it is kept in the batch for those above. A
    layer that is not above makes it anew: the lengths may be those of the next step.

    Args:
        batch: Starts and lengths are used.
        shape: Its window is used.
        plan: Parts there may be.
        layer: Which layer asks.

    Returns:
        int32 [items, `FIELDS` and some], for ``num_sequences + plan.spare`` items, the number of
        parts being 0 where an item has nothing to do; and whether the launch that makes it is the
        last one before this.
    """
    key = (shape.window, plan.spare, plan.min_chunk, plan.tile)
    made = batch.divisions.get(key)
    if made is not None and made[0] < layer:
        return made[1], False
    sequences = batch.num_sequences
    items = sequences + plan.spare
    # A tile may begin inside a block.
    record = power_of_two(FIELDS + ceil_div(plan.tile, shape.block_tokens) + 1)
    work = torch.empty(items, record, dtype=torch.int32, device=batch.context_lens.device)
    _divide[(ceil_div(items, _ITEMS),)](
        work,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        batch.block_tables.shape[1],
        sequences,
        items,
        shape.window,
        plan.spare,
        plan.min_chunk,
        BLOCK_TOKENS=shape.block_tokens,
        TILE=plan.tile,
        # Two widths: more would be kernels to warm up.
        SEQUENCES=32 if sequences <= 32 else max(256, power_of_two(sequences)),
        MIXED=batch.max_query > 1,
        ITEMS=_ITEMS,
        RECORD=record,
        num_warps=4,
        **overlap(work.device),
    )
    batch.divisions[key] = layer, work
    return work, True

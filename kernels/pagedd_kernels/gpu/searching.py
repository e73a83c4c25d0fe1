"""Drawing from the rows whose decision lies deep in a flat distribution.

Where a prefix of the tokens, most likely first, reaches a target (a count, a share of the mass,
the random number's share) is found by narrowing an interval of logits, until few enough tokens lie
inside to be sorted. There are three such prefixes at most, one after the other: top-k, top-p, and
the draw.

A row of 128 K logits is 20 us of work for a program in each pass, and a batch may have a single
row. So the vocabulary is cut into `SPLITS` pieces, whose sums the next launch adds up:
`narrow_rows` three times, `gather_rows`, and `decide`, which sorts. What is left undecided then (a
spread beyond all reason, more equal logits than are sorted), and a top-k larger than what was
sorted before, is narrowed further by one program. Rows that are not pending cost launches that end
at once. Sums are taken in an order that depends on the row alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedd_kernels.gpu.candidates import packed, sorted_keys, unpacked
from pagedd_kernels.gpu.device import begin, let_next, overlap
from pagedd_kernels.plans import power_of_two

SPLITS, LIMITS, PASSES = 32, 8, 3
"""Pieces of the vocabulary, thresholds in each pass, and passes: an interval is cut to a 729th, in
which a distribution as flat as a normal one has less than `CAPACITY` of 128 K tokens. Two passes of
32 thresholds are three times the work."""
_PROGRAMS = 1024
"""About how many a launch has: with many rows, each does several pieces."""
_TOP_K, _TOP_P, _DRAW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NARROWINGS = tl.constexpr(80)
"""Passes at most: each cuts the interval to a ninth, and float32 spans 3e38 / 1e-45."""


@triton.jit
def _weight(x, peak, scale, counting):
    """1 or the mass of each logit, 0 for what may not be drawn."""
    mass = tl.exp2((x - peak) * (scale * 1.4426950408889634))
    return tl.where(x > float("-inf"), tl.where(counting, 1.0, mass), 0.0)


@triton.jit
def _narrow(
    logits, vocab, lo, hi, target, peak, scale, counting,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Shrink [lo, hi) around where the weight at or above it reaches ``target``, until at most
    ``CAPACITY`` tokens are inside or no float is left between its ends."""
    eighth = tl.arange(0, 8)
    steps = 0
    inside = vocab + 0
    going = inside > CAPACITY
    while going:
        limits = lo + (hi - lo) * ((eighth + 1).to(tl.float32) / 9.0)
        # Summed up per lane, and over lanes once: reducing in each iteration was most of a pass.
        weights = tl.zeros([BLOCK, 8], tl.float32)
        counts = tl.zeros([BLOCK, 8], tl.int32)
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            weight = _weight(x, peak, scale, counting)
            above = x[:, None] >= limits[None, :]
            weights += tl.where(above, weight[:, None], 0.0)
            counts += above.to(tl.int32)
        reached = tl.sum(weights.to(tl.float64), 0) >= target
        count = tl.sum(counts, 0)
        new_lo = tl.max(tl.where(reached & (limits > lo), limits, lo), 0)
        new_hi = tl.min(tl.where((reached == 0) & (limits < hi) & (limits > new_lo), limits, hi), 0)
        above_lo = tl.where(new_lo > lo, tl.max(tl.where(limits == new_lo, count, 0), 0), -1)
        above_hi = tl.where(new_hi < hi, tl.max(tl.where(limits == new_hi, count, 0), 0), -1)
        steps += 1
        going = ((new_lo > lo) | (new_hi < hi)) & (steps < _NARROWINGS)
        lo = new_lo
        hi = new_hi
        # Counts of ends that did not move were not taken in this pass; then there is another.
        known = (above_lo >= 0) & (above_hi >= 0)
        inside = tl.where(known, above_lo - above_hi, CAPACITY + 1)
        going = going & (inside > CAPACITY)
    return lo, hi


@triton.jit
def _sift(
    logits, keys, counter, first, last, lo, hi, peak, scale,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Put the tokens from ``first`` to ``last`` whose logits are inside [lo, hi) into ``keys``, in
    any order, and add their number to ``counter``: more may be counted than fit.

    Returns number, mass, and mass at the temperature, of those at or above ``hi``.
    """
    above = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    hot = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < last, other=float("-inf")).to(tl.float32)
        higher = x >= hi
        above += higher.to(tl.int32)
        mass += tl.where(higher, _weight(x, peak, 1.0, False), 0.0)
        hot += tl.where(higher, _weight(x, peak, scale, False), 0.0)
        within = (x >= lo) & (x < hi) & (x > float("-inf"))
        place = tl.atomic_add(counter + tl.zeros([BLOCK], tl.int32), 1, mask=within)
        tl.store(keys + place, packed(x, ids), mask=within & (place < CAPACITY))
    return tl.sum(above, 0), tl.sum(mass.to(tl.float64), 0), tl.sum(hot.to(tl.float64), 0)


@triton.jit
def _gather(
    logits, keys, counter, vocab, lo, hi, peak, scale,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """`_sift` the whole row; returns how many tokens are inside, too."""
    tl.debug_barrier()
    tl.store(counter, 0)
    tl.debug_barrier()
    above, mass, hot = _sift(
        logits, keys, counter, 0, vocab, lo, hi, peak, scale, BLOCK, CAPACITY
    )  # fmt: skip
    tl.debug_barrier()
    return tl.load(counter, volatile=True), above, mass, hot


@triton.jit
def _nth_at(logits, vocab, value, nth, BLOCK: tl.constexpr):
    """The id of the ``nth`` (from 1) token whose logit is ``value``."""
    seen = 0
    found = 0x7FFFFFFF
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        ones = (x == value).to(tl.int32)
        place = seen + tl.cumsum(ones, 0)
        found = tl.minimum(found, tl.min(tl.where((ones > 0) & (place == nth), ids, 0x7FFFFFFF), 0))
        seen += tl.sum(ones, 0)
    return found


@triton.jit
def _target(row, rows, kept, uniform, top_p, STAGE: tl.constexpr, TOP_P: tl.constexpr):
    """Whether a row has this prefix, and the mass that it reaches."""
    active = True
    target = tl.load(uniform + row).to(tl.float64) * tl.load(kept + rows + row)
    if (STAGE == _TOP_P) and TOP_P:
        share = tl.load(top_p + row).to(tl.float64)
        active = share < 1.0
        target = share * tl.load(kept + row)
    # Even a share of 0 takes the first token.
    return active, tl.maximum(target, 1e-300)


@triton.jit
def _piece(split, vocab, SPLITS: tl.constexpr):
    first = split * tl.cdiv(vocab, SPLITS)
    return first, tl.minimum(vocab, first + tl.cdiv(vocab, SPLITS))


@triton.jit
def _limits(lo, hi, LIMITS: tl.constexpr):
    return lo + (hi - lo) * ((tl.arange(0, LIMITS) + 1).to(tl.float32) / (LIMITS + 1))


@triton.jit
def _narrowed(bounds, sums, target, SPLITS: tl.constexpr, LIMITS: tl.constexpr):
    """The interval that a pass found between its ``bounds``, from the sums of its pieces."""
    lo, hi = tl.load(bounds), tl.load(bounds + 1)
    limits = _limits(lo, hi, LIMITS)
    at = tl.arange(0, SPLITS)[:, None] * LIMITS + tl.arange(0, LIMITS)[None, :]
    reached = tl.sum(tl.load(sums + at), 0) >= target
    low = tl.max(tl.where(reached & (limits > lo), limits, lo), 0)
    high = tl.min(tl.where((reached == 0) & (limits < hi) & (limits > low), limits, hi), 0)
    return low, high


_ANYWHERE = [
    "keys", "counters", "pending", "row_peaks", "row_lows", "kept", "floors", "bounds", "sums",
    "sifted", "temperature", "uniform", "top_k", "top_p", "min_p", "tokens",
]  # fmt: skip


@triton.jit(do_not_specialize=["vocab", "rows", "each"], do_not_specialize_on_alignment=_ANYWHERE)
def narrow_rows(
    logits, pending, row_peaks, row_lows, kept, counters, bounds, sums, temperature, uniform, top_p,
    vocab, rows, stride, each,
    STAGE: tl.constexpr, PASS: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, LIMITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One piece of a pending row: its mass at or above each limit of the interval."""
    begin(EARLY)
    let_next(EARLY)
    row, piece = tl.program_id(0), tl.program_id(1) * each
    if tl.load(pending + row) != 0:
        active, target = _target(row, rows, kept, uniform, top_p, STAGE, TOP_P)
        if active:
            peak = tl.load(row_peaks + row)
            scale = 1.0
            if STAGE == _DRAW:
                scale = 1.0 / tl.load(temperature + row)
            if PASS == 0:
                lo, hi = tl.load(row_lows + row), peak + 1.0 + tl.abs(peak) * 1e-6
            else:
                before = (PASS - 1) * rows + row
                lo, hi = _narrowed(
                    bounds + 2 * before, sums + before * (SPLITS * LIMITS), target, SPLITS, LIMITS
                )
            here = PASS * rows + row
            if piece == 0:
                tl.store(bounds + 2 * here, lo)
                tl.store(bounds + 2 * here + 1, hi)
                tl.store(counters + row, 0)
            limits = _limits(lo, hi, LIMITS)
            line = logits + row.to(tl.int64) * stride
            for split in range(piece, piece + each):
                first, last = _piece(split, vocab, SPLITS)
                # Summed up per lane, and over lanes once: reducing in each iteration was most of a
                # pass.
                weights = tl.zeros([BLOCK, LIMITS], tl.float32)
                for start in range(first, last, BLOCK):
                    ids = start + tl.arange(0, BLOCK)
                    x = tl.load(line + ids, mask=ids < last, other=float("-inf")).to(tl.float32)
                    weight = _weight(x, peak, scale, False)
                    weights += tl.where(x[:, None] >= limits[None, :], weight[:, None], 0.0)
                at = (here * SPLITS + split) * LIMITS + tl.arange(0, LIMITS)
                tl.store(sums + at, tl.sum(weights.to(tl.float64), 0))


@triton.jit(do_not_specialize=["vocab", "rows", "each"], do_not_specialize_on_alignment=_ANYWHERE)
def gather_rows(
    logits, keys, pending, row_peaks, kept, counters, bounds, sums, sifted, temperature, uniform,
    top_p, vocab, rows, stride, each,
    STAGE: tl.constexpr, PASSES: tl.constexpr, TOP_P: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, LIMITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One piece of a pending row: its tokens inside the interval, and sums of those above."""
    begin(EARLY)
    let_next(EARLY)
    row, piece = tl.program_id(0), tl.program_id(1) * each
    if tl.load(pending + row) != 0:
        active, target = _target(row, rows, kept, uniform, top_p, STAGE, TOP_P)
        if active:
            before = (PASSES - 1) * rows + row
            lo, hi = _narrowed(
                bounds + 2 * before, sums + before * (SPLITS * LIMITS), target, SPLITS, LIMITS
            )
            if piece == 0:
                tl.store(bounds + 2 * (PASSES * rows + row), lo)
                tl.store(bounds + 2 * (PASSES * rows + row) + 1, hi)
            line = logits + row.to(tl.int64) * stride
            room = keys + row.to(tl.int64) * (2 * CAPACITY)
            peak = tl.load(row_peaks + row)
            scale = 1.0 / tl.load(temperature + row)
            for split in range(piece, piece + each):
                first, last = _piece(split, vocab, SPLITS)
                above, mass, hot = _sift(
                    line, room, counters + row, first, last, lo, hi, peak, scale, BLOCK, CAPACITY
                )
                at = sifted + (row * SPLITS + split) * 3
                tl.store(at, above.to(tl.float64))
                tl.store(at + 1, mass)
                tl.store(at + 2, hot)


@triton.jit(do_not_specialize=["vocab", "each"], do_not_specialize_on_alignment=_ANYWHERE)
def floor_rows(
    logits, pending, row_peaks, floors, temperature, min_p, vocab, stride, each,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One piece of a pending row: the mass at the temperature of what min-p keeps."""
    begin(EARLY)
    let_next(EARLY)
    row, piece = tl.program_id(0), tl.program_id(1) * each
    if tl.load(pending + row) != 0:
        least = tl.load(min_p + row).to(tl.float64)
        peak = tl.load(row_peaks + row)
        scale = 1.0 / tl.load(temperature + row)
        limit = (peak.to(tl.float64) + tl.log(tl.maximum(least, 1e-300))).to(tl.float32)
        line = logits + row.to(tl.int64) * stride
        for split in range(piece, piece + each):
            first, last = _piece(split, vocab, SPLITS)
            hot = tl.zeros([BLOCK], tl.float32)
            for start in range(first, last, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                x = tl.load(line + ids, mask=ids < last, other=float("-inf")).to(tl.float32)
                hot += tl.where(x >= limit, _weight(x, peak, scale, False), 0.0)
            tl.store(floors + row * SPLITS + split, tl.sum(hot.to(tl.float64), 0))


@triton.jit(do_not_specialize=["vocab", "rows"], do_not_specialize_on_alignment=_ANYWHERE)
def decide(
    logits, keys, counters, pending, row_peaks, row_lows, kept, floors, bounds, sifted, temperature,
    uniform, top_k, top_p, min_p, tokens, vocab, rows, stride,
    STAGE: tl.constexpr, PASSES: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    MIN_P: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Where the prefix of a pending row ends, and what it leaves; of the draw, the token."""
    begin(EARLY)
    let_next(EARLY)
    row = tl.program_id(0)
    if tl.load(pending + row) != 0:
        line = logits + row.to(tl.int64) * stride
        room = keys + row.to(tl.int64) * (2 * CAPACITY)
        peak = tl.load(row_peaks + row)
        scale = 1.0 / tl.load(temperature + row)
        hot_left = tl.load(kept + rows + row)
        counting = STAGE == _TOP_K
        if STAGE == _TOP_K:
            active, target = False, tl.full([], 1.0, tl.float64)
            if TOP_K:
                k = tl.load(top_k + row)
                active = (k > 0) & (k < vocab)
                target = k.to(tl.float64)
            if MIN_P:
                part = tl.load(floors + row * SPLITS + tl.arange(0, SPLITS))
                least = tl.load(min_p + row)
                hot_left = tl.where(least > 0, tl.minimum(hot_left, tl.sum(part, 0)), hot_left)
                tl.store(kept + rows + row, hot_left)
            lo, hi = tl.load(row_lows + row), peak + 1.0 + tl.abs(peak) * 1e-6
            count, above = CAPACITY + 1, tl.full([], 0, tl.int32)
            mass = tl.full([], 0.0, tl.float64)
            hot = mass
        else:
            active, target = _target(row, rows, kept, uniform, top_p, STAGE, TOP_P)
            lo = tl.load(bounds + 2 * (PASSES * rows + row))
            hi = tl.load(bounds + 2 * (PASSES * rows + row) + 1)
            count = tl.load(counters + row)
            pieces = sifted + (row * SPLITS + tl.arange(0, SPLITS)) * 3
            above = tl.sum(tl.load(pieces), 0).to(tl.int32)
            mass = tl.sum(tl.load(pieces + 1), 0)
            hot = tl.sum(tl.load(pieces + 2), 0)
        if active:
            heat = scale if STAGE == _DRAW else 1.0
            if count > CAPACITY:
                lo, hi = _narrow(line, vocab, lo, hi, target, peak, heat, counting, BLOCK, CAPACITY)
                count, above, mass, hot = _gather(
                    line, room, counters + row, vocab, lo, hi, peak, scale, BLOCK, CAPACITY
                )
            if count <= CAPACITY:
                value, ids = unpacked(sorted_keys(room, count, CAPACITY))
                at = tl.arange(0, CAPACITY)
                inside = at < count
                value = tl.where(inside, value, float("-inf"))
                hots = tl.cumsum(_weight(value, peak, scale, False).to(tl.float64), 0) + hot
                masses = tl.cumsum(_weight(value, peak, 1.0, False).to(tl.float64), 0) + mass
                if STAGE == _TOP_K:
                    reach = (at + 1).to(tl.float64) + above.to(tl.float64)
                elif STAGE == _TOP_P:
                    reach = masses
                else:
                    reach = hots
                chosen = tl.min(tl.where(inside & (reach >= target), at, CAPACITY), 0)
                here = at == tl.minimum(chosen, count - 1)
                token = tl.sum(tl.where(here, ids, 0), 0)
                mass_left = tl.sum(tl.where(here, masses, 0.0), 0)
                reached_hot = tl.sum(tl.where(here, hots, 0.0), 0)
            else:
                # More equal logits than fit: each weighs the same, and ids order them.
                flat = tl.zeros([1], tl.float32) + lo
                head = hot
                if STAGE == _TOP_K:
                    head = above.to(tl.float64)
                elif STAGE == _TOP_P:
                    head = mass
                one = tl.max(_weight(flat, peak, heat, counting), 0)
                nth = tl.ceil((target - head) / one.to(tl.float64)).to(tl.int32)
                nth = tl.minimum(tl.maximum(nth, 1), count)
                token = _nth_at(line, vocab, lo, nth, BLOCK)
                times = nth.to(tl.float64)
                mass_left = mass + times * tl.max(_weight(flat, peak, 1.0, False), 0)
                reached_hot = hot + times * tl.max(_weight(flat, peak, scale, False), 0)
            if STAGE == _DRAW:
                tl.store(tokens + row, token)
            else:
                tl.store(kept + row, mass_left)
                tl.store(kept + rows + row, tl.minimum(hot_left, reached_hot))


def search(
    logits: Tensor, keys: Tensor, known: Any, pending: Tensor, kept: Tensor, settings: list[Tensor],
    switches: dict[str, bool], capacity: int, block: int,
) -> None:  # fmt: skip
    """Decide the pending rows.

    Args:
        logits: [N, vocab].
        keys: int64 [N, 2, ``capacity``], room to sort in.
        known: What the passes before found of each row.
        pending: int32 [N]: whether a row is to be decided.
        kept: float64 [2, N]: mass of each row, and mass at its temperature. Is changed.
        settings: Temperature, uniform, top-k, top-p and min-p of each row.
        switches: Which of ``TOP_K``, ``TOP_P`` and ``MIN_P`` there are.
        capacity: How many tokens are sorted.
        block: Logits per iteration of a program that sums a whole row.
    """
    rows, vocab = logits.shape
    device, stride = logits.device, logits.stride(0)
    temperature, uniform, top_k, top_p, min_p = settings
    bounds = torch.empty(PASSES + 1, rows, 2, dtype=torch.float32, device=device)
    sums = torch.empty(PASSES, rows, SPLITS, LIMITS, dtype=torch.float64, device=device)
    sifted = torch.empty(rows, SPLITS, 3, dtype=torch.float64, device=device)
    floors = torch.empty(rows, SPLITS, dtype=torch.float64, device=device)
    # The sums of a row do not depend on how many pieces a program does.
    each = max(1, power_of_two(rows) * SPLITS // _PROGRAMS)
    grid = (rows, SPLITS // each)
    pieces: dict[str, Any] = {"BLOCK": block, "SPLITS": SPLITS, "num_warps": 8}
    pieces |= overlap(device)
    has_top_p = switches["TOP_P"]

    def end(stage: int) -> None:
        decide[(rows,)](
            logits, keys, known.counters, pending, known.peaks, known.lows, kept, floors, bounds,
            sifted, temperature, uniform, top_k, top_p, min_p, known.tokens, vocab, rows, stride,
            STAGE=stage, PASSES=PASSES, CAPACITY=capacity, BLOCK=block, SPLITS=SPLITS, num_warps=8,
            **switches, **overlap(device),
        )  # fmt: skip

    if switches["MIN_P"]:
        floor_rows[grid](
            logits, pending, known.peaks, floors, temperature, min_p, vocab, stride, each, **pieces
        )
    if switches["TOP_K"] or switches["MIN_P"]:
        end(_TOP_K.value)
    for stage in (_TOP_P.value, _DRAW.value) if has_top_p else (_DRAW.value,):
        for number in range(PASSES):
            narrow_rows[grid](
                logits, pending, known.peaks, known.lows, kept, known.counters, bounds, sums,
                temperature, uniform, top_p, vocab, rows, stride, each,
                STAGE=stage, PASS=number, TOP_P=has_top_p, LIMITS=LIMITS, **pieces,
            )  # fmt: skip
        gather_rows[grid](
            logits, keys, pending, known.peaks, kept, known.counters, bounds, sums, sifted,
            temperature, uniform, top_p, vocab, rows, stride, each,
            STAGE=stage, PASSES=PASSES, TOP_P=has_top_p, CAPACITY=capacity, LIMITS=LIMITS, **pieces,
        )  # fmt: skip
        end(stage)

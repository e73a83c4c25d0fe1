"""Drawing from the rows whose decision lies deep in a flat distribution.

Where a prefix of the tokens, most likely first, reaches a target (a count, a share of the mass,
the random number's share) is found by narrowing an interval of logits. Each pass sums the row over
eight thresholds; once few enough tokens lie inside, they are sorted and decide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagedd_kernels.gpu.candidates import packed, sorted_keys, unpacked

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
def _gather(
    logits, keys, counter, vocab, lo, hi, peak, scale,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Put the tokens inside [lo, hi) into ``keys``, in any order.

    Returns how many there are (more may be counted than fit), and count, mass and mass at the
    temperature of those at or above ``hi``.
    """
    tl.debug_barrier()
    tl.store(counter, 0)
    tl.debug_barrier()
    above = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    hot = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        higher = x >= hi
        above += higher.to(tl.int32)
        mass += tl.where(higher, _weight(x, peak, 1.0, False), 0.0)
        hot += tl.where(higher, _weight(x, peak, scale, False), 0.0)
        within = (x >= lo) & (x < hi) & (x > float("-inf"))
        place = tl.atomic_add(counter + tl.zeros([BLOCK], tl.int32), 1, mask=within)
        tl.store(keys + place, packed(x, ids), mask=within & (place < CAPACITY))
    tl.debug_barrier()
    count = tl.load(counter, volatile=True)
    return count, tl.sum(above, 0), tl.sum(mass.to(tl.float64), 0), tl.sum(hot.to(tl.float64), 0)


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


@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=[
        "keys",
        "counters",
        "pending",
        "row_peaks",
        "row_lows",
        "row_masses",
        "row_hot_masses",
        "temperature",
        "uniform",
        "top_k",
        "top_p",
        "min_p",
        "tokens",
    ],
)
def search(
    logits,
    keys,
    counters,
    pending,
    row_peaks,
    row_lows,
    row_masses,
    row_hot_masses,
    temperature,
    uniform,
    top_k,
    top_p,
    min_p,
    tokens,
    vocab,
    stride,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
):
    """Decide the pending rows: up to three prefixes, each found in the same way."""
    row = tl.program_id(0)
    if tl.load(pending + row) != 0:
        line = logits + row.to(tl.int64) * stride
        room = keys + row.to(tl.int64) * (2 * CAPACITY)
        peak = tl.load(row_peaks + row)
        low = tl.load(row_lows + row)
        scale = 1.0 / tl.load(temperature + row)
        at = tl.arange(0, CAPACITY)
        kept = tl.load(row_masses + row)
        kept_hot = tl.load(row_hot_masses + row)
        token = -1
        if MIN_P:
            least = tl.load(min_p + row).to(tl.float64)
            if least > 0:
                limit = (peak.to(tl.float64) + tl.log(least)).to(tl.float32)
                _, _, _, floor_hot = _gather(
                    line, room, counters + row, vocab, limit, limit, peak, scale, BLOCK, CAPACITY
                )
                kept_hot = tl.minimum(kept_hot, floor_hot)
        for stage in range(3):
            active = stage == 2
            target = tl.load(uniform + row).to(tl.float64) * kept_hot
            if TOP_K:
                k = tl.load(top_k + row)
                active = active | ((stage == 0) & (k > 0) & (k < vocab))
                target = tl.where(stage == 0, k.to(tl.float64), target)
            if TOP_P:
                share = tl.load(top_p + row).to(tl.float64)
                active = active | ((stage == 1) & (share < 1.0))
                target = tl.where(stage == 1, share * kept, target)
            if active:
                counting = stage == 0
                heat = tl.where(stage == 2, scale, 1.0)
                target = tl.maximum(target, 1e-300)  # even a share of 0 takes the first token
                top = peak + 1.0 + tl.abs(peak) * 1e-6
                lo, hi = _narrow(
                    line, vocab, low, top, target, peak, heat, counting,
                    BLOCK, CAPACITY,
                )  # fmt: skip
                count, above, mass, hot = _gather(
                    line, room, counters + row, vocab, lo, hi, peak, scale, BLOCK, CAPACITY
                )
                head = tl.where(counting, above.to(tl.float64), tl.where(stage == 1, mass, hot))
                if count <= CAPACITY:
                    value, ids = unpacked(sorted_keys(room, count, CAPACITY))
                    inside = at < count
                    value = tl.where(inside, value, float("-inf"))
                    hots = tl.cumsum(_weight(value, peak, scale, False).to(tl.float64), 0) + hot
                    masses = tl.cumsum(_weight(value, peak, 1.0, False).to(tl.float64), 0) + mass
                    ranks = (at + 1).to(tl.float64) + above.to(tl.float64)
                    reach = tl.where(counting, ranks, tl.where(stage == 1, masses, hots))
                    chosen = tl.min(tl.where(inside & (reach >= target), at, CAPACITY), 0)
                    chosen = tl.minimum(chosen, count - 1)
                    here = at == chosen
                    token = tl.sum(tl.where(here, ids, 0), 0)
                    kept = tl.where(stage < 2, tl.sum(tl.where(here, masses, 0.0), 0), kept)
                    reached_hot = tl.sum(tl.where(here, hots, 0.0), 0)
                else:
                    # More equal logits than fit: each weighs the same, and ids order them.
                    one = tl.max(_weight(tl.zeros([1], tl.float32) + lo, peak, heat, counting), 0)
                    nth = tl.ceil((target - head) / one.to(tl.float64)).to(tl.int32)
                    nth = tl.minimum(tl.maximum(nth, 1), count)
                    token = _nth_at(line, vocab, lo, nth, BLOCK)
                    flat = tl.zeros([1], tl.float32) + lo
                    times = nth.to(tl.float64)
                    cold = tl.max(_weight(flat, peak, 1.0, False), 0).to(tl.float64)
                    warm = tl.max(_weight(flat, peak, scale, False), 0).to(tl.float64)
                    kept = tl.where(stage < 2, mass + times * cold, kept)
                    reached_hot = hot + times * warm
                kept_hot = tl.where(stage < 2, tl.minimum(kept_hot, reached_hot), kept_hot)
        tl.store(tokens + row, token)

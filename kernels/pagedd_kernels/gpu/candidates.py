"""Drawing from a row of logits without sorting it.

The order of the tokens matters (top-k and top-p keep the most likely ones, and the random number
picks along that order), but only near where something is decided. So:

1. `chunk_statistics` reads the row once: the largest logit of each chunk, and sums for the mass.
2. `thresholds` takes a logit that so many chunks reach that at least so many tokens do; the k-th
   largest chunk maximum is a lower bound of the k-th largest logit, and a close one.
3. `collect` gathers the tokens at or above it: a few hundred, from the chunks that have any.
4. `draw` sorts them and decides where they are enough for that; for text they nearly always are.
5. `search` decides the rest (flat distributions): it narrows an interval of logits down to few
   enough tokens by summing the row over thresholds, and sorts those.

Sums are taken in an order that depends on the row alone, so a draw does not depend on the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below, every pointer but that of the logits may be to anywhere: parameters are packed by the
# caller, and an address that happens to be odd must not lead to another compilation in traffic.


@triton.jit
def packed(x, ids):
    """Value and id in one int64, ordered by value, then lowest id first; -0 counts as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def unpacked(key):
    """The value and id of `packed`."""
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    ids = 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)
    return bits.to(tl.float32, bitcast=True), ids


@triton.jit
def _mass(x, peak, scale):
    """exp((x - peak) * scale), 0 for what may not be drawn."""
    return tl.exp2((x - peak) * (scale * 1.4426950408889634))


@triton.jit(
    do_not_specialize=["vocab", "chunks"],
    do_not_specialize_on_alignment=[
        "temperature",
        "peaks",
        "places",
        "lows",
        "masses",
        "hot_masses",
    ],
)
def chunk_statistics(
    logits,
    temperature,
    peaks,
    places,
    lows,
    masses,
    hot_masses,
    vocab,
    chunks,
    stride,
    CHUNK: tl.constexpr,
    SUMS: tl.constexpr,
    HOT: tl.constexpr,
):
    """Of each chunk: its largest logit (NaN if there is a NaN) and where it is first; with ``SUMS``
    the mass relative to it, with ``HOT`` also that at the row's temperature, and the lowest logit.
    """
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    there = ids < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=there, other=float("-inf"))
    x = x.to(tl.float32)
    peak = tl.max(x, 0)
    place = tl.min(tl.where(x == peak, ids, 0x7FFFFFFF), 0)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    at = row * chunks + chunk
    tl.store(peaks + at, tl.where(broken, float("nan"), peak))
    tl.store(places + at, place)
    if SUMS:
        base = tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(masses + at, tl.sum(_mass(x, base, 1.0), 0))
        if HOT:
            heat = tl.load(temperature + row)
            scale = 1.0 / tl.where(heat > 0, heat, 1.0)
            tl.store(hot_masses + at, tl.sum(_mass(x, base, scale), 0))
            lowest = tl.where(there & (x > float("-inf")), x, float("inf"))
            tl.store(lows + at, tl.min(lowest, 0))


@triton.jit(
    do_not_specialize=["vocab", "chunks"],
    do_not_specialize_on_alignment=[
        "peaks",
        "places",
        "lows",
        "masses",
        "hot_masses",
        "temperature",
        "top_k",
        "tokens",
        "row_peaks",
        "row_lows",
        "row_masses",
        "row_hot_masses",
        "floors",
        "counters",
    ],
)
def thresholds(
    peaks,
    places,
    lows,
    masses,
    hot_masses,
    temperature,
    top_k,
    tokens,
    row_peaks,
    row_lows,
    row_masses,
    row_hot_masses,
    floors,
    counters,
    vocab,
    chunks,
    PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
    SUMS: tl.constexpr,
    HOT: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Of each row: the greedy token (-1 if the peak is not finite), peak and masses, and from which
    logit on tokens are candidates (infinity: none are, the token stands)."""
    row = tl.program_id(0)
    chunk = tl.arange(0, PAD)
    there = chunk < chunks
    at = row * chunks + chunk
    peak_of = tl.load(peaks + at, mask=there, other=float("-inf"))
    broken = tl.max((peak_of != peak_of).to(tl.int32), 0) > 0
    peak = tl.max(peak_of, 0)
    sound = (peak > float("-inf")) & (peak < float("inf")) & (broken == 0)
    place = tl.load(places + at, mask=there, other=0x7FFFFFFF)
    token = tl.min(tl.where(there & (peak_of == peak), place, 0x7FFFFFFF), 0)
    tl.store(tokens + row, tl.where(sound, token, -1))
    tl.store(row_peaks + row, tl.where(sound, peak, float("nan")))
    if SUMS:
        base = tl.where(sound, peak, 0.0)
        mass = tl.load(masses + at, mask=there, other=0.0)
        mass = mass * tl.where(mass > 0, _mass(peak_of, base, 1.0), 0.0)
        tl.store(row_masses + row, tl.sum(mass.to(tl.float64), 0))
    if HOT:
        heat = tl.load(temperature + row)
        scale = 1.0 / tl.where(heat > 0, heat, 1.0)
        hot = tl.load(hot_masses + at, mask=there, other=0.0)
        hot = hot * tl.where(hot > 0, _mass(peak_of, tl.where(sound, peak, 0.0), scale), 0.0)
        tl.store(row_hot_masses + row, tl.sum(hot.to(tl.float64), 0))
        low = tl.load(lows + at, mask=there, other=float("inf"))
        tl.store(row_lows + row, tl.min(low, 0))
        tl.store(counters + row, 0)
        # Nine in ten chunks reach it: about two candidates from each, if tokens lie at random.
        wanted = tl.maximum(1, chunks * 9 // 10)
        if TOP_K:
            k = tl.load(top_k + row)
            wanted = tl.where((k > 0) & (k < vocab), tl.minimum(k, chunks), wanted)
        rank = tl.zeros([PAD], tl.int32)
        for first in range(0, chunks, 32):
            other = first + tl.arange(0, 32)
            other_peak = tl.load(
                peaks + row * chunks + other, mask=other < chunks, other=float("-inf")
            )
            rank += tl.sum((other_peak[None, :] > peak_of[:, None]).to(tl.int32), 1)
        floor = tl.min(tl.where(there & (rank < wanted), peak_of, float("inf")), 0)
        floor = tl.where(vocab <= CAPACITY, float("-inf"), floor)
        tl.store(floors + row, tl.where(sound & (heat > 0), floor, float("inf")))


@triton.jit(
    do_not_specialize=["vocab", "chunks"],
    do_not_specialize_on_alignment=["peaks", "floors", "counters", "keys"],
)
def collect(
    logits,
    peaks,
    floors,
    counters,
    keys,
    vocab,
    chunks,
    stride,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Gather the candidates of each row, in any order; beyond the capacity they are counted."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    floor = tl.load(floors + row)
    if tl.load(peaks + row * chunks + chunk) >= floor:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=float("-inf"))
        x = x.to(tl.float32)
        taken = (x >= floor) & (x > float("-inf"))
        ones = taken.to(tl.int32)
        begin = tl.atomic_add(counters + row, tl.sum(ones, 0))
        place = begin + tl.cumsum(ones, 0) - ones
        target = keys + row.to(tl.int64) * (2 * CAPACITY) + place
        tl.store(target, packed(x, ids), mask=taken & (place < CAPACITY))


@triton.jit
def sorted_keys(keys, count, CAPACITY: tl.constexpr):
    """The first ``count`` of ``keys``, largest first; what is behind them has no meaning.

    By counting how many are larger: with a few hundred keys as fast as a sorting network, and it
    compiles in a fraction of the time. The room behind ``keys`` takes the result.
    """
    tl.debug_barrier()
    at = tl.arange(0, CAPACITY)
    mine = tl.load(keys + at, mask=at < count, other=-0x7FFFFFFFFFFFFFFF)
    rank = tl.zeros([CAPACITY], tl.int32)
    for first in range(0, count, 32):
        other = first + tl.arange(0, 32)
        theirs = tl.load(keys + other, mask=other < count, other=-0x7FFFFFFFFFFFFFFF)
        rank += tl.sum((theirs[None, :] > mine[:, None]).to(tl.int32), 1)
    tl.store(keys + CAPACITY + rank, mine, mask=at < count)
    tl.debug_barrier()
    return tl.load(keys + CAPACITY + at, mask=at < count, other=-0x7FFFFFFFFFFFFFFF)


@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=[
        "keys",
        "counters",
        "floors",
        "row_masses",
        "row_hot_masses",
        "temperature",
        "uniform",
        "top_k",
        "top_p",
        "min_p",
        "tokens",
        "pending",
        "remaining",
    ],
)
def draw(
    keys,
    counters,
    floors,
    row_masses,
    row_hot_masses,
    temperature,
    uniform,
    top_k,
    top_p,
    min_p,
    tokens,
    pending,
    remaining,
    vocab,
    CAPACITY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
):
    """Decide the rows whose candidates suffice, and mark the others as pending; their masses are
    what `search` begins with."""
    row = tl.program_id(0)
    floor = tl.load(floors + row)
    count = tl.load(counters + row)
    left = (floor < float("inf")) & (count > CAPACITY)
    if (floor < float("inf")) & (count <= CAPACITY):
        at = tl.arange(0, CAPACITY)
        key = sorted_keys(keys + row.to(tl.int64) * (2 * CAPACITY), count, CAPACITY)
        value, ids = unpacked(key)
        value = value.to(tl.float64)
        first = tl.max(tl.where(at < count, value, float("-inf")), 0)
        below = tl.where(at < count, value - first, float("-inf"))
        kept = at < count
        # Complete: all tokens that may be drawn are among the candidates. Filtered: not every token
        # may be, so the whole row's mass says nothing. Lacking: top-k wants more than these.
        complete = floor == float("-inf")
        filtered = tl.full([], 0, tl.int1)
        lacking = tl.full([], 0, tl.int1)
        mass_of_all = tl.load(row_masses + row)
        if TOP_K:
            k = tl.load(top_k + row)
            limited = (k > 0) & (k < vocab)
            kept = tl.where(limited, kept & (at < k), kept)
            lacking = limited & (count < k) & (complete == 0)
            complete = complete | (limited & (count >= k))
            filtered = limited
        if TOP_P:
            share = tl.load(top_p + row).to(tl.float64)
            mass = tl.where(kept, tl.exp(below), 0.0)
            before = tl.cumsum(mass, 0)
            target = share * tl.where(complete, tl.sum(mass, 0), mass_of_all)
            inside = (before - mass < target) | (at == 0)
            kept = tl.where(share >= 1.0, kept, kept & inside)
            complete = complete | ((share < 1.0) & (tl.max(before, 0) >= target))
            filtered = filtered | (share < 1.0)
        if MIN_P:
            least = tl.load(min_p + row).to(tl.float64)
            limit = tl.log(tl.where(least > 0, least, 1e-300))
            kept = tl.where(least > 0, kept & ((below >= limit) | (at == 0)), kept)
            complete = complete | ((least > 0) & (first + limit >= floor.to(tl.float64)))
            filtered = filtered | (least > 0)
        heat = tl.load(temperature + row).to(tl.float64)
        mass = tl.where(kept, tl.exp(below / heat), 0.0)
        before = tl.cumsum(mass, 0)
        total = tl.sum(mass, 0)
        target = tl.load(uniform + row).to(tl.float64)
        target = target * tl.where(complete, total, tl.load(row_hot_masses + row))
        found = tl.min(tl.where(kept & (before >= target), at, CAPACITY), 0)
        # Rounding may leave the last one a hair short of the whole.
        last = tl.max(tl.where(kept, at, 0), 0)
        chosen = tl.where(found < CAPACITY, found, last)
        decided = (complete | ((filtered == 0) & (found < CAPACITY))) & (lacking == 0)
        if decided:
            tl.store(tokens + row, tl.sum(tl.where(at == chosen, ids, 0), 0))
        left = decided == 0
    tl.store(pending + row, left.to(tl.int32))
    tl.store(remaining + row, tl.load(row_masses + row))
    tl.store(remaining + tl.num_programs(0) + row, tl.load(row_hot_masses + row))

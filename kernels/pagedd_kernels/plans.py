"""How attention is cut into programs: pure functions of the shape, so they are tested on a CPU.

A bad number of splits is the performance bug every public attention kernel has had: too few, and
one long sequence keeps a few multiprocessors busy; too many, and short ones spend their time on
merging. The host knows upper bounds only (a CUDA graph is captured once for all lengths), so a plan
fixes how many parts there may be and how few keys are worth one; who gets how many follows on the
device from the real lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagedd_kernels.batch import AttentionShape

ROWS = 16
"""The least rows a tensor core takes: query heads are padded to it."""
FEW = 16
"""Sequences up to which the decode kernel divides the device among 16, else among 256 or more."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One token per sequence: a program per KV head and part of a sequence's keys."""

    tile: int
    """Keys per iteration."""
    warps: int
    stages: int
    """Tiles in flight."""
    spare: int
    """Parts beyond one per sequence; the device gives them to the long ones. 0: nothing is cut."""
    min_chunk: int
    """Keys that a part has at least."""


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """Several tokens per sequence: a program per tile of query rows, KV head and split."""

    rows: int
    """Query rows per tile: tokens times the query heads of one KV head."""
    tile: int
    warps: int
    stages: int
    splits: int
    min_chunk: int

    def tokens(self, group: int) -> int:
        """Tokens per tile of query rows."""
        return self.rows // group

    def tiles(self, tokens: int, sequences: int, group: int) -> int:
        """Upper bound of tiles of ``tokens`` spread over ``sequences`` in any way."""
        return tokens // self.tokens(group) + sequences


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """A product with few rows: a program per ``block`` output features."""

    block: int
    step: int
    """Inputs per iteration."""
    warps: int
    stages: int


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _splits(programs: int, longest: int, wanted: int, min_chunk: int, most: int) -> int:
    """Parts per sequence so that ``programs`` times them are about ``wanted``."""
    return max(1, min(ceil_div(wanted, programs), ceil_div(longest, min_chunk), most))


def decode_plan(
    shape: AttentionShape, sequences: int, max_context: int, multiprocessors: int
) -> DecodePlan:
    """How to decode ``sequences`` of up to ``max_context`` tokens.

    Measured on an H200 (32 query and 8 KV heads of 128): programs of four warps with two tiles in
    flight beside the one they compute read best nearly everywhere, two programs a multiprocessor
    for a few sequences (9.1 us for one of 2,048, 39.8 for one of 32 K). From one and a half
    programs a multiprocessor on, whole sequences alone would do (67 us for 32 of 2,048 without any
    spare part); the parts kept for long ones among them cost a launch that merges nothing where
    all are equal, but without them one of 32 K among 31 short ones took 472 us instead of 75. Where
    three programs or more share a multiprocessor, one tile in flight is enough (147 us for 256 of
    576 instead of 149).
    """
    longest = min(max_context, shape.window) if shape.window else max_context
    tile = 64 if shape.head_dim <= 128 else 32
    programs = sequences * shape.kv_heads
    if programs <= multiprocessors:
        spare = max(0, ceil_div(2 * multiprocessors, shape.kv_heads) - sequences)
    else:
        spare = ceil_div(4 * multiprocessors, shape.kv_heads)
    if 2 * programs >= 3 * multiprocessors:
        # Equal lengths then stay whole, and long ones are cut into parts of the mean length.
        spare = min(spare, sequences)
    # No more than what the longest lengths there may be can use.
    spare = min(spare, sequences * (ceil_div(longest, tile) - 1))
    return DecodePlan(tile, 4, 2 if programs >= 3 * multiprocessors else 3, spare, tile)


def linear_plan(rows: int, features: int) -> LinearPlan | None:
    """How to multiply ``rows`` with a matrix of ``features`` outputs; None: leave it to cuBLAS.

    Measured on an H200 at 1 and 16 rows, instead of cuBLAS's: output head 237 us (247), gate and up
    57 to 58 (58 to 61), QKV 15.3 (15.9), output projection 11.6 (12.5).
    """
    if rows > ROWS:
        return None
    if features < 8192:
        return LinearPlan(16, 512, warps=2, stages=3)
    return LinearPlan(32 if features < 65536 else 64, 128, warps=2, stages=3)


def varlen_plan(
    shape: AttentionShape, tokens: int, sequences: int, max_context: int, multiprocessors: int
) -> VarlenPlan:
    """How to attend from ``tokens`` of ``sequences`` of up to ``max_context`` tokens.

    Few tokens behind a long context (the rest of a prompt whose beginning was found in the pool)
    fill the device only when the keys are split too.
    """
    longest = min(max_context, shape.window + tokens) if shape.window else max_context
    group = shape.group
    wide = shape.head_dim > 128
    rows = 64 if wide or tokens * group <= 4096 else 128
    if tokens * group <= 16:
        rows = ROWS
    rows = max(rows, power_of_two(group))
    tile = 32 if wide or (sequences > 1 and rows < 128) else 64
    large = rows >= 128
    plan = VarlenPlan(rows, tile, 8 if large else 4, 3 if large else 2, 1, 2 * tile)
    programs = plan.tiles(tokens, 0, group) * shape.kv_heads + shape.kv_heads
    splits = 1
    if programs < multiprocessors:
        splits = _splits(programs, longest, 4 * multiprocessors, plan.min_chunk, most=32)
    return VarlenPlan(rows, tile, plan.warps, plan.stages, splits, plan.min_chunk)

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


def page_tokens(block_tokens: int, tile: int) -> int:
    """Keys of the largest piece of a tile that surely lies in one block: a power of two."""
    return min(tile, block_tokens & -block_tokens)


def _splits(programs: int, longest: int, wanted: int, min_chunk: int, most: int) -> int:
    """Parts per sequence so that ``programs`` times them are about ``wanted``."""
    return max(1, min(ceil_div(wanted, programs), ceil_div(longest, min_chunk), most))


def decode_plan(
    shape: AttentionShape, sequences: int, max_context: int, multiprocessors: int
) -> DecodePlan:
    """How to decode ``sequences`` of up to ``max_context`` tokens.

    Measured on an H200 (32 query and 8 KV heads of 128), with what follows each decision:

    * Few sequences are cut so that two programs share a multiprocessor, with three tiles in flight
      each. A third one does not fit, which matters: programs that spread unevenly are as slow as
      the multiprocessor that has most (65 us for 32 sequences of 2,048 tokens, 78 where a third one
      fitted).
    * From one program a multiprocessor on, parts shorter than 1,024 keys do not pay: 16 sequences
      of 582 tokens took 16 us in halves and 14 whole.
    * From one and a half programs on, whole sequences alone would do. The parts kept for long ones
      among them cost the short ones next to nothing; without them one of 32 K tokens among 31 short
      ones took 472 us instead of 55.
    * Where three programs or more share a multiprocessor, one tile in flight is enough (151 us for
      256 of 582 tokens, 95 % of the copy bandwidth).
    """
    longest = min(max_context, shape.window) if shape.window else max_context
    programs = sequences * shape.kv_heads
    few = programs <= 2 * multiprocessors
    tile = 64 if shape.head_dim <= 128 and (programs <= multiprocessors or not few) else 32
    if programs <= multiprocessors:
        spare = max(0, ceil_div(2 * multiprocessors, shape.kv_heads) - sequences)
    else:
        spare = ceil_div(4 * multiprocessors, shape.kv_heads)
    if 2 * programs >= 3 * multiprocessors:
        # Equal lengths then stay whole, and long ones are cut into parts of the mean length.
        spare = min(spare, sequences)
    # Merging takes as long as a few hundred keys: only where much of the device would wait are
    # fewer worth a part.
    least = tile if 4 * programs < 3 * multiprocessors else 1024
    # No more than what the longest lengths there may be can use.
    spare = min(spare, sequences * (ceil_div(longest, least) - 1))
    stages = 4 if few else 3 if programs < 3 * multiprocessors else 2
    return DecodePlan(tile, 4, stages, spare, least)


def linear_plan(rows: int, features: int) -> LinearPlan | None:
    """How to multiply ``rows`` with a matrix of ``features`` outputs; None: leave it to cuBLAS.

    Measured on an H200 at 1 and 16 rows, instead of cuBLAS's: output head 237 us (247), gate and up
    57 to 58 (58 to 61), QKV 15.3 (15.9), output projection 11.6 (12.5). At 32 rows only the output
    head gains (250 us, 268): with the others a step took 0.1 ms more, though two of them are as
    fast by themselves.
    """
    if rows > 2 * ROWS or (rows > ROWS and features < 65536):
        return None
    if features < 8192:
        return LinearPlan(16, 512, warps=2, stages=3)
    return LinearPlan(32 if features < 65536 else 64, 128, warps=2, stages=3)


def varlen_plan(
    shape: AttentionShape, tokens: int, sequences: int, max_context: int, multiprocessors: int
) -> VarlenPlan:
    """How to attend from ``tokens`` of ``sequences`` of up to ``max_context`` tokens.

    Measured on an H200 (32 query and 8 KV heads of 128): two programs of one warpgroup and 64 rows
    to a multiprocessor, of which one multiplies while the other takes exponentials: 597 us for a
    prompt of 6,000 tokens, 136 us for 512 tokens behind 7,680 and 80 us for eight prompts of 512.
    128 rows of two warpgroups, which wait for each other, took 624, 140 and 84 us.

    Few tokens behind a long context (the rest of a prompt whose beginning was found in the pool)
    fill the device only when the keys are split too.
    """
    longest = min(max_context, shape.window + tokens) if shape.window else max_context
    group = shape.group
    wide = shape.head_dim > 128
    rows = max(ROWS if tokens * group <= ROWS else 64, power_of_two(group))
    tile, stages = (32, 2) if wide else (64, 3)
    plan = VarlenPlan(rows, tile, 4, stages, 1, 2 * tile)
    programs = plan.tiles(tokens, 0, group) * shape.kv_heads + shape.kv_heads
    splits = 1
    if programs < multiprocessors:
        splits = _splits(programs, longest, 4 * multiprocessors, plan.min_chunk, most=32)
    return VarlenPlan(rows, tile, 4, stages, splits, plan.min_chunk)

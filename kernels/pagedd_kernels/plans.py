"""How attention is cut into programs: pure functions of the shape, so they are tested on a CPU.

A bad number of splits is the performance bug every public attention kernel has had: too few, and
one long sequence keeps a few multiprocessors busy; too many, and short ones spend their time on
merging. The host knows upper bounds only (a CUDA graph is captured once for all lengths), so a plan
fixes how many splits there may be and how few tokens are worth one; how many of them a sequence
then uses follows on the device from its real length.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagedd_kernels.batch import AttentionShape

ROWS = 16
"""The least rows a tensor core takes: query heads are padded to it."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One token per sequence: a program per sequence, KV head and split."""

    tile: int
    """Keys per iteration."""
    warps: int
    stages: int
    """Tiles in flight."""
    splits: int
    """Parts that the keys of one sequence may be cut into."""
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

    Five programs of two warps fit a multiprocessor by their registers, so a batch wants four times
    as many programs as there are multiprocessors. Where the sequences alone are half as many, only
    long ones get parts: otherwise one of 32 K among a hundred short ones would be the whole step.
    """
    longest = min(max_context, shape.window) if shape.window else max_context
    tile = 32 if shape.head_dim > 128 else 64
    programs = sequences * shape.kv_heads
    if programs < 2 * multiprocessors:
        chunk = 4 * tile
        splits = _splits(programs, longest, 4 * multiprocessors, chunk, most=128)
    else:
        chunk = 4096
        splits = _splits(1, longest, ceil_div(longest, chunk), chunk, most=8)
    return DecodePlan(tile, warps=2, stages=3, splits=splits, min_chunk=chunk)


def varlen_plan(
    shape: AttentionShape, tokens: int, sequences: int, max_context: int, multiprocessors: int
) -> VarlenPlan:
    """How to attend from ``tokens`` of ``sequences`` of up to ``max_context`` tokens.

    Few tokens behind a long context (the rest of a prompt whose beginning was found in the pool)
    fill the device only when the keys are split too.
    """
    longest = min(max_context, shape.window + tokens) if shape.window else max_context
    group = shape.group
    small = tokens * group <= 256
    rows = max(ROWS if small else 128 if shape.head_dim <= 128 else 64, power_of_two(group))
    tile = 64 if shape.head_dim <= 128 else 32
    plan = VarlenPlan(rows, tile, 2 if small else 8 if rows >= 128 else 4, 3, 1, 4 * tile)
    programs = plan.tiles(tokens, 0, group) * shape.kv_heads + shape.kv_heads
    splits = 1
    if programs < multiprocessors:
        splits = _splits(programs, longest, 2 * multiprocessors, plan.min_chunk, most=32)
    return VarlenPlan(rows, tile, plan.warps, plan.stages, splits, plan.min_chunk)

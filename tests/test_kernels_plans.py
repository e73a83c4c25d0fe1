"""Launch plans: enough programs for the device, never so many parts that merging is the work."""

from __future__ import annotations

import pytest

from pagedd_kernels.plans import decode_plan, varlen_plan
from tests.support.kernels import shape_of

MULTIPROCESSORS = 132
LLAMA_8B = shape_of(32, 8, 128)


@pytest.mark.parametrize("sequences", [1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 128, 256])
@pytest.mark.parametrize("context", [16, 128, 1000, 2048, 8192, 32768, 131072])
def test_decoding_fills_the_device_where_there_is_enough_to_read(
    sequences: int, context: int
) -> None:
    plan = decode_plan(LLAMA_8B, sequences, context, MULTIPROCESSORS)
    parts = sequences + plan.spare
    enough = sequences * (context // plan.min_chunk)
    assert parts * 8 >= min(1.5 * MULTIPROCESSORS, enough * 8)
    assert parts <= sequences * max(1, -(-context // plan.min_chunk))
    assert plan.spare * 8 <= 5 * MULTIPROCESSORS, "merging must not become the work"


def test_nothing_is_cut_where_a_tile_holds_a_sequence() -> None:
    assert decode_plan(LLAMA_8B, 64, 64, MULTIPROCESSORS).spare == 0
    windowed = shape_of(32, 8, 128, window=64)
    assert decode_plan(windowed, 64, 131072, MULTIPROCESSORS).spare == 0


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [2, 16, 100, 512, 6000])
def test_tiles_of_a_step_hold_at_least_one_token(group: int, head_dim: int, tokens: int) -> None:
    plan = varlen_plan(shape_of(group, 1, head_dim), tokens, 4, 8192, MULTIPROCESSORS)
    assert plan.tokens(group) >= 1
    assert plan.tiles(tokens, 4, group) * plan.tokens(group) >= tokens
    # K and V tiles in flight, and the queries, must fit 227 KiB of shared memory.
    pad = 1 << (head_dim - 1).bit_length()
    assert (2 * plan.stages * plan.tile + plan.rows) * pad * 2 <= 227 * 1024


def test_the_end_of_a_prompt_behind_a_found_prefix_is_split() -> None:
    assert varlen_plan(LLAMA_8B, 16, 1, 6000, MULTIPROCESSORS).splits >= 4
    assert varlen_plan(LLAMA_8B, 6000, 1, 6000, MULTIPROCESSORS).splits == 1

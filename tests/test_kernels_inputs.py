"""Tokens put in by the device and block tables spread out, in Triton's interpreter and in torch."""

from __future__ import annotations

import pytest
import torch

from pagedd_kernels.gpu.inputs import launch_resolve, launch_unpack
from pagedd_kernels.inputs import resolve_tokens, unpack_tables


@pytest.mark.parametrize("resolve", [resolve_tokens, launch_resolve])
def test_tokens_of_the_step_before_are_put_in_and_failed_draws_become_token_0(resolve) -> None:  # type: ignore[no-untyped-def]
    count = 1500
    tokens = torch.arange(count, dtype=torch.int32)
    sources = torch.full((count,), -1, dtype=torch.int32)
    sources[3], sources[1030], sources[1499] = 2, 0, 1
    drawn = torch.tensor([77, -1, 99], dtype=torch.int32)
    expected = tokens.clone()
    expected[3], expected[1030], expected[1499] = 99, 77, 0
    assert torch.equal(resolve(tokens, sources, drawn), expected)


@pytest.mark.parametrize("unpack", [unpack_tables, launch_unpack])
@pytest.mark.parametrize("width", [3, 1024, 1500])
def test_ragged_tables_become_rows_padded_with_block_0(unpack, width: int) -> None:  # type: ignore[no-untyped-def]
    lengths = [2, 0, min(width, 1400), 1]
    flat = torch.arange(1, sum(lengths) + 1, dtype=torch.int32)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    tables = torch.full((4, width), -7, dtype=torch.int32)
    unpack(flat, starts, tables)
    for row, length in enumerate(lengths):
        begin = int(starts[row])
        assert torch.equal(tables[row, :length], flat[begin : begin + length])
        assert not tables[row, length:].any()

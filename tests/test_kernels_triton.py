"""The Triton kernels in Triton's interpreter, against the references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pagedd_kernels import references
from pagedd_kernels.gpu import sampling as sampler
from pagedd_kernels.gpu import searching
from pagedd_kernels.gpu.decode import _shared_counters, decode_attention
from pagedd_kernels.gpu.division import division
from pagedd_kernels.gpu.softmax import Parts
from pagedd_kernels.gpu.varlen import varlen_attention
from pagedd_kernels.plans import DecodePlan
from tests.support.kernel_checks import Target, checks, sampling
from tests.support.kernels import close, shape_of, world

FLOAT32, FLOAT16 = Target("cpu", torch.float32), Target("cpu", torch.float16)
HALF = [
    n for n in checks(FLOAT16) if "group 1" in n or "cap 2" in n or "group 8" in n or "," not in n
]


@pytest.mark.parametrize("name", checks(FLOAT32))
def test_float32(name: str) -> None:
    checks(FLOAT32)[name]()


@pytest.mark.parametrize("name", HALF)
def test_float16(name: str) -> None:
    checks(FLOAT16)[name]()


# A device has no warnings; logits of 3e38 are meant to overflow to an infinity whose exp is 0.
_unbounded = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@_unbounded
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_draws_are_those_of_a_whole_sort(spread: float) -> None:
    sampling(FLOAT32, 700, spread, rows=8)


@_unbounded
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_draws_from_more_than_are_sorted_are_too(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a vocabulary of 128 K is to the real sizes.
    monkeypatch.setattr(sampler, "CAPACITY", 32)
    monkeypatch.setattr(sampler, "CHUNK", 16)
    monkeypatch.setattr(sampler, "BLOCK", 128)
    monkeypatch.setattr(searching, "_PROGRAMS", 64)  # as with many rows: several pieces each
    sampling(FLOAT32, 250, spread, rows=8)


def test_parts_go_to_the_long_sequences() -> None:
    w = world(shape_of(2, 1, 16), [(1, 5), (1, 400), (1, 0), (1, 90), (1, 16)])
    plan = DecodePlan(tile=16, warps=4, stages=2, spare=4, min_chunk=32)
    work, _ = division(w.batch, w.shape, plan, layer=0)
    # 511 keys in 4 parts are 128 each: four for the long one, of which none is longer than 112, and
    # one for everybody else, padding too. Sequence, row, from, to, parts, first item.
    assert work[:8, :6].tolist() == [
        [0, 0, 0, 5, 1, 0],
        [1, 1, 0, 112, 4, 1], [1, 1, 112, 224, 4, 1], [1, 1, 224, 336, 4, 1],
        [1, 1, 336, 400, 4, 1],
        [2, 2, 0, 0, 1, 5], [3, 3, 0, 90, 1, 6], [4, 4, 0, 16, 1, 7],
    ]  # fmt: skip
    assert work[8, 4] == 0
    blocks = w.batch.block_tables[1]
    assert work[2, 6] == blocks[7], "and the blocks of a part's first tile"
    windowed = replace(w.shape, window=50)
    assert division(w.batch, windowed, plan, layer=0)[0][1:4, 2:5].tolist() == [
        [350, 382, 2], [382, 400, 2], [0, 0, 1],
    ]  # fmt: skip


def test_single_tokens_of_a_mixed_step_are_divided_and_prompts_are_not() -> None:
    w = world(shape_of(2, 1, 16), [(7, 40), (1, 70), (3, 0), (1, 20)])
    plan = DecodePlan(tile=16, warps=4, stages=2, spare=2, min_chunk=16)
    work, _ = division(w.batch, w.shape, plan, layer=0)
    assert work[:3, [0, 1, 4]].tolist() == [[1, 7, 2], [1, 7, 2], [3, 11, 1]]
    assert not work[3:, 4].any()


def test_a_division_serves_the_layers_above_the_one_that_made_it() -> None:
    w = world(shape_of(2, 1, 16), [(1, 5), (1, 400)])
    plan = DecodePlan(tile=16, warps=4, stages=2, spare=4, min_chunk=32)
    made, fresh = division(w.batch, w.shape, plan, layer=0)
    assert fresh
    w.batch.context_lens.fill_(3)
    again, fresh = division(w.batch, w.shape, plan, layer=1)
    assert again is made
    assert not fresh
    assert division(w.batch, w.shape, plan, layer=0)[0][:2, 3].tolist() == [3, 3]


def test_merging_leaves_the_counters_as_they_were() -> None:
    w = world(shape_of(4, 2, 16), [(1, 200), (1, 90)])
    plan = DecodePlan(tile=16, warps=2, stages=2, spare=9, min_chunk=16)
    expected = references.paged_attention(w.q, w.kv, 1, w.batch, w.shape)
    for _ in range(2):
        close(decode_attention(w.q, w.kv, 1, w.batch, w.shape, plan=plan), expected, 1e-5)
    assert not _shared_counters(w.q.device).any()


def test_blocks_beyond_two_to_the_31st_element_are_found() -> None:
    shape = shape_of(2, 1, 16)
    apart = 2**28  # elements from block to block; pages that nobody touches take no memory
    for lengths in ([(1, 60), (1, 90)], [(1, 60), (6, 90)]):
        w = world(shape, lengths)
        blocks = w.kv.shape[0]
        assert blocks * apart > 2**31
        memory = torch.empty(blocks * apart, dtype=torch.float32)
        kv = memory.as_strided(w.kv.shape, (apart, *w.kv.stride()[1:]))
        kv.copy_(w.kv)
        attention = decode_attention if w.batch.max_query == 1 else varlen_attention
        expected = references.paged_attention(w.q, w.kv, 1, w.batch, shape)
        close(attention(w.q, kv, 1, w.batch, shape), expected, 1e-5)


def test_rows_of_padding_have_nothing_to_merge() -> None:
    torch.use_deterministic_algorithms(True)  # fills what `empty` returns
    try:
        parts = Parts(torch.zeros(8, 4, 64), rows=8, heads=4, splits=4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not parts.used.any(), "no program writes the count of a row that no sequence has"

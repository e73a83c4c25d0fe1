"""The Triton kernels in Triton's interpreter, against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from pagedd_kernels import references
from pagedd_kernels.gpu import sampling as sampler
from pagedd_kernels.gpu.decode import _work_of, decode_attention
from pagedd_kernels.gpu.softmax import Parts
from pagedd_kernels.gpu.varlen import varlen_attention
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
    sampling(FLOAT32, 250, spread, rows=8)


def test_parts_go_to_the_long_sequences() -> None:
    lens = torch.tensor([5, 400, 0, 90, 16], dtype=torch.int32)
    items, spare = 9, 4
    division = torch.zeros(items, 5, dtype=torch.int32)
    _division[(items,)](division, lens, lens, 5, spare, 32, 16, 16)
    # 511 keys in 4 parts are 128 each: four for the long one, one for everybody else, padding too.
    assert division[:, :3].tolist() == [
        [0, 0, 1], [1, 0, 4], [1, 1, 4], [1, 2, 4], [1, 3, 4], [2, 0, 1], [3, 0, 1], [4, 0, 1],
        [16, 8, 0],
    ]  # fmt: skip
    assert division[0, 4] == 128


@triton.jit  # type: ignore[untyped-decorator]
def _division(
    out: Any, starts: Any, lens: Any, sequences: Any, spare: Any, least: Any,
    tile: tl.constexpr, width: tl.constexpr,
) -> None:  # fmt: skip
    item = tl.program_id(0)
    seq, part, count, begin, chunk = _work_of(
        item, starts, lens, sequences, 0, spare, least, tile, width, False
    )
    tl.store(out + item * 5, seq)
    tl.store(out + item * 5 + 1, part)
    tl.store(out + item * 5 + 2, count)
    tl.store(out + item * 5 + 3, begin)
    tl.store(out + item * 5 + 4, chunk)


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

"""The contiguous baselines: no overlap, buddies merge, nothing is lost, waste adds up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpager.baselines import (
    BuddyAllocator,
    ContiguousPager,
    Reservation,
    Span,
    StaticBatchPager,
    exact,
    longest,
    next_power_of_two,
)
from kvpager.errors import ImpossibleEventError
from kvpager.types import (
    Admit,
    Admitted,
    CopyBlock,
    DeferReason,
    Deferred,
    Denied,
    Fork,
    Free,
    PoolSplit,
    Preempt,
    Release,
    Reserve,
    Reserved,
    Shortage,
    StepFailed,
    StepLaunched,
    StepRetired,
    Truncate,
)

SLOTS = 15_728
"""OPT-13B in 12 GB of KV: the paper's pool."""
ROOT = bytes(32)


def admit(seq: int, prompt: int, output: int, width: int = 1) -> Admit:
    """A request that carries its true output length in its group."""
    return Admit(seq, np.zeros(prompt, np.int32), ROOT, width=width, group=output)


def known(event: Admit) -> int:
    return event.group


def pager_of(reservation: Reservation, slots: int = SLOTS) -> ContiguousPager:
    return ContiguousPager(slots, reservation, known)


def step(pager: ContiguousPager, epoch: int, *parts: tuple[int, int]) -> None:
    seqs, counts = tuple(s for s, _ in parts), tuple(n for _, n in parts)
    reserved = pager.handle(Reserve(seqs, counts))
    assert reserved == [Reserved(())]
    pager.handle(StepLaunched(epoch, seqs, counts))
    pager.handle(StepRetired(epoch, tuple(np.zeros(n, np.int32) for n in counts)))


def total(split: PoolSplit) -> int:
    return split.token_state + split.reserved + split.internal + split.external


# ---------------------------------------------------------------------------------------- buddies


@given(
    slots=st.integers(1, 3000),
    script=st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=80),
)
def test_spans_never_overlap_and_everything_merges_again(
    slots: int, script: list[tuple[bool, int]]
) -> None:
    buddy = BuddyAllocator(slots)
    untouched = buddy.spans()
    out: list[Span] = []
    for take, number in script:
        if take:
            span = buddy.allocate(number)
            if span is not None:
                assert number <= span.size < 2 * number
                out.append(span)
            else:
                assert all(free.size < number for free in buddy.spans()[1])
        elif out:
            buddy.release(out.pop(number % len(out)))
        buddy.validate()
        assert sum(span.size for span in out) + buddy.free_slots == slots
    for span in out:
        buddy.release(span)
    buddy.validate()
    assert buddy.spans() == untouched


def test_a_pool_that_is_no_power_of_two_starts_as_its_binary_digits() -> None:
    _, free = BuddyAllocator(SLOTS).spans()
    assert [span.size for span in free] == [8192, 4096, 2048, 1024, 256, 64, 32, 16]


@pytest.mark.parametrize("slots", [1, 7, 2047, 2048])
def test_an_empty_pool_holds_as_many_spans_as_it_says(slots: int) -> None:
    buddy = BuddyAllocator(SLOTS)
    count = 0
    while buddy.allocate(slots) is not None:
        count += 1
    assert count == BuddyAllocator(SLOTS).fits(slots)


def test_a_span_cannot_be_released_twice() -> None:
    buddy = BuddyAllocator(64)
    span = buddy.allocate(8)
    assert span is not None
    buddy.release(span)
    with pytest.raises(ImpossibleEventError):
        buddy.release(span)


# ----------------------------------------------------------------------------------- reservations


def test_pow2_reserves_32_for_an_output_of_25_as_the_paper_says() -> None:
    assert next_power_of_two(100, 25, 2048) == 132
    assert next_power_of_two(100, 32, 2048) == 132
    assert next_power_of_two(100, 33, 2048) == 164
    assert next_power_of_two(1500, 400, 2048) == 2012
    assert next_power_of_two(1500, 540, 2048) == 2048


def test_max_takes_seven_requests_in_the_papers_pool() -> None:
    pager = pager_of(longest)
    verdicts = [pager.handle(admit(seq, 10, 10))[0] for seq in range(8)]
    assert [type(v) for v in verdicts] == [Admitted] * 7 + [Deferred]
    assert isinstance(verdicts[7], Deferred)
    assert verdicts[7].reason is DeferReason.BLOCKS
    assert pager.stats().gpu.free == SLOTS - 7 * 2048


@pytest.mark.parametrize(
    ("reservation", "split"),
    [
        # 100 prompt tokens and 5 of 25 output tokens are there: 105.
        (exact, PoolSplit(105, 20, 0, 3)),
        (next_power_of_two, PoolSplit(105, 20, 7, 124)),
        (longest, PoolSplit(105, 20, 1923, 0)),
    ],
)
def test_the_four_kinds_of_waste_are_told_apart(reservation: Reservation, split: PoolSplit) -> None:
    pager = pager_of(reservation)
    pager.handle(admit(1, 100, 25))
    step(pager, 1, (1, 100))
    for epoch in range(2, 7):
        step(pager, epoch, (1, 1))
    assert pager.split() == split
    pager.validate()


# ------------------------------------------------------------------------------------- histories

Steps = list[tuple[str, int, int]]


@pytest.mark.parametrize("reservation", [longest, next_power_of_two, exact])
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["admit", "step", "step", "free", "fail", "truncate"]),
            st.integers(1, 300),
            st.integers(1, 300),
        ),
        max_size=60,
    )
)
def test_slots_are_conserved_through_any_history(reservation: Reservation, script: Steps) -> None:
    pager = pager_of(reservation, 5000)
    left: dict[int, int] = {}
    epoch = 0
    for seq, (what, a, b) in enumerate(script):
        chosen = list(left)[a % len(left)] if left else None
        if what == "admit":
            [verdict] = pager.handle(admit(seq, a, b))
            if isinstance(verdict, Admitted):
                left[seq] = a + b
        elif chosen is not None and what in ("step", "fail"):
            count = min(b, left[chosen])
            if count == 0:
                continue
            epoch += 1
            assert pager.handle(Reserve((chosen,), (count,))) == [Reserved(())]
            pager.handle(StepLaunched(epoch, (chosen,), (count,)))
            if what == "fail":
                pager.handle(StepFailed(epoch))
            else:
                pager.handle(StepRetired(epoch, (np.zeros(count, np.int32),)))
                left[chosen] -= count
        elif chosen is not None and what == "truncate":
            before = len(pager.block_table(chosen))
            pager.handle(Truncate(chosen, b))
            left[chosen] += before - min(before, b)
        elif chosen is not None and what == "free":
            assert pager.handle(Free(chosen)) == [Release(chosen)]
            del left[chosen]
        pager.validate()
        stats = pager.stats()
        assert stats.gpu.used + stats.gpu.free == stats.gpu.total == 5000
        assert total(stats.split) == stats.gpu.used
        assert min(stats.split.reserved, stats.split.internal, stats.split.external) >= 0
    tables = [set(pager.block_table(seq).tolist()) for seq in left]
    assert sum(map(len, tables)) == len(set().union(*tables))
    for seq in list(left):
        pager.handle(Free(seq))
    assert pager.stats().gpu.free == 5000


def test_a_stretch_that_ends_early_gives_its_other_room_back() -> None:
    pager = pager_of(exact)
    pager.handle(admit(1, 100, 28))
    step(pager, 1, (1, 100))
    pager.handle(StepLaunched(2, (1,), (8,)))
    pager.handle(StepRetired(2, (np.zeros(3, np.int32),)))
    assert pager.split() == PoolSplit(103, 25, 0, 0)
    pager.validate()
    pager.handle(StepLaunched(3, (1,), (2,)))
    with pytest.raises(ImpossibleEventError):
        pager.handle(StepRetired(3, (np.zeros(3, np.int32),)))
    pager.handle(StepRetired(3, (np.zeros(2, np.int32),)))


def test_a_request_that_can_never_fit_is_denied_with_the_figures() -> None:
    pager = pager_of(exact, 1000)
    assert pager.handle(admit(1, 900, 100)) == [Denied(1, 1000, 1000)]
    assert pager.handle(admit(2, 200, 56, width=4)) == [Denied(2, 1024, 1000)]
    assert isinstance(pager.handle(admit(3, 400, 112))[0], Admitted)


def test_samples_are_copies_with_spans_of_their_own() -> None:
    pager = pager_of(exact, 1000)
    pager.handle(admit(1, 100, 28, width=3))
    assert pager.stats().gpu.used == 3 * 128
    step(pager, 1, (1, 100))
    copies = pager.handle(Fork(1, (2, 3)))
    assert [(c.seq, c.tokens) for c in copies if isinstance(c, CopyBlock)] == [(2, 100), (3, 100)]
    step(pager, 2, (1, 1), (2, 1), (3, 1))
    tables = [set(pager.block_table(seq).tolist()) for seq in (1, 2, 3)]
    assert len(set().union(*tables)) == 303
    with pytest.raises(ImpossibleEventError):
        pager.handle(Fork(1, (4,)))
    pager.validate()


def test_samples_that_were_never_forked_go_with_their_parent() -> None:
    pager = pager_of(exact, 1000)
    pager.handle(admit(1, 100, 28, width=3))
    pager.handle(Free(1))
    assert pager.stats().gpu.free == 1000


@pytest.mark.parametrize(
    "event",
    [
        lambda: Preempt(1),
        lambda: Free(9),
        lambda: Reserve((9,), (1,)),
        lambda: StepLaunched(1, (1,), (500,)),
        lambda: StepRetired(7, ()),
        lambda: admit(1, 10, 10),
    ],
)
def test_an_impossible_event_carries_the_story_and_changes_nothing(
    event: Callable[[], Preempt | Free | Reserve | StepLaunched | StepRetired | Admit],
) -> None:
    pager = pager_of(exact)
    pager.handle(admit(1, 100, 28))
    before = pager.stats()
    with pytest.raises(ImpossibleEventError) as error:
        pager.handle(event())
    assert "Admit(seq=1" in error.value.story[0]
    assert pager.stats() == before


def test_a_sequence_has_no_room_past_its_reservation() -> None:
    pager = pager_of(exact)
    pager.handle(admit(1, 100, 28))
    assert pager.handle(Reserve((1,), (130,))) == [Reserved((Shortage(1, 2),))]


# ------------------------------------------------------------------------------------------ static


def test_a_static_batch_takes_nobody_in_until_all_of_it_has_ended() -> None:
    pager = StaticBatchPager(SLOTS, known)
    for seq in (1, 2):
        assert isinstance(pager.handle(admit(seq, 10, 10))[0], Admitted)
    step(pager, 1, (1, 10), (2, 10))
    assert isinstance(pager.handle(admit(3, 10, 10))[0], Deferred)
    pager.handle(Free(1))
    assert pager.batch_width == 2
    assert isinstance(pager.handle(admit(4, 10, 10))[0], Deferred)
    stats = pager.stats()
    assert stats.gpu.used == 2 * 2048 == total(stats.split)
    pager.validate()
    pager.handle(Free(2))
    assert pager.batch_width == 0
    assert pager.stats().gpu.free == SLOTS
    assert isinstance(pager.handle(admit(5, 10, 10))[0], Admitted)

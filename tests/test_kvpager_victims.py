"""Who is preempted, how, and what quotas allow."""

from __future__ import annotations

import pytest

from kvpager import (
    Admitted,
    DeferReason,
    Deferred,
    Denied,
    Fork,
    Free,
    Pager,
    PagerConfig,
    Preempt,
    Preempted,
    PreemptMode,
    Reserve,
    Reserved,
    Resume,
    SetQuota,
    Shortage,
    Tier,
)
from tests.support.pager_caller import OTHER_ROOT, ROOT, Caller, ids


def test_the_victim_is_the_newest_of_the_lowest_class_and_never_one_just_resumed() -> None:
    caller = Caller(ram=32)
    for seq, klass in ((1, 0), (2, 2), (3, 2), (4, 1)):
        caller.prompt(seq, ids(5, 100 * seq), klass=klass)
    choose = caller.pager.choose_victim
    assert choose((1, 2, 3, 4)) == 3
    caller(Preempt(3, PreemptMode.RECOMPUTE))
    assert choose((1, 2, 3, 4)) == 2
    assert caller(Resume(3))[-1] == Admitted(3, 4, False)
    assert choose((1, 2, 3, 4)) == 2
    caller.compute(3, ids(1, 304))
    assert choose((1, 2, 3, 4)) == 3
    assert choose(()) is None


def test_auto_preempts_as_the_measured_rates_say() -> None:
    caller = Caller(ram=32)
    caller.pager.observe(
        prefill_tokens_per_s=1e6, load_tokens_per_s=100.0, store_tokens_per_s=100.0
    )
    caller.prompt(1, ids(10))
    caller.admit(2, ids(10))
    assert caller(Preempt(2))[-1] == Preempted(2, PreemptMode.RECOMPUTE, 0)
    caller.pager.observe(prefill_tokens_per_s=1.0)
    for _ in range(80):
        caller.pager.observe(
            prefill_tokens_per_s=1.0, load_tokens_per_s=1e6, store_tokens_per_s=1e6
        )
    assert caller(Preempt(1))[-1] == Preempted(1, PreemptMode.SWAP, 0)


def test_a_namespace_gets_no_more_than_its_ceiling_and_says_so() -> None:
    caller = Caller(gpu=16)
    caller(SetQuota(ROOT, 0, 4))
    assert caller.admit(1, ids(16)) == [Denied(1, 5, 4)]
    caller.prompt(2, ids(8))
    assert caller.admit(3, ids(12, 50)) == [Deferred(3, DeferReason.QUOTA, 3, 2)]
    # It says so even where the pool is full, too: others would make way for nothing.
    caller.prompt(6, ids(50, 80), OTHER_ROOT)
    assert caller.admit(3, ids(12, 50)) == [Deferred(3, DeferReason.QUOTA, 3, 2)]
    caller(Free(6))
    # What it shares with itself counts once.
    caller.admit(4, ids(9))
    assert caller.pager.namespace_blocks(ROOT) == 3
    caller.compute(4, ids(4, 8))
    assert caller(Reserve((4,), (1,))) == [Reserved(())]
    assert caller(Reserve((2,), (1,))) == [Reserved((Shortage(2, 1, DeferReason.QUOTA),))]
    # Others are not concerned, and what it has cached is not what it holds.
    caller.prompt(5, ids(20), OTHER_ROOT)
    caller(Free(4))
    assert caller(Reserve((2,), (1,))) == [Reserved(())]


def test_the_victim_of_a_class_is_of_the_namespace_most_over_its_floor() -> None:
    caller = Caller(gpu=32)
    caller.prompt(1, ids(20), ROOT)
    caller.prompt(2, ids(12), OTHER_ROOT)
    caller.prompt(3, ids(4, 90), ROOT, klass=2)
    choose = caller.pager.choose_victim
    assert choose((1, 2)) == 2
    caller(SetQuota(ROOT, 0, 0))
    caller(SetQuota(OTHER_ROOT, 1, 0))
    assert choose((1, 2)) == 1
    # At its floor it is spared, whatever its class, unless nobody else is left.
    caller(SetQuota(ROOT, 6, 0))
    assert choose((1, 2, 3)) == 2
    assert choose((1, 3)) == 3


def with_rates(ram: int) -> Caller:
    caller = Caller(ram=ram)
    caller.pager.observe(
        prefill_tokens_per_s=100.0, load_tokens_per_s=1000.0, store_tokens_per_s=1000.0
    )
    return caller


def test_among_equals_the_victim_is_whoever_costs_least_for_what_it_gives_back() -> None:
    caller = with_rates(ram=32)
    caller.admit(1, ids(20))  # holds five blocks, and has computed nothing yet
    caller.prompt(2, ids(20, 100))
    assert caller.pager.choose_victim((1, 2)) == 1
    caller.compute(1, ids(20))
    assert caller.pager.choose_victim((1, 2)) == 2


def test_a_sequence_whose_blocks_others_hold_too_is_no_victim() -> None:
    caller = with_rates(ram=32)
    caller.prompt(1, ids(20))
    caller.prompt(2, ids(8, 100))
    caller(Fork(2, (3,)))
    assert caller.pager.choose_victim((1, 2, 3)) == 1


def test_the_samples_of_a_request_are_weighed_and_spared_together() -> None:
    caller = with_rates(ram=32)
    caller.prompt(1, ids(20))
    caller.prompt(2, ids(8, 100), group=7, width=2)
    caller(Fork(2, (3,)))
    assert caller.pager.choose_victim((1, 2, 3)) in (2, 3)
    caller(Preempt(2))
    caller.settle()
    caller(Resume(2))
    caller.settle()
    caller.compute(3, ids(1, 50))
    # 2 has come back and has not advanced since: its group is left alone.
    assert caller.pager.choose_victim((1, 2, 3)) == 1


def test_who_has_been_preempted_often_is_spared_for_others_of_its_class() -> None:
    caller = with_rates(ram=64)
    caller.prompt(1, ids(20))
    caller.prompt(2, ids(20, 100))
    chosen = []
    for turn in range(6):
        victim = caller.pager.choose_victim((1, 2))
        assert victim is not None
        chosen.append(victim)
        caller(Preempt(victim, PreemptMode.SWAP))
        caller.settle()
        caller(Resume(victim))
        caller.settle()
        caller.compute(victim, ids(1, 500 + turn))
    assert {chosen.count(1), chosen.count(2)} <= {2, 3, 4}, chosen


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="lower tier"):
        Caller().pager.observe(load_tokens_per_s=1.0, tier=Tier.GPU)
    with pytest.raises(ValueError, match="positive"):
        Caller().pager.observe(load_tokens_per_s=0.0)


def test_the_rates_that_are_known_are_told_by_name() -> None:
    pager = Pager(PagerConfig(gpu_blocks=2, ram_blocks=2, disk_blocks=2))
    assert pager.rates() == {}
    pager.observe(prefill_tokens_per_s=100.0)
    pager.observe(load_tokens_per_s=50.0, tier=Tier.DISK)
    pager.observe(load_tokens_per_s=500.0, store_tokens_per_s=400.0)
    pager.observe(load_tokens_per_s=1_000.0)
    rates = {"prefill": 100.0, "disk_load": 50.0, "ram_load": 600.0, "ram_store": 400.0}
    assert pager.rates() == rates

"""Pools that shrink and grow while sequences run."""

from __future__ import annotations

import numpy as np

from kvpager import (
    Admitted,
    CopyBlock,
    DeferReason,
    Deferred,
    Fork,
    Free,
    Grown,
    Load,
    Preempt,
    Pressure,
    Reserve,
    Resume,
    Shrunk,
    StepRetired,
)
from tests.support.pager_caller import SIZE, Caller, ids


def test_cached_pages_beyond_the_end_are_dropped_and_running_blocks_moved() -> None:
    caller = Caller(gpu=8)
    caller.prompt(1, ids(12))
    caller.prompt(2, ids(12, 50))
    assert caller.table(2) == (3, 4, 5)
    caller(Free(1))
    # The cached blocks 0 to 2 make room for 4 and 5.
    out = caller(Pressure(4))
    moved = [(item.seq, item.index, item.src, item.tokens) for item in out[:-1]]  # type: ignore[union-attr]
    assert moved == [(2, 1, 4, SIZE), (2, 2, 5, SIZE)]
    assert out[-1] == Shrunk(4)
    assert max(caller.table(2)) < 4
    assert caller.pager.stats().gpu.total == 4
    # It goes on where it was, and its pages are found under their names.
    caller.compute(2, ids(1, 62))
    caller(Free(2))
    assert caller.admit(3, ids(9, 50))[-1] == Admitted(3, 8, False)


def test_the_end_is_said_when_steps_and_transfers_have_let_go() -> None:
    caller = Caller(gpu=8, ram=8)
    caller.prompt(1, ids(8))
    caller.prompt(2, ids(8, 50))
    caller.prompt(3, ids(8, 100))
    epoch = caller.launch(2, 1)
    assert Shrunk(3) not in caller(Pressure(3))
    assert caller.pager.excess() > 0
    caller(Preempt(2))
    # What is on its way out is not asked for twice.
    caller(Preempt(3))
    assert caller.pager.excess() == 0
    assert Shrunk(3) not in caller(StepRetired(epoch, (ids(1, 58),)))
    assert caller.settle()[-1] == Shrunk(3)


def test_whoever_does_not_fit_any_more_waits_for_the_pool_to_grow_again() -> None:
    caller = Caller(gpu=8, ram=16)
    caller.prompt(1, ids(20))
    assert caller(Pressure(4)) == []
    assert caller.pager.excess() == 1
    caller(Preempt(1))
    assert caller.settle()[-1] == Shrunk(4)
    assert caller.pager.excess() == 0
    assert caller(Resume(1)) == [Deferred(1, DeferReason.POOL, 6, 4)]
    assert caller.admit(2, ids(20, 90)) == [Deferred(2, DeferReason.POOL, 5, 4)]
    caller.prompt(3, ids(9, 70))
    assert caller(Pressure(8))[0] == Grown(8)
    caller(Free(3))
    out = caller(Resume(1))
    assert any(isinstance(item, Load) for item in out)
    assert out[-1] == Admitted(1, 20, True)


def test_a_block_that_several_hold_moves_for_all_of_them() -> None:
    caller = Caller(gpu=8)
    caller.prompt(9, ids(16, 90))
    caller.prompt(1, ids(7))
    caller(Fork(1, (2, 3)))
    caller(Free(9))
    out = caller(Pressure(4))
    copies = [item for item in out if isinstance(item, CopyBlock)]
    moved = {(item.seq, item.index) for item in copies}
    assert moved == {(seq, index) for seq in (1, 2, 3) for index in (0, 1)}
    assert len({(item.src, item.dst) for item in copies}) == 2
    assert out[-1] == Shrunk(4)
    assert caller.table(1) == caller.table(2) == caller.table(3)
    # And is copied on write as before.
    assert any(isinstance(item, CopyBlock) for item in caller(Reserve((1,), (1,))))


def test_a_step_in_flight_keeps_the_blocks_it_was_launched_with_until_it_has_retired() -> None:
    caller = Caller(gpu=8)
    caller.prompt(9, ids(16, 90))
    caller.prompt(1, ids(7))
    caller(Free(9))
    before = set(caller.table(1))
    epoch = caller.launch(1, 1)
    out = caller(Pressure(4))
    assert {item.src for item in out if isinstance(item, CopyBlock)} == before
    assert Shrunk(4) not in out
    assert caller(StepRetired(epoch, (np.array([7], np.int32),))) == [Shrunk(4)]


def test_a_pool_that_grows_before_it_has_shrunk_says_only_the_last_end() -> None:
    caller = Caller(gpu=8)
    caller.prompt(1, ids(24))
    assert Shrunk(2) not in caller(Pressure(2))
    out = caller(Pressure(7))
    assert out[0] == Grown(7)
    assert out[-1] == Shrunk(7)
    assert caller(Pressure(8)) == [Grown(8)]

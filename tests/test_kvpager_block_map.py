"""The block map tells of every block of every tier what it is doing, and for whom."""

from __future__ import annotations

from collections import Counter

from kvpager import (
    CellState,
    Fork,
    Free,
    Preempt,
    PreemptMode,
    Pressure,
    PriorityClass,
    StepRetired,
    Tier,
    TierMap,
)
from tests.support.pager_caller import OTHER_ROOT, SIZE, Caller, ids

MOST = 1 << 20


def cells(caller: Caller, tier: Tier = Tier.GPU) -> bytes:
    found = caller.pager.block_map(MOST)[tier]
    assert found.every == 1
    return found.cells


def states(caller: Caller, tier: Tier = Tier.GPU) -> Counter[CellState]:
    return Counter(CellState(cell & 7) for cell in cells(caller, tier))


def owner(cell: int) -> PriorityClass | None:
    mark = cell >> TierMap.CLASS_SHIFT
    return PriorityClass(mark - 1) if mark else None


def test_each_block_says_its_state_and_the_class_of_whoever_holds_it() -> None:
    caller = Caller(gpu=8)
    assert cells(caller) == bytes(8)
    caller.prompt(1, ids(2 * SIZE), klass=PriorityClass.BACKGROUND)
    caller.prompt(2, ids(SIZE), OTHER_ROOT, klass=PriorityClass.INTERACTIVE)
    shown = cells(caller)
    for seq, klass in ((1, PriorityClass.BACKGROUND), (2, PriorityClass.INTERACTIVE)):
        for block in caller.table(seq):
            assert (shown[block] & 7, owner(shown[block])) == (CellState.HELD, klass)
    assert states(caller) == {CellState.HELD: 3, CellState.FREE: 5}
    held = caller.table(1)
    caller(Free(1))
    assert [cells(caller)[block] for block in held] == [CellState.CACHED] * 2


def test_a_shared_block_is_marked_and_has_the_most_important_of_its_classes() -> None:
    caller = Caller(gpu=8)
    caller.prompt(1, ids(2 * SIZE), klass=PriorityClass.INTERACTIVE)
    caller.admit(2, ids(2 * SIZE), klass=PriorityClass.BACKGROUND)
    shared, own = caller.table(1)
    shown = cells(caller)
    assert shown[shared] & TierMap.SHARED
    assert owner(shown[shared]) is PriorityClass.INTERACTIVE
    assert not shown[own] & TierMap.SHARED
    caller(Free(1))
    assert owner(cells(caller)[shared]) is PriorityClass.BACKGROUND


def test_a_swapped_out_sequence_holds_its_pages_below_until_it_is_back() -> None:
    caller = Caller(gpu=8, ram=8)
    caller.prompt(1, ids(2 * SIZE + 1), klass=PriorityClass.NORMAL)
    caller(Preempt(1, PreemptMode.SWAP))
    assert states(caller, Tier.RAM)[CellState.LOADING] == 3
    assert states(caller)[CellState.STORING] == 3
    caller.settle()
    below = [cell for cell in cells(caller, Tier.RAM) if cell]
    assert [cell & 7 for cell in below] == [CellState.HELD] * 3
    assert {owner(cell) for cell in below} == {PriorityClass.NORMAL}
    assert states(caller)[CellState.HELD] == 0
    caller(Free(1))
    assert states(caller, Tier.RAM)[CellState.HELD] == 0


def test_what_a_running_step_may_touch_and_what_was_given_back_is_not_free() -> None:
    caller = Caller(gpu=8)
    caller.prompt(1, ids(SIZE))
    epoch = caller.launch(1, 1)
    table = caller.table(1)
    caller(Free(1))
    # An ending waits for the step; until then the sequence has its blocks.
    assert all(cells(caller)[block] & 7 != CellState.FREE for block in table)
    caller(StepRetired(epoch, (ids(1),)))
    caller(Pressure(6))
    assert [cell & 7 for cell in cells(caller)[6:]] == [CellState.WITHHELD] * 2
    assert states(caller)[CellState.WITHHELD] == 2


def test_the_figures_of_the_pager_and_its_map_agree() -> None:
    caller = Caller(gpu=16, ram=16, disk=4)
    caller.prompt(1, ids(5 * SIZE))
    caller.prompt(2, ids(3 * SIZE + 1), OTHER_ROOT)
    caller(Fork(1, (3,)))
    caller(Preempt(2, PreemptMode.SWAP))
    caller.settle()
    stats = caller.pager.stats()
    for tier, usage in ((Tier.GPU, stats.gpu), (Tier.RAM, stats.ram), (Tier.DISK, stats.disk)):
        seen = states(caller, tier)
        assert seen[CellState.FREE] == usage.free
        assert seen[CellState.CACHED] == usage.cached
        assert seen.total() == usage.total


def test_a_large_pool_is_shown_by_blocks_evenly_spread_over_it() -> None:
    caller = Caller(gpu=100)
    caller.prompt(1, ids(50 * SIZE))
    found = caller.pager.block_map(30)[Tier.GPU]
    assert found.every == 4
    assert found.cells == cells(caller)[::4]
    assert caller.pager.block_map(30)[Tier.RAM] == TierMap(1, b"")

"""Full blocks of running sequences are kept in RAM too, and nobody pays for it."""

from __future__ import annotations

from kvpager import Admitted, Free, Load, Store, Tier, TransferFailed, Truncate
from tests.support.pager_caller import SIZE, Caller, ids


def stores(out: list[object]) -> list[Store]:
    return [item for item in out if isinstance(item, Store)]


def saved(caller: Caller) -> int:
    return caller.pager.stats().ram.cached


def test_each_full_block_is_stored_once_when_the_step_that_filled_it_is_over() -> None:
    caller = Caller(ram=32, through=True)
    caller.admit(1, ids(2 * SIZE + 1))
    (store,) = stores([*caller.compute(1, ids(2 * SIZE + 1))])
    assert (store.seq, store.tier, store.through) == (1, Tier.RAM, True)
    assert [page.index for page in store.pages] == [0, 1]
    caller.settle()
    assert saved(caller) == 2
    for token in range(2 * SIZE + 1, 3 * SIZE - 1):
        assert not stores([*caller.compute(1, ids(1, token))])
    (store,) = stores([*caller.compute(1, ids(1, 3 * SIZE - 1))])
    assert [page.index for page in store.pages] == [2]


def test_who_comes_after_a_crash_finds_all_full_blocks_of_who_ran() -> None:
    caller = Caller(ram=32, through=True)
    caller.prompt(1, ids(5 * SIZE + 2))
    caller.settle()
    pages = [(slot, caller.pager.page_name(Tier.RAM, slot)) for slot in range(32)]
    assert sum(name is not None for _, name in pages) == 5


def test_without_room_nothing_is_stored_and_the_swap_reserve_stays_free() -> None:
    caller = Caller(ram=4, through=True, reserve=0.5)
    caller.prompt(1, ids(6 * SIZE))
    caller.settle()
    assert saved(caller) == 2
    assert caller.pager.stats().ram.free == 2


def test_a_store_that_fails_costs_the_copy_and_nothing_else() -> None:
    caller = Caller(ram=32, through=True)
    caller.prompt(1, ids(2 * SIZE))
    caller(TransferFailed(caller.transfers.pop()))
    assert saved(caller) == 0
    caller.compute(1, ids(SIZE, 2 * SIZE))
    caller.settle()
    caller(Free(1))
    caller.settle()
    answers = caller.admit(2, ids(3 * SIZE + 1))
    assert [a.computed for a in answers if isinstance(a, Admitted)] == [3 * SIZE]


def test_what_cannot_be_trusted_is_not_found_though_it_was_being_stored() -> None:
    for ends_first in (True, False):
        caller = Caller(ram=32, through=True)
        caller.prompt(1, ids(2 * SIZE + 1))
        if ends_first:
            caller.settle()
        caller(Free(1, cache=False))
        caller.settle()
        assert saved(caller) == 0
        answers = caller.admit(2, ids(2 * SIZE + 1))
        assert [a.computed for a in answers if isinstance(a, Admitted)] == [0]
        assert not [a for a in answers if isinstance(a, Load)]


def test_after_a_truncation_the_new_blocks_are_stored() -> None:
    caller = Caller(ram=32, through=True)
    caller.prompt(1, ids(3 * SIZE))
    caller.settle()
    caller(Truncate(1, SIZE + 1))
    (store,) = stores([*caller.compute(1, ids(SIZE, 500))])
    caller.settle()
    assert [page.index for page in store.pages] == [1]


def test_it_is_off_unless_it_is_asked_for() -> None:
    caller = Caller(ram=32)
    caller.prompt(1, ids(3 * SIZE))
    assert not caller.transfers

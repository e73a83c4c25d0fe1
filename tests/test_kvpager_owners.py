"""Room on disk between several owners: nobody's pages can be pushed out by another's alone."""

from __future__ import annotations

import itertools

import pytest

from kvpager import Adopt, Free, PageName, Tier
from kvpager.errors import ImpossibleEventError
from kvpager.prefix import extend_chain
from tests.support.pager_caller import ROOT, SIZE, Caller, ids

ANN, BOB, EVE = 1001, 1002, 1003
LATER = 1 << 32
"""Of another era, as `pagedd_daemon.owners` has it."""


class Store(Caller):
    """A pager over a disk of 12 pages, to which all that is computed is copied."""

    def __init__(self) -> None:
        super().__init__(gpu=4, disk=12, persists=True)
        self.numbers = itertools.count()

    def keep(self, owner: int, prompts: int) -> None:
        """Prompts of two pages, no two alike, one after the other."""
        for number in itertools.islice(self.numbers, prompts):
            self.prompt(number, ids(2 * SIZE + 1, 1000 * number), owner=owner)
            self(Free(number))
            self.settle()

    @property
    def owned(self) -> dict[int, int]:
        return self.pager.owned()


def test_who_is_alone_may_have_all_of_it() -> None:
    store = Store()
    store.keep(ANN, 20)
    assert store.owned == {ANN: 12}


def test_who_has_no_more_than_an_equal_part_loses_nothing_to_another() -> None:
    store = Store()
    store.keep(ANN, 2)
    store.keep(BOB, 50)
    assert store.owned == {ANN: 4, BOB: 8}
    store.keep(EVE, 1)
    assert store.owned == {ANN: 4, BOB: 6, EVE: 2}
    store.keep(EVE, 50)
    assert store.owned == {ANN: 4, BOB: 4, EVE: 4}


def test_who_comes_later_gets_an_equal_part_from_who_has_most() -> None:
    store = Store()
    store.keep(ANN, 20)
    store.keep(BOB, 50)
    assert store.owned == {ANN: 6, BOB: 6}


def test_what_goes_is_the_oldest_of_its_owner() -> None:
    store = Store()
    store.keep(ANN, 6)
    found = [store.pager.page_name(Tier.DISK, slot) for slot in range(12)]
    store.keep(BOB, 1)
    left = [store.pager.page_name(Tier.DISK, slot) for slot in range(12)]
    chain = bytearray()
    extend_chain(chain, ROOT, ids(2 * SIZE), SIZE)
    gone = {name.digest for name in found if name not in left and name is not None}
    assert gone == {bytes(chain[:32]), bytes(chain[32:])}


def test_an_owner_counts_once_whatever_it_has_given_up() -> None:
    store = Store()
    store.keep(ANN, 2)
    store.keep(ANN + LATER, 50)
    store.keep(BOB, 50)
    assert store.owned == {ANN + LATER: 6, BOB: 6}


def test_owners_are_known_again_after_a_restart() -> None:
    store, heir = Store(), Store()
    store.keep(ANN, 2)
    store.keep(BOB + LATER, 2)
    names = [(slot, store.pager.page_name(Tier.DISK, slot)) for slot in range(12)]
    pages = tuple((slot, name) for slot, name in names if name is not None)
    heir.numbers = itertools.count(100)
    heir(Adopt(Tier.DISK, pages))
    assert heir.owned == {ANN: 4, BOB + LATER: 4}
    heir.keep(BOB, 50)
    assert heir.owned == {ANN: 4, BOB: 8}


@pytest.mark.parametrize("owner", [-1, 1 << 63])
def test_an_owner_that_cannot_be_written_down_is_refused(owner: int) -> None:
    caller = Caller()
    with pytest.raises(ImpossibleEventError, match="owner"):
        caller.admit(1, ids(5), owner=owner)
    with pytest.raises(ImpossibleEventError):
        caller(Adopt(Tier.DISK, ((0, PageName(bytes(32), None, owner)),)))

"""Pages that an earlier life left in a lower tier are found again, and are what their names say."""

from __future__ import annotations

import random
import secrets

import pytest

from kvpager import (
    Admitted,
    Adopt,
    Free,
    ImpossibleEventError,
    Instruction,
    Load,
    Page,
    PageName,
    PagerConfig,
    Preempt,
    PreemptMode,
    Spill,
    Store,
    Tier,
)
from kvpager.prefix import extend_chain
from tests.support.pager_caller import ROOT, SIZE, Caller, ids
from tests.support.pager_models import Model, check
from tests.support.pager_world import World

Places = dict[tuple[Tier, int], PageName]


def stored(pages: int, *, reserve: float = 0.25) -> list[tuple[int, PageName]]:
    """Slots and names of a prompt that another pager has sent to RAM."""
    caller = Caller(ram=32, keep=False, reserve=reserve)
    caller.prompt(1, ids(pages * SIZE))
    caller(Free(1))
    caller.settle()
    found = [(slot, caller.pager.page_name(Tier.RAM, slot)) for slot in range(32)]
    return [(slot, name) for slot, name in found if name is not None]


def test_a_new_pager_finds_what_an_older_one_stored() -> None:
    pages = stored(3)
    assert len(pages) == 3
    caller = Caller(ram=32)
    assert caller(Adopt(Tier.RAM, tuple(pages))) == []
    answers = caller.admit(9, ids(3 * SIZE + 1))
    assert [item for item in answers if isinstance(item, Admitted)] == [Admitted(9, 12, True)]
    (load,) = (item for item in answers if isinstance(item, Load))
    assert {page.slot for page in load.pages} == {slot for slot, _ in pages}


def test_pages_are_adopted_in_any_order_and_reclaimed_from_the_end_of_a_chain() -> None:
    pages = stored(6)
    random.Random(5).shuffle(pages)
    caller = Caller(ram=32)
    caller(Adopt(Tier.RAM, tuple(pages)))
    for left in range(6, 0, -1):
        assert caller.pager.stats().ram.cached == left
        hit = caller.pager._admission._look_up(_chain(6), 6, 1, None)  # type: ignore[arg-type]
        assert len(hit.blocks) == left, "a page in the middle was reclaimed first"
        victim = caller.pager._pool.ram._next_victim()
        caller.pager._pool.ram.disown(victim)
        caller.pager.validate()


def _chain(pages: int) -> bytearray:
    chain = bytearray()
    extend_chain(chain, ROOT, ids(pages * SIZE), SIZE)
    return chain


def test_a_page_that_is_there_twice_is_adopted_once_and_the_rest_stays_free() -> None:
    (slot, name), *_ = stored(1)
    caller = Caller(ram=8)
    caller(Adopt(Tier.RAM, ((slot, name), ((slot + 1) % 8, name))))
    assert caller.pager.stats().ram.cached == 1
    caller(Adopt(Tier.RAM, (((slot + 2) % 8, name),)))
    assert caller.pager.stats().ram.cached == 1
    assert caller.pager.stats().ram.free == 7


def test_what_exceeds_the_caches_share_is_let_go_the_oldest_first() -> None:
    pages = stored(8, reserve=0.0)
    caller = Caller(ram=8, reserve=0.5)
    names = [name for _, name in pages]
    # Not a chain any more, so age alone decides.
    alone = tuple((slot, PageName(name.digest, None)) for slot, name in enumerate(names))
    caller(Adopt(Tier.RAM, alone))
    left = [slot for slot in range(8) if caller.pager.page_name(Tier.RAM, slot) is not None]
    assert left == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "pages",
    [
        ((8, PageName(bytes(32), None)),),
        ((-1, PageName(bytes(32), None)),),
        ((0, PageName(bytes(31), None)),),
        ((0, PageName(bytes(32), b"")),),
        ((0, PageName(bytes(32), None)), (0, PageName(b"x" * 32, None))),
    ],
)
def test_what_cannot_be_adopted_changes_nothing(pages: tuple[tuple[int, PageName], ...]) -> None:
    caller = Caller(ram=8)
    with pytest.raises(ImpossibleEventError, match="slot"):
        caller(Adopt(Tier.RAM, pages))
    assert caller.pager.stats().ram.free == 8
    caller.pager.validate()


def test_nothing_is_adopted_into_the_first_tier() -> None:
    with pytest.raises(ImpossibleEventError, match="lower tier"):
        Caller(ram=8)(Adopt(Tier.GPU, ()))


def test_a_partial_page_has_no_name() -> None:
    caller = Caller(ram=8)
    caller.prompt(1, ids(SIZE + 1))
    out = caller(Preempt(1, PreemptMode.SWAP))
    (store,) = (item for item in out if isinstance(item, Store))
    named: dict[int, bool] = {
        page.tokens: caller.pager.page_name(Tier.RAM, page.slot) is not None
        for page in store.pages
        if isinstance(page, Page)
    }
    assert named == {SIZE: True, 1: False}


# ------------------------------------------------------------------------------------ random lives


class Mortal(World):
    """A history whose backend writes down which slot holds which page, as the daemon's do."""

    def __init__(self, seed: int, config: PagerConfig | None = None) -> None:
        super().__init__(seed, config=config, validate_every=16)
        self.committed: Places = {}

    def apply(self, instruction: Instruction) -> None:
        for place in targets(instruction):
            self.committed.pop(place, None)
        super().apply(instruction)

    def report(self, transfer: int, *, ok: bool) -> None:
        what = self.device.transfers[transfer]
        if ok:
            for tier, slot in targets(what):
                name = self.pager.page_name(tier, slot)
                if name is not None:
                    self.committed[tier, slot] = name
        elif isinstance(what, Load):
            for page in what.pages:
                self.committed.pop((what.tier, page.slot), None)
        super().report(transfer, ok=ok)

    def reborn(self) -> Mortal:
        """What comes after an end in the middle of everything: memory below, and its names."""
        heir = Mortal(self.rng.randrange(2**32), self.config)
        heir.device.below = self.device.below
        heir.device.stored_cells = dict(self.device.stored_cells)
        for tier in (Tier.RAM, Tier.DISK):
            found = [(slot, name) for (at, slot), name in self.committed.items() if at is tier]
            heir.send(Adopt(tier, tuple(found)))
        heir.committed = dict(self.committed)
        for model in self.models.values():
            again = Model(heir.next_seq, model.root, list(model.tokens), width=1)
            heir.next_seq += 1
            heir.models[again.id] = again
        return heir


def targets(instruction: object) -> list[tuple[Tier, int]]:
    """Slots that a transfer fills."""
    if isinstance(instruction, Store):
        return [(instruction.tier, page.slot) for page in instruction.pages]
    if isinstance(instruction, Spill):
        return [(instruction.target, move.target) for move in instruction.pages]
    return []


def test_random_lives_that_end_at_any_moment_leave_pages_that_are_what_they_say() -> None:
    base = secrets.randbelow(2**40)
    print(f"lives {base} to {base + 399}")
    adopted = hits = 0
    for seed in range(base, base + 400):
        world = Mortal(seed)
        try:
            for _ in range(world.rng.randint(20, 120)):
                _anything(world)
            heir = world.reborn()
            stats = heir.pager.stats()
            adopted += stats.ram.cached + stats.disk.cached
            heir.run(15)
            hits += heir.pager.stats().hit_tokens
        except Exception as error:
            raise AssertionError(f"life {seed} failed: {error}") from error
    check(adopted > 60 and hits > 60, f"{adopted} pages adopted, {hits} tokens found")


def _anything(world: World) -> None:
    rules = (world.admit, world.step, world.end_step, world.end_transfer, world.preempt)
    more = (world.resume, world.free, world.end_transfer, world.end_step, world.step)
    world.rng.choice((*rules, *more))()

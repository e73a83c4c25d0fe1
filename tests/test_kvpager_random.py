"""Random histories against naive models, an oracle of contents, and broken pagers to be caught.

The histories of a run are numbered from a seed chosen anew each time. A failure prints its number;
``KVPAGER_SEED=<number> pytest tests/test_kvpager_random.py -k replay`` tells that one again, with
everything that happened (``KVPAGER_SWAPPING=<number>`` one of those in which few sequences take
turns). ``KVPAGER_HISTORIES=<count>`` runs more of them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpager import (
    Admit,
    Event,
    ImpossibleEventError,
    Instruction,
    InvariantError,
    Pager,
    PagerConfig,
    Shrunk,
    TransferDone,
)
from kvpager.pool import Pool
from kvpager.pressure import Shrinking
from kvpager.restoring import Restoring
from kvpager.sequences import SequenceState
from kvpager.steps import Steps
from kvpager.transfers import Transfer
from tests.support.pager_ending import Ending
from tests.support.pager_models import WrongContentError
from tests.support.pager_world import World

HISTORIES = int(os.environ.get("KVPAGER_HISTORIES", "10000"))
REPLAY = int(os.environ.get("KVPAGER_SEED", "0"))
REPLAY_SWAPPING = int(os.environ.get("KVPAGER_SWAPPING", "0"))
FAILURES = (WrongContentError, InvariantError, ImpossibleEventError, AssertionError)


def tell(seed: int, *, validate_every: int = 16) -> World:
    """One history; a failure names its seed."""
    # Many short histories and a few long ones find different mistakes.
    world = World(seed, validate_every=validate_every)
    try:
        world.run(120 if seed % 20 == 0 else 18)
    except Exception as error:
        how = f"KVPAGER_SEED={seed} pytest tests/test_kvpager_random.py -k replay"
        raise AssertionError(f"history {seed} failed: {error}\nreplay: {how}") from error
    return world


@pytest.mark.timeout(1200)  # 20 s of CPU, on a machine that may be busy with something else
def test_thousands_of_random_histories_read_the_right_contents_and_end() -> None:
    base = secrets.randbelow(2**40)
    print(f"histories {base} to {base + HISTORIES - 1}")
    hits = loads = copies = swaps = 0
    for seed in range(base, base + HISTORIES):
        stats = tell(seed).pager.stats()
        hits += stats.hit_tokens
        loads += stats.loaded_pages
        copies += stats.copied_blocks
        swaps += stats.preemptions_swap
    # Histories in which nothing is shared, moved or copied would prove nothing.
    assert min(hits, loads, copies, swaps) > HISTORIES / 100, (hits, loads, copies, swaps)


def test_replay_of_one_history() -> None:
    seed = REPLAY_SWAPPING or REPLAY
    world = World(seed, validate_every=1, swapping=bool(REPLAY_SWAPPING))
    try:
        world.run(80 if REPLAY_SWAPPING else 120 if seed % 20 == 0 else 18)
    finally:
        print(world.config, *world.log, sep="\n")


def test_sequences_that_take_turns_in_a_pool_too_small_are_restored_from_both_ends() -> None:
    base = secrets.randbelow(2**40)
    print(f"histories {base} to {base + HISTORIES // 20 - 1}")
    restores = jumps = 0
    for seed in range(base, base + HISTORIES // 20):
        world = World(seed, swapping=True)
        try:
            world.run(80)
        except Exception as error:
            how = f"KVPAGER_SWAPPING={seed} pytest tests/test_kvpager_random.py -k replay"
            raise AssertionError(f"history {seed} failed: {error}\nreplay: {how}") from error
        restores += world.pager.stats().restores
        jumps += world.jumps
    # About 180 and 66 of 500 histories; half of the rarer one is four deviations away.
    assert min(restores, jumps) > HISTORIES / 300, (restores, jumps)


def test_the_same_seed_tells_the_same_history() -> None:
    first, second = World(7), World(7)
    first.run(80)
    second.run(80)
    assert repr(first.log) == repr(second.log)


# ------------------------------------------------------------------------------- broken on purpose


class FreesBeforeTheStepEnds(Pool):
    """Hands out blocks that a step in flight may still touch."""

    def release(self, blocks, space, epoch=-1):  # type: ignore[no-untyped-def]
        super().release(blocks, space, -1)


class FreesBeforeTheCopyEnds(Pool):
    """Hands out blocks that a store still reads."""

    def pin(self, block: int) -> None:
        pass

    def unpin(self, block: int, *, back: bool = False) -> None:
        pass


class ForgetsTheRemap(Steps):
    """Copies a shared block, and then writes the original all the same."""

    def _remap(self, state: SequenceState, index: int, block: int) -> None:
        pass


class NeverCopies(Steps):
    """Writes blocks that others read."""

    def _copy_on_write(
        self, state: SequenceState, length: int, block: int, out: list[Instruction]
    ) -> None:
        pass


class TrustsLostBlocks(Restoring):
    """Goes on behind blocks whose load has failed as if they were there."""

    def load_ended(self, transfer: Transfer, out: list[Instruction], *, ok: bool) -> None:
        super().load_ended(transfer, out, ok=True)


class GivesMemoryBackTooEarly(Shrinking):
    """Says that the pool has shrunk while steps and copies still use what is gone."""

    def resize(self, gpu_blocks: int, out: list[Instruction]) -> None:
        super().resize(gpu_blocks, out)
        if self.waiting:
            out.append(Shrunk(gpu_blocks))


class DropsTheRoot(Pager):
    """Lets sequences of different namespaces share pages."""

    def handle(self, event: Event) -> list[Instruction]:
        if isinstance(event, Admit):
            event = Admit(event.seq, event.tokens, bytes(32), event.klass, event.width, event.group)
        return super().handle(event)


class BelievesFailedTransfers(Pager):
    """Takes what a failed transfer left behind for content."""

    def handle(self, event: Event) -> list[Instruction]:
        if type(event).__name__ == "TransferFailed":
            event = TransferDone(event.transfer)  # type: ignore[union-attr]
        return super().handle(event)


def with_pool(kind: type[Pool]) -> Callable[[PagerConfig], Pager]:
    def make(config: PagerConfig) -> Pager:
        pager = Pager(config)
        pager._pool.__class__ = kind
        return pager

    return make


def with_restoring(kind: type[Restoring]) -> Callable[[PagerConfig], Pager]:
    def make(config: PagerConfig) -> Pager:
        pager = Pager(config)
        pager._restoring.__class__ = kind
        return pager

    return make


def with_shrinking(kind: type[Shrinking]) -> Callable[[PagerConfig], Pager]:
    def make(config: PagerConfig) -> Pager:
        pager = Pager(config)
        pager._shrinking.__class__ = kind
        return pager

    return make


def with_steps(kind: type[Steps]) -> Callable[[PagerConfig], Pager]:
    def make(config: PagerConfig) -> Pager:
        pager = Pager(config)
        pager._steps.__class__ = kind
        return pager

    return make


BROKEN: dict[str, Callable[[PagerConfig], Pager]] = {
    "frees before the step ends": with_pool(FreesBeforeTheStepEnds),
    "frees before the copy ends": with_pool(FreesBeforeTheCopyEnds),
    "forgets the remap after copy-on-write": with_steps(ForgetsTheRemap),
    "never copies on write": with_steps(NeverCopies),
    "trusts lost blocks": with_restoring(TrustsLostBlocks),
    "gives memory back too early": with_shrinking(GivesMemoryBackTooEarly),
    "drops the root": DropsTheRoot,
    "believes failed transfers": BelievesFailedTransfers,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pager_is_caught_by_what_its_steps_read_alone(name: str) -> None:
    """Without `validate`, which would find most of them sooner."""
    for seed in range(400):
        try:
            swapping = "lost" in name
            World(seed, BROKEN[name], validate_every=10**9, swapping=swapping).run(120)
        except FAILURES:
            return
    pytest.fail(f"a pager that {name} went unnoticed")


# ------------------------------------------------------------------------------------- hypothesis


class PagerMachine(RuleBasedStateMachine):
    """The same world, with hypothesis choosing what happens, so that it can shrink a failure."""

    make: ClassVar[Callable[[PagerConfig], Pager]] = Pager

    @initialize(
        seed=st.integers(0, 2**16),
        gpu_blocks=st.integers(3, 16),
        ram_blocks=st.integers(0, 16),
        block_tokens=st.sampled_from((1, 2, 4)),
        max_sequences=st.sampled_from((0, 4)),
        keep=st.booleans(),
    )
    def start(
        self,
        seed: int,
        gpu_blocks: int,
        ram_blocks: int,
        block_tokens: int,
        max_sequences: int,
        keep: bool,
    ) -> None:
        config = PagerConfig(
            gpu_blocks=gpu_blocks,
            ram_blocks=ram_blocks,
            block_tokens=block_tokens,
            max_sequences=max_sequences,
            keep_cached_on_gpu=keep,
        )
        self.world = World(seed, type(self).make, validate_every=10**9, config=config)

    @rule()
    def admit(self) -> None:
        self.world.admit()

    @rule()
    def launch_a_step(self) -> None:
        self.world.step()

    @rule()
    def end_a_step(self) -> None:
        self.world.end_step()

    @rule(ok=st.booleans(), which=st.integers(0, 7))
    def end_a_transfer(self, ok: bool, which: int) -> None:
        live = list(self.world.device.transfers)
        if live:
            self.world.report(live[which % len(live)], ok=ok)

    @rule()
    def fork(self) -> None:
        self.world.fork()

    @rule()
    def truncate(self) -> None:
        self.world.truncate()

    @rule()
    def preempt(self) -> None:
        self.world.preempt()

    @rule()
    def resume(self) -> None:
        self.world.resume()

    @rule()
    def free(self) -> None:
        self.world.free()

    @rule()
    def pressure(self) -> None:
        self.world.pressure()

    @rule()
    def quota(self) -> None:
        self.world.quota()

    @rule()
    def somebody_needs_most_of_the_pool(self) -> None:
        self.world.flood()

    @rule()
    def nonsense(self) -> None:
        self.world.impossible()

    @rule()
    def the_device_gets_on(self) -> None:
        self.world.idle()

    @invariant()
    def every_invariant_holds(self) -> None:
        if hasattr(self, "world"):
            self.world.pager.validate()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            Ending(self.world).finish()


TestPagerMachine = PagerMachine.TestCase
TestPagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
